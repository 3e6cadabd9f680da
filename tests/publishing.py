"""A learner's weight plane as a process to be killed: publishes without end and serves what it stores."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from aspo import fence as fencing
from aspo.config import AuthConfig
from aspo.fence import Fence
from aspo.http import Server, create_app, listen
from aspo.queue import connect
from aspo.schemas import PolicyVersion
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from aspo_learner.publisher import Publisher
from forking import forkserver
from versions import FILES, tensors

KEEP = 4
SNAPSHOT_EVERY = 6
_CHANGES = ("os.rename", "os.remove", "open")


def content(version: PolicyVersion) -> dict[str, Tensor]:
    """What a learner publishes under a name: no two epochs have the same for a step."""
    state = tensors(version.step)
    state["norm"] += version.epoch
    return state


class StepsOfContent:
    """What a publisher needs of a policy."""

    def __init__(self, run: str, epoch: int, step: int) -> None:
        self.version = PolicyVersion(run=run, epoch=epoch, step=step)

    def copy_published(self, copy: dict[str, Tensor]) -> None:
        """Fill `copy` with the current version's content."""
        for name, tensor in content(self.version).items():
            copy.setdefault(name, torch.empty_like(tensor)).copy_(tensor)

    def base(self) -> dict[str, Tensor]:
        """Nothing: these are no adapters."""
        return {}

    def published_files(self) -> dict[str, bytes]:
        """The files beside the weights."""
        return FILES


def start(folder: Path, run: str, redis_url: str, die_at: int = 0) -> tuple[BaseProcess, Connection]:
    """Start a learner over `folder`; its epoch and port come through the pipe, then each version published.

    It goes on from the newest version under the next epoch. It kills itself just before its `die_at`-th
    change of a file, if one is given.
    """
    context = forkserver()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_publish, args=(folder, run, redis_url, die_at, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _publish(folder: Path, run: str, redis_url: str, die_at: int, pipe: Connection) -> None:
    if die_at:
        _die_at_change(folder, die_at)
    leases = Leases()
    fencing.LEASE_S = 0.3  # of lives this short, a dead learner's would take most of the time
    fence = Fence.acquire(connect(redis_url), run, folder.parent)
    store = WeightStore(folder, keep=KEEP, snapshot_every=SNAPSHOT_EVERY, leased=leases.versions)
    newest = store.newest()
    policy: Any = StepsOfContent(run, fence.epoch, newest.step if newest else 0)
    publisher = Publisher(store, policy, run, fence.epoch)
    app = create_app("learner", auth=AuthConfig(), ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, leases))
    app.include_router(blob_routes(store.blobs))
    listener = listen("127.0.0.1", 0, AuthConfig())
    with Server(app, listener):
        pipe.send((fence.epoch, listener.getsockname()[1]))
        while True:
            publisher.publish(policy.version.step)
            publisher.wait()
            pipe.send(str(policy.version))
            policy.version = publisher.version(policy.version.step + 1)


def _die_at_change(folder: Path, count: int) -> None:
    """Have the process kill itself before it makes, renames or deletes a file for the `count`-th time."""
    left = count

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in _CHANGES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not arguments[2] & os.O_CREAT:
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
