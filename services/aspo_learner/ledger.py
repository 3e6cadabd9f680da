"""Which tasks have ended (trained, dropped or quarantined): a watermark and what lies beyond it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Ledger:
    """A set of task indices, compact because tasks end nearly in order."""

    def __init__(self, watermark: int = 0, beyond: set[int] | None = None) -> None:
        self._watermark, self._beyond = watermark, set(beyond or ())

    def __contains__(self, index: int) -> bool:
        return index < self._watermark or index in self._beyond

    def __len__(self) -> int:
        return self._watermark + len(self._beyond)

    def isdisjoint(self, indices: Iterable[int]) -> bool:
        """Whether none of these tasks has ended."""
        return not any(index in self for index in indices)

    def add(self, index: int) -> None:
        """Record that a task has ended."""
        if index in self:
            return
        self._beyond.add(index)
        while self._watermark in self._beyond:
            self._beyond.remove(self._watermark)
            self._watermark += 1

    def missing_below(self, index: int) -> list[int]:
        """The tasks below `index` that have not ended, in order."""
        return [i for i in range(self._watermark, index) if i not in self._beyond]

    def state(self) -> dict[str, Any]:
        """The ledger as JSON data."""
        return {"watermark": self._watermark, "beyond": sorted(self._beyond)}

    @classmethod
    def load(cls, state: dict[str, Any]) -> Ledger:
        """Rebuild a ledger from `state`."""
        return cls(state["watermark"], set(state["beyond"]))
