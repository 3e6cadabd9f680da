"""Greedy held-out accuracy, sampled by the actors through the same queue while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from aspo.config import Config
from aspo.queue import TaskQueue
from aspo.schemas import Task
from aspo_learner.data import Prompt
from aspo_learner.dispatcher import task_uid

log = logging.getLogger(__name__)


class Evaluator:
    """Asks for one evaluation at a time and gathers its answers."""

    def __init__(self, queue: TaskQueue, prompts: Sequence[Prompt], config: Config, epoch: int) -> None:
        self._queue, self._prompts, self._config, self._epoch = queue, prompts, config, epoch
        self._next_index = 0
        self._awaited: dict[str, Task] = {}
        queue.reset("eval")
        self._scores: list[float] = []

    @property
    def running(self) -> bool:
        """Whether answers are still awaited."""
        return bool(self._awaited)

    def start(self, version: str, count: int | None = None) -> None:
        """Ask for greedy answers to the first `count` prompts (all by default) by `version` or newer."""
        tasks = [
            self._task(self._next_index + i, prompt, version)
            for i, prompt in enumerate(self._prompts[:count])
        ]
        self._next_index += len(tasks)
        self._awaited, self._scores = {task.uid: task for task in tasks}, []
        self._queue.put(tasks)

    def recover(self) -> None:
        """Ask again for answers that are awaited, if Redis knows nothing of their tasks any more."""
        if self._awaited and self._queue.depth()["eval"] == 0:
            log.warning("asked again for %d evaluation answers that were lost", len(self._awaited))
            self._queue.reset("eval")
            self._queue.put(self._awaited.values())

    def take(self, uid: str, score: float) -> float | None:
        """Take in one answer; returns the accuracy (mean reward) with the last one."""
        if uid not in self._awaited:
            return None  # a late duplicate, or an evaluation of a former learner
        del self._awaited[uid]
        self._scores.append(score)
        return None if self._awaited else float(np.mean(self._scores))

    def _task(self, index: int, prompt: Prompt, version: str) -> Task:
        return Task(
            # With the epoch: an answer to a former learner's question must not pass for one to ours.
            uid=task_uid(f"{self._config.run.name}:{self._epoch}", "eval", index),
            index=index,
            purpose="eval",
            prompt_ids=prompt.token_ids,
            group_size=1,
            max_tokens=self._config.sampling.max_tokens,
            temperature=0.0,
            reward_inputs=prompt.reward_inputs,
            min_version=version,
        )
