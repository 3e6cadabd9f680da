"""Greedy held-out accuracy, sampled by the actors through the same queue while training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aspo.config import Config
from aspo.queue import TaskQueue
from aspo.schemas import RolloutGroup, Task
from aspo_learner.data import Prompt
from aspo_learner.dispatcher import task_uid


class Evaluator:
    """Asks for one evaluation at a time and gathers its answers."""

    def __init__(self, queue: TaskQueue, prompts: Sequence[Prompt], config: Config) -> None:
        self._queue, self._prompts, self._config = queue, prompts, config
        self._next_index = queue.next_index("eval")
        self._awaited: set[str] = set()
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
        self._awaited, self._scores = {task.uid for task in tasks}, []
        self._queue.put(tasks)

    def take(self, group: RolloutGroup) -> float | None:
        """Take in one answer; returns the accuracy (mean reward) with the last one."""
        if group.uid not in self._awaited:
            return None  # a late duplicate, or an evaluation of a former learner
        self._awaited.remove(group.uid)
        self._scores.append(float(group.rewards.mean()))
        return None if self._awaited else float(np.mean(self._scores))

    def _task(self, index: int, prompt: Prompt, version: str) -> Task:
        return Task(
            uid=task_uid(self._config.run.name, "eval", index),
            index=index,
            purpose="eval",
            prompt_ids=prompt.token_ids,
            group_size=1,
            max_tokens=self._config.sampling.max_tokens,
            temperature=0.0,
            reward_inputs=prompt.reward_inputs,
            min_version=version,
        )
