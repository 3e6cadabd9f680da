"""What both halves of a comparison use: lines of JSON between them, and a clock; standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any


class Channel:
    """The child's end: orders from standard input, answers on what was standard output.

    What anything else prints goes to standard error, so that no progress bar gets between the answers.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def take(self) -> dict[str, Any]:
        """Wait for the next order; ends the process when there is none to come."""
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        order: dict[str, Any] = json.loads(line)
        return order

    def give(self, **answer: Any) -> None:
        """Send an answer."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


@dataclass(frozen=True)
class Moment:
    """A point in time, by the wall and by the processor time of this process."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time())

    def since(self, began: Moment) -> dict[str, float]:
        """Seconds that have gone by."""
        return {"wall": self.wall - began.wall, "cpu": self.cpu - began.cpu}
