"""Tasks out: as many as the staleness bound allows, each asked once.

    outstanding = dispatched - ended <= (max_staleness + 1 - behind) * batch_prompts

Tasks are the actors' credits, so no actor can sample further ahead than the learner will accept. `behind` is
the number of versions by which the newest one stored lags the learner: so stale is already what it samples.
A task whose turn comes in `turn` batches names the version `current + turn - max_staleness`, or the live one
if that is older: an actor that has not fetched it yet does so before it samples.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection

from aspo.config import Config
from aspo.queue import TaskQueue
from aspo.schemas import PolicyVersion, Purpose, RolloutGroup, Task
from aspo_learner.data import Prompt
from aspo_learner.ledger import Ledger
from aspo_learner.order import Order

log = logging.getLogger(__name__)


def task_uid(run: str, purpose: Purpose, index: int) -> str:
    """Name a task; its rollout group carries the same name."""
    return f"{run}:{purpose}:{index}"


def task_index(uid: str, run: str, purpose: Purpose) -> int | None:
    """The index in a uid of this run and purpose, else None."""
    prefix, _, number = uid.rpartition(":")
    known = prefix == f"{run}:{purpose}" and number.isascii() and number.isdecimal() and len(number) < 10
    return int(number) if known else None


class Dispatcher:
    """Keeps the actors in training tasks, within the staleness bound."""

    def __init__(
        self, queue: TaskQueue, prompts: Order, config: Config, ledger: Ledger, cursor: int = 0
    ) -> None:
        self._queue, self._config, self._ledger = queue, config, ledger
        self._prompts = prompts
        # A former learner may have asked for more after its last checkpoint; its answers are ours to use.
        self.cursor = max(cursor, queue.next_index("train"))
        self.limit = (config.learner.max_staleness + 1) * config.learner.batch_prompts

    @property
    def outstanding(self) -> int:
        """Tasks dispatched whose rollouts have not ended."""
        return self.cursor - len(self._ledger)

    def ask_again(self, held: Collection[int]) -> int:
        """Ask anew for every task that has neither ended nor arrived (`held`); returns how many there were.

        Right after a start, and when tasks have been lost: what is being worked on is then done twice, and
        trained once.
        """
        missing = [index for index in self._ledger.missing_below(self.cursor) if index not in held]
        self._queue.reset("train", [self._task(index) for index in missing], next_index=self.cursor)
        return len(missing)

    def recover(self, held: Collection[int]) -> None:
        """Ask again if tasks are outstanding of which Redis knows nothing any more."""
        if self.outstanding > len(held) and self._queue.depth()["train"] == 0:
            log.warning("asked again for %d tasks that were lost", self.ask_again(held))

    def top_up(
        self,
        remaining_steps: int,
        *,
        current: PolicyVersion | None = None,
        live: PolicyVersion | None = None,
        behind: int = 0,
    ) -> None:
        """Dispatch tasks up to the bound, but no more than the remaining steps can use.

        `current` is the learner's version, `live` the one that actors can fetch; without both no task names
        the version that it needs. The newest version stored is `behind` versions older than `current`.
        """
        batch = self._config.learner.batch_prompts
        useful = min(self.limit - behind * batch, remaining_steps * batch)
        places = range(self.outstanding, useful)
        self._queue.put(
            self._task(self.cursor + i, self._oldest(place // batch, current, live))
            for i, place in enumerate(places)
        )
        self.cursor += len(places)

    def _oldest(self, turn: int, current: PolicyVersion | None, live: PolicyVersion | None) -> str | None:
        """The oldest version that is within the bound in `turn` batches from now, as far as there is one."""
        if current is None or live is None:
            return None
        step = current.step + turn - self._config.learner.max_staleness
        return str(min(dataclasses.replace(current, step=step), live)) if step > 0 else None

    def was_asked(self, group: RolloutGroup, index: int) -> bool:
        """Whether a group answers the task of this index, as it was asked."""
        if index >= self.cursor:
            return False
        task = self._task(index)
        return (
            len(group) == task.group_size
            and group.temperature == task.temperature
            and group.prompt_ids.tolist() == task.prompt_ids
        )

    def prompt_of(self, group: RolloutGroup) -> Prompt:
        """What a group that was asked for in training answers."""
        index = task_index(group.uid, self._config.run.name, "train")
        assert index is not None, "the intake admits no other"
        return self._prompts[index]

    def _task(self, index: int, min_version: str | None = None) -> Task:
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
            min_version=min_version,
        )
