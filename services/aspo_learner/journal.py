"""Which rollouts every step trained on, written before it trains: a restarted learner trains the same again.

The rollouts of the steps after the last checkpoint are still in Redis, unacknowledged; with the plan, they
form the same batches, whatever has arrived meanwhile. A line a step, with the tasks and the entries of Redis
that answered them, for a task may be answered twice:
`{"step": 7, "tasks": [24, 25], "entries": ["actor-0/3-24", "actor-1/4-9"]}`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class _Plan(NamedTuple):
    """A step's tasks, and the entries that answered them."""

    tasks: list[int]
    entries: list[str]


class Journal:
    """The plan of a run's steps, which only grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plan = _read(path)
        self._rewrite()  # a file of our own: a learner before us may have the old one open still

    @property
    def last(self) -> int:
        """The last step there is a plan for, 0 if there is none."""
        return len(self._plan)

    @property
    def cursor(self) -> int:
        """The index above those of all tasks that are planned on."""
        return 1 + max((task for plan in self._plan for task in plan.tasks), default=-1)

    def planned(self, step: int) -> list[int] | None:
        """The tasks to train `step` on, None if it has no plan yet."""
        return self._plan[step - 1].tasks if 0 < step <= len(self._plan) else None

    def entries_after(self, step: int) -> dict[int, str]:
        """The entry that answered each task of the steps after this one, as far as it was noted."""
        later = self._plan[step:]
        return {task: entry for plan in later for task, entry in zip(plan.tasks, plan.entries, strict=False)}

    def write(self, step: int, tasks: Sequence[int], entries: Sequence[str] = ()) -> None:
        """Plan a step durably; raises `ValueError` if it is not the next, or has another plan."""
        planned = self.planned(step)
        if planned is not None and planned == list(tasks):
            return
        if step != self.last + 1:
            raise ValueError(f"step {step} cannot be planned after step {self.last}")
        plan = _Plan(list(tasks), list(entries))
        with self._path.open("a") as file:
            file.write(_line(step, plan))
            file.flush()
            os.fsync(file.fileno())
        self._plan.append(plan)

    def forget_from(self, step: int) -> None:
        """Give up the plan of `step` and later ones, which can no longer be kept to."""
        if step > self.last:
            return
        del self._plan[step - 1 :]
        self._rewrite()

    def _rewrite(self) -> None:
        partial = self._path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(_line(step, plan) for step, plan in enumerate(self._plan, 1))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def _line(step: int, plan: _Plan) -> str:
    return json.dumps({"step": step, "tasks": plan.tasks, "entries": plan.entries}) + "\n"


def _read(path: Path) -> list[_Plan]:
    """Read the plan up to the first line that is broken; a crash may have cut the last one short."""
    plan: list[_Plan] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
            if not line.endswith(b"\n") or entry["step"] != len(plan) + 1:
                raise ValueError("not the next step")
            tasks, entries = entry["tasks"], entry.get("entries", ())
            plan.append(_Plan([int(task) for task in tasks], [str(name) for name in entries]))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the plan in %s ends at step %d (%s)", path, len(plan), error)
            break
    return plan
