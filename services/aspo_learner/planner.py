"""Which rollouts every step trains on: the same as before a crash, else the oldest there are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from aspo.failpoints import reach
from aspo.schemas import PolicyVersion, RolloutGroup
from aspo_learner.dispatcher import task_index
from aspo_learner.intake import Intake
from aspo_learner.journal import Journal
from aspo_learner.ledger import Ledger

log = logging.getLogger(__name__)


class Planner:
    """Takes the batches of steps out of the intake, and notes in the journal what each step trains on.

    Up to `retraining_until` the steps are, or are made again, as an earlier learner made them.
    """

    def __init__(self, journal: Journal, intake: Intake, ledger: Ledger, step: int) -> None:
        self._journal, self._intake, self._ledger = journal, intake, ledger
        self.retraining_until = step

    def resume(self, current: PolicyVersion) -> None:
        """Read what a former learner left; see whether the steps after `current` can be trained as they were.

        If so, their versions come out as they were, and what was published of them stays as it is.
        """
        self._intake.chosen = self._journal.entries_after(current.step)
        while self._intake.pump(current, 0.0):
            pass
        steps = range(current.step + 1, self._journal.last + 1)
        planned = {index for step in steps for index in self._journal.planned(step) or ()}
        if not planned:
            return
        if planned <= self._intake.held:
            log.info("training steps %d to %d again, from the same rollouts", steps[0], steps[-1])
            self._branch_off(steps[-1])
        else:
            lost = len(planned - self._intake.held)
            log.warning("%d rollouts of steps %d to %d are asked for again", lost, steps[0], steps[-1])

    def take(self, count: int, current: PolicyVersion) -> list[RolloutGroup] | None:
        """Take what the step after `current` is planned on or, without a plan, the `count` oldest groups.

        None while some are missing.
        """
        step = current.step + 1
        planned = self._journal.planned(step)
        if planned is not None and not self._ledger.isdisjoint(planned):
            log.error("step %d cannot be trained as it was: one of its rollouts is unusable", step)
            self.forget_after(current.step)
            planned = None
        if planned is not None:
            return self._intake.take_planned(planned)
        return self._intake.take(count, current)

    def write(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Note durably that `step` trains on these groups."""
        named = (task_index(group.uid, self._intake.limits.run, "train") for group in groups)
        indices = [index for index in named if index is not None]
        self._journal.write(step, indices, [self._intake.taken[index] for index in indices])
        reach("step.planned")

    def forget_after(self, step: int) -> None:
        """Give up the plan of the steps after this one; what earlier epochs did of them is lost."""
        self._journal.forget_from(step + 1)
        self._branch_off(step)

    def _branch_off(self, step: int) -> None:
        self.retraining_until = step
        self._intake.staleness = dataclasses.replace(self._intake.staleness, branch=step)
