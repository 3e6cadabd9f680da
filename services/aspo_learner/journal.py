"""Which tasks every step trained on, written before it trains: a restarted learner trains the same again.

The rollouts of the steps after the last checkpoint are still in Redis, unacknowledged; with the plan, they
form the same batches, whatever has arrived meanwhile. A line a step: `{"step": 7, "tasks": [24, 25]}`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)


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
        return 1 + max((task for tasks in self._plan for task in tasks), default=-1)

    def planned(self, step: int) -> list[int] | None:
        """The tasks to train `step` on, None if it has no plan yet."""
        return self._plan[step - 1] if 0 < step <= len(self._plan) else None

    def write(self, step: int, tasks: Sequence[int]) -> None:
        """Plan a step durably; raises `ValueError` if it is not the next, or has another plan."""
        planned = self.planned(step)
        if planned is not None and planned == list(tasks):
            return
        if step != self.last + 1:
            raise ValueError(f"step {step} cannot be planned after step {self.last}")
        with self._path.open("a") as file:
            file.write(_line(step, tasks))
            file.flush()
            os.fsync(file.fileno())
        self._plan.append(list(tasks))

    def forget_from(self, step: int) -> None:
        """Give up the plan of `step` and later ones, which can no longer be kept to."""
        if step > self.last:
            return
        del self._plan[step - 1 :]
        self._rewrite()

    def _rewrite(self) -> None:
        partial = self._path.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(_line(step, tasks) for step, tasks in enumerate(self._plan, 1))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def _line(step: int, tasks: Sequence[int]) -> str:
    return json.dumps({"step": step, "tasks": list(tasks)}) + "\n"


def _read(path: Path) -> list[list[int]]:
    """Read the plan up to the first line that is broken; a crash may have cut the last one short."""
    plan: list[list[int]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
            if not line.endswith(b"\n") or entry["step"] != len(plan) + 1:
                raise ValueError("not the next step")
            plan.append([int(task) for task in entry["tasks"]])
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the plan in %s ends at step %d (%s)", path, len(plan), error)
            break
    return plan
