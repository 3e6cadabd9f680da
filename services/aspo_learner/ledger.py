"""Which tasks have ended (trained, dropped or quarantined): a watermark and what lies beyond it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aspo.queue import QUARANTINE_LENGTH


class Ledger:
    """A set of task indices, compact because tasks end nearly in order.

    Of the tasks that ended only because their answer was quarantined it knows the last ones, as many as the
    quarantine holds: those may be reopened, for they were never trained on.
    """

    def __init__(
        self,
        watermark: int = 0,
        beyond: Iterable[int] = (),
        set_aside: Iterable[int] = (),
        reopened: Iterable[int] = (),
    ) -> None:
        self._watermark, self._beyond = watermark, set(beyond)
        self._aside, self._reopened = set(set_aside), set(reopened)

    def __contains__(self, index: int) -> bool:
        return index not in self._reopened and (index < self._watermark or index in self._beyond)

    def __len__(self) -> int:
        return self._watermark + len(self._beyond) - len(self._reopened)

    def isdisjoint(self, indices: Iterable[int]) -> bool:
        """Whether none of these tasks has ended."""
        return not any(index in self for index in indices)

    def add(self, index: int) -> None:
        """Record that a task has ended, for good."""
        self._aside.discard(index)
        self._reopened.discard(index)
        if index in self:
            return
        self._beyond.add(index)
        while self._watermark in self._beyond:
            self._beyond.remove(self._watermark)
            self._watermark += 1

    def set_aside(self, index: int) -> None:
        """Record that a task has ended with an unusable answer, unless it had ended before."""
        if index in self:
            return
        self.add(index)
        self._aside.add(index)
        if len(self._aside) > QUARANTINE_LENGTH:
            self._aside.remove(min(self._aside))

    def reopen(self, index: int) -> bool:
        """Take back that a task has ended, if it was set aside; False if it was not."""
        if index not in self._aside:
            return False
        self._aside.remove(index)
        self._reopened.add(index)
        return True

    def missing_below(self, index: int) -> list[int]:
        """The tasks below `index` that have not ended, in order."""
        return [i for i in range(min([self._watermark, *self._reopened]), index) if i not in self]

    def state(self) -> dict[str, Any]:
        """The ledger as JSON data."""
        return {
            "watermark": self._watermark,
            "beyond": sorted(self._beyond),
            "set_aside": sorted(self._aside),
            "reopened": sorted(self._reopened),
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> Ledger:
        """Rebuild a ledger from `state`."""
        return cls(**state)
