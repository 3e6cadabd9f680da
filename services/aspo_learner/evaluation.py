"""Held-out accuracy, sampled by the actors through the same queue while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from aspo.config import Config
from aspo.queue import TaskQueue
from aspo.schemas import FloatArray, RolloutGroup, Task
from aspo_learner.data import HeldOut, Prompt
from aspo_learner.dispatcher import task_uid
from aspo_learner.estimates import pass_at_k

log = logging.getLogger(__name__)


class Evaluator:
    """Asks for one evaluation at a time and gathers its answers."""

    def __init__(self, queue: TaskQueue, sets: Sequence[HeldOut], config: Config, epoch: int) -> None:
        self._queue, self._sets, self._config, self._epoch = queue, sets, config, epoch
        self._next_index = 0
        self._awaited: dict[str, Task] = {}
        self._set_of: dict[str, str] = {}
        self._rewards: dict[str, list[FloatArray]] = {}
        queue.reset("eval")
        self._tokens = self._answers = 0  # of the last evaluation
        self._trained = 0

    @property
    def running(self) -> bool:
        """Whether answers are still awaited."""
        return bool(self._awaited)

    def due(self, step: int, trained: int) -> bool:
        """Whether to evaluate at a step; `trained` counts the tokens trained on since the run's start.

        Not while it would take more than its share of the tokens trained on since the last that was due,
        judged by the mean length of the answers had so far.
        """
        config = self._config.eval
        if self.running or step % config.every:
            return False
        answers = sum(len(one.prompts[: config.max_prompts]) * one.chosen.k for one in self._sets)
        cost = answers * self._tokens / max(1, self._answers)
        if cost > config.max_share * (trained - self._trained):
            log.info(
                "no evaluation at step %d: its %d tokens would exceed eval.max_share; raise it", step, cost
            )
            return False
        self._trained = trained
        return True

    def state(self) -> dict[str, int]:
        """What a checkpoint must hold, so that a restart does not make an evaluation free."""
        return {"tokens": self._tokens, "answers": self._answers, "trained": self._trained}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue from what `state` returned."""
        self._tokens, self._answers = state["tokens"], state["answers"]
        self._trained = state["trained"]

    def start(self, version: str, count: int | None = None) -> None:
        """Ask for answers to the first `count` prompts of each set (all by default) by `version` or newer."""
        tasks: list[Task] = []
        self._set_of = {}
        for held_out in self._sets:
            for prompt in held_out.prompts[:count]:
                tasks.append(self._task(self._next_index + len(tasks), prompt, held_out, version))
                self._set_of[tasks[-1].uid] = held_out.chosen.label
        self._next_index += len(tasks)
        self._awaited = {task.uid: task for task in tasks}
        self._rewards = {held_out.chosen.label: [] for held_out in self._sets}
        self._tokens = self._answers = 0
        self._queue.put(tasks)

    def recover(self) -> None:
        """Ask again for answers that are awaited, if Redis knows nothing of their tasks any more."""
        if self._awaited and self._queue.depth()["eval"] == 0:
            log.warning("asked again for %d evaluation answers that were lost", len(self._awaited))
            self._queue.reset("eval")
            self._queue.put(self._awaited.values())

    def take(self, uid: str, group: RolloutGroup | None) -> dict[str, float] | None:
        """Take in one prompt's answers, None for unusable ones; returns the figures with the last."""
        task = self._awaited.pop(uid, None)
        if task is None:
            return None  # a late duplicate, or an evaluation of a former learner
        if group is None or len(group) != task.group_size:
            # What cannot be used is wrong: asked again it would come again.
            rewards = np.full(task.group_size, self._config.reward.failed_score, dtype=np.float32)
        else:
            rewards = group.rewards
            self._tokens += int(group.model_lengths.sum())
            self._answers += len(group)
        self._rewards[self._set_of[uid]].append(rewards)
        if self._awaited:
            return None
        return self._figures() | {"evaluation_tokens": float(self._tokens)}

    def _figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, rewards in self._rewards.items():
            table = np.stack(rewards)
            found[f"set_accuracy/{label}"] = float(table.mean())
            if table.shape[1] > 1:
                right = table > self._config.eval.right_above
                found[f"set_pass/{label}"] = float(pass_at_k(right, table.shape[1]).mean())
        return {"accuracy": _mean(found[f"set_accuracy/{label}"] for label in self._rewards)} | found

    def _task(self, index: int, prompt: Prompt, held_out: HeldOut, version: str) -> Task:
        return Task(
            # With the epoch: an answer to a former learner's question must not pass for one to ours.
            uid=task_uid(f"{self._config.run.name}:{self._epoch}", "eval", index),
            index=index,
            purpose="eval",
            prompt_ids=prompt.token_ids,
            group_size=held_out.chosen.k,
            max_tokens=self._config.sampling.max_tokens,
            temperature=held_out.chosen.temperature,
            reward_inputs=prompt.reward_inputs,
            min_version=version,
        )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
