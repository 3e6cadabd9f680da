"""An actor without an engine: every task's rollouts are drawn from its index, so that runs can be compared.

What kills do to a run can be told exactly only if the rollouts do not depend on when they were asked for.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import redis

from aspo.codec import encode_group
from aspo.queue import RolloutWriter, TaskQueue, connect, refuses_writes
from aspo.schemas import PolicyVersion, RolloutGroup, Task, VersionSpan
from forking import forkserver

SEVEN = 9  # the token


class ScriptedActor:
    """Answers tasks in a thread of its own, under the version that the learner's store says is live.

    With a lease of 0 it must be the only one: what is pending is its own, and in order it begins with that.
    """

    def __init__(
        self, url: str, run: str, folder: Path, *, name: str = "scripted", lease_s: float = 2.0
    ) -> None:
        self._url, self._run, self._live, self._name = url, run, folder / "state" / "weights" / "live", name
        self._lease_s = lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def work(self) -> None:
        """Answer tasks, one at a time, until told to stop; what Redis refuses is tried again."""
        client = connect(self._url, retries=60)
        tasks = TaskQueue(client, self._run, lease_s=self._lease_s)
        writer = RolloutWriter(client, self._run, self._name)
        while not self._stop.is_set():
            with self._patience():
                for claim in tasks.claim(self._name, count=1, block_ms=50):
                    self._store(writer, claim.task)
                    tasks.finish([claim])
        client.close()

    def _store(self, writer: RolloutWriter, task: Task) -> None:
        while task.min_version and self._version() < PolicyVersion.parse(task.min_version):
            if self._stop.wait(0.01):
                return
        payload = encode_group(answer(task, str(self._version())))
        stored = False
        while not stored and not self._stop.is_set():
            with self._patience():
                writer.put(task.uid, payload)
                stored = True

    @contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except redis.ResponseError as error:
            if not refuses_writes(error):
                raise
            self._stop.wait(0.05)

    def _version(self) -> PolicyVersion:
        try:
            return PolicyVersion.parse(json.loads(self._live.read_bytes())["version"])
        except FileNotFoundError:
            return PolicyVersion(epoch=1, step=0, run=self._run)


class ScriptedProcess:
    """The only scripted actor of a run, in a process of its own that may be killed and started again."""

    def __init__(self, url: str, run: str, folder: Path) -> None:
        self._arguments = url, run, folder
        self.start()

    def start(self) -> None:
        """Start it."""
        self._process = forkserver().Process(target=_work_alone, args=self._arguments)
        self._process.start()

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._process.kill()
        self._process.join()


def _work_alone(url: str, run: str, folder: Path) -> None:
    ScriptedActor(url, run, folder, lease_s=0.0).work()


def answer(task: Task, version: str) -> RolloutGroup:
    """The one answer to a task: random digits by its index, the reward the share of sevens."""
    rng = np.random.default_rng(zlib.crc32(f"{task.purpose} {task.index}".encode()))
    lengths = rng.integers(1, task.max_tokens + 1, size=task.group_size)
    tokens = rng.integers(2, 12, size=int(lengths.sum()))
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return RolloutGroup(
        uid=task.uid,
        actor="scripted",
        purpose=task.purpose,
        temperature=task.temperature,
        prompt_ids=np.asarray(task.prompt_ids, dtype=np.int32),
        lengths=lengths.astype(np.int32),
        token_ids=tokens.astype(np.int32),
        behavior_logprobs=np.full(len(tokens), -np.log(16), dtype=np.float32),
        rewards=np.array([np.mean(part == SEVEN) for part in parts], dtype=np.float32),
        failed=np.zeros(task.group_size, dtype=bool),
        finish_reasons=("length",) * task.group_size,
        spans=tuple((VersionSpan(version, int(length)),) for length in lengths),
    )
