"""An actor without an engine: every task's rollouts are drawn from its index, so that runs can be compared.

What kills do to a run can be told exactly only if the rollouts do not depend on when they were asked for.
"""

from __future__ import annotations

import json
import threading
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import redis

from aspo.codec import encode_group
from aspo.queue import RolloutWriter, TaskQueue, connect
from aspo.schemas import RolloutGroup, Task, VersionSpan

SEVEN = 9  # the token


class ScriptedActor:
    """Answers tasks in a thread of its own, under the version that the learner's store says is live."""

    def __init__(self, url: str, run: str, folder: Path, *, name: str = "scripted") -> None:
        self._url, self._run, self._live, self._name = url, run, folder / "state" / "weights" / "live", name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        client = connect(self._url, retries=60)
        tasks = TaskQueue(client, self._run, lease_s=2.0)
        writer = RolloutWriter(client, self._run, self._name)
        while not self._stop.is_set():
            try:
                for claim in tasks.claim(self._name, count=8, block_ms=50):
                    writer.put(claim.task.uid, encode_group(answer(claim.task, self._version())))
                    tasks.finish([claim])
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                tasks = TaskQueue(client, self._run, lease_s=2.0)  # Redis has lost its data
        client.close()

    def _version(self) -> str:
        try:
            return str(json.loads(self._live.read_bytes())["version"])
        except FileNotFoundError:
            return f"{self._run}/1/0"


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
