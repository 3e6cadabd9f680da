"""Tasks out: as many as the staleness bound allows, each asked once.

    outstanding = dispatched - ended <= (max_staleness + 1) * batch_prompts

Tasks are the actors' credits, so no actor can sample further ahead than the learner will accept.
"""

from __future__ import annotations

from collections.abc import Sequence

from aspo.config import Config
from aspo.queue import TaskQueue
from aspo.schemas import Purpose, Task
from aspo_learner.data import Prompt, PromptOrder
from aspo_learner.ledger import Ledger


def task_uid(run: str, purpose: Purpose, index: int) -> str:
    """Name a task; its rollout group carries the same name."""
    return f"{run}:{purpose}:{index}"


def task_index(uid: str, run: str, purpose: Purpose) -> int | None:
    """The index in a uid of this run and purpose, else None."""
    prefix, _, number = uid.rpartition(":")
    return int(number) if prefix == f"{run}:{purpose}" and number.isdecimal() else None


class Dispatcher:
    """Keeps the actors in training tasks, within the staleness bound."""

    def __init__(
        self, queue: TaskQueue, prompts: Sequence[Prompt], config: Config, ledger: Ledger, cursor: int = 0
    ) -> None:
        self._queue, self._config, self._ledger = queue, config, ledger
        self._prompts = PromptOrder(prompts, config.run.seed)
        self.cursor = cursor
        self.limit = (config.learner.max_staleness + 1) * config.learner.batch_prompts
        if queue.next_index("train") < cursor:
            # Redis has lost its data since the checkpoint: ask again for what has not ended.
            queue.put(self._task(index) for index in ledger.missing_below(cursor))

    @property
    def outstanding(self) -> int:
        """Tasks dispatched whose rollouts have not ended."""
        return self.cursor - len(self._ledger)

    def top_up(self, remaining_steps: int) -> None:
        """Dispatch tasks up to the bound, but no more than the remaining steps can use."""
        useful = min(self.limit, remaining_steps * self._config.learner.batch_prompts)
        count = max(0, useful - self.outstanding)
        self._queue.put(self._task(index) for index in range(self.cursor, self.cursor + count))
        self.cursor += count

    def _task(self, index: int) -> Task:
        prompt, sampling = self._prompts[index], self._config.sampling
        return Task(
            uid=task_uid(self._config.run.name, "train", index),
            index=index,
            purpose="train",
            prompt_ids=prompt.token_ids,
            group_size=sampling.group_size,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            reward_inputs=prompt.reward_inputs,
        )
