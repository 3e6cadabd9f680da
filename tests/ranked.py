"""A learner of several ranks, forked on this machine: rank 0 does as a test says, the others follow."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aspo.config import Config, load_config
from aspo_cli.processes import free_port
from aspo_learner.follower import follow
from forking import forkserver

Lead = Callable[..., None]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(size: int, lead: Lead, config: Path, overrides: list[str], *arguments: Any) -> None:
    """Run `lead(config, *arguments)` at rank 0 of so many, each on one thread, and the others beside it."""
    port = free_port()
    processes = [
        forkserver().Process(
            target=_be, args=(environment(rank, size, port), lead, config, overrides, arguments)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.join()


def _be(
    variables: dict[str, str], lead: Lead, config: Path, overrides: list[str], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    loaded: Config = load_config(config, overrides)
    lead(loaded, *arguments) if variables["RANK"] == "0" else follow(loaded)
