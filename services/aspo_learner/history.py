"""A run's figures by step, as columns that can be drawn: any stretch of steps in so many points.

    history = History(lambda: run_history.steps)
    history.columns(["reward", "set_reward"], points=600, first=0, last=None)

It reads the list that the training thread appends to when it is asked, so a step costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

Column = list[float | None]


class Curves:
    """Columns [N] float64 of metrics that grow by the step; NaN where a step has no such figure."""

    def __init__(self) -> None:
        self._columns: dict[str, NDArray[np.float64]] = {}
        self._room, self.length = 256, 0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in one step's figures."""
        if self.length == self._room:
            self._room *= 2
            for name, column in self._columns.items():
                self._columns[name] = np.append(column, np.full(self._room - len(column), np.nan))
        for name, value in metrics.items():
            if name not in self._columns:
                self._columns[name] = np.full(self._room, np.nan)
            self._columns[name][self.length] = value
        self.length += 1

    def named(self, names: Collection[str]) -> dict[str, NDArray[np.float64]]:
        """The columns of these metrics; `x` stands for each `x/y`."""
        return {
            name: column[: self.length]
            for name, column in self._columns.items()
            if name.partition("/")[0] in names
        }


class HistoryPage(BaseModel):
    """Columns over the steps from `first` to `last`, counted from 0 among `steps`; None where there is none.

    Each value is the mean over `stride` steps, but for `step`, which is the last of them.
    """

    steps: int
    first: int
    last: int
    stride: int
    columns: dict[str, Column]


class History:
    """The figures of a run that goes on; safe from any thread."""

    def __init__(self, steps: Callable[[], Sequence[Mapping[str, float]]]) -> None:
        self._steps, self._curves = steps, Curves()
        self._lock = threading.Lock()

    @property
    def length(self) -> int:
        """How many steps there are."""
        return len(self._steps())

    def since(self, first: int) -> list[dict[str, float]]:
        """The figures of the steps from the one counted `first` on, from 0."""
        return [dict(metrics) for metrics in self._steps()[first:]]

    def columns(self, names: Collection[str], *, points: int, first: int, last: int | None) -> HistoryPage:
        """A stretch of the run in at most `points` points."""
        with self._lock:
            for metrics in self._steps()[self._curves.length :]:
                self._curves.add(metrics)
            steps = self._curves.length
            last = steps if last is None else min(last, steps)
            first = min(first, last)
            stride = max(1, -(-(last - first) // points))
            found = {
                name: column[first:last] for name, column in self._curves.named({*names, "step"}).items()
            }
            columns: dict[str, Column] = {"step": []}
            columns |= {
                name: _numbers(_ends(column, stride) if name == "step" else _means(column, stride))
                for name, column in found.items()
            }
        return HistoryPage(steps=steps, first=first, last=last, stride=stride, columns=columns)


def _means(column: NDArray[np.float64], stride: int) -> NDArray[np.float64]:
    """Means over every `stride` values, of those that are there; NaN where none is."""
    there = ~np.isnan(column)
    starts = np.arange(0, len(column), stride)
    if not len(starts):
        return column
    totals = np.add.reduceat(np.where(there, column, 0.0), starts)
    counts = np.add.reduceat(there.astype(np.float64), starts)
    return np.where(counts > 0, totals / np.maximum(counts, 1.0), np.nan)


def _ends(column: NDArray[np.float64], stride: int) -> NDArray[np.float64]:
    ends: NDArray[np.float64] = column[
        np.minimum(np.arange(0, len(column), stride) + stride, len(column)) - 1
    ]
    return ends


def _numbers(values: NDArray[np.float64]) -> Column:
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
