"""The study's cells: which loss, how stale, how many updates a batch, and in what order they are run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any, Literal

LOSSES = ("aspo", "grpo", "dapo", "no-is", "response-mean", "cispo", "gspo")
STALENESS = (0, 1, 4, 16, 64)
SEEDS = (0, 1, 2, 3, 4)
RATES = (3e-5, 1e-4, 3e-4)
TUNING_SEEDS, TUNING_STEPS = (100, 101), 48
MAIN_TASK = "addition"  # on which all is compared, and rates are tuned
PROMPTS, GROUP_SIZE = 8, 8  # of a batch

PHASES = ("tune", "core", "ratio", "dual", "levels", "updates", "full")  # in order of what they decide
Row = dict[str, Any]


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """The setting of one run, which is all that its result depends on."""

    task: str
    loss: str = "aspo"
    staleness: int = 4
    updates: int = 4
    reference: Literal["behavior", "proximal"] = "behavior"
    dual_clip: bool = True
    learning_rate: float = 1e-4
    steps: int = 80
    seed: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The setting, to find a result by."""
        return tuple(asdict(self).values())


SETTING = tuple(asdict(Cell(task="")))  # the names of a cell's settings


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a result's cell."""
    return tuple(row[name] for name in SETTING)


def tuning() -> Iterator[Cell]:
    """The same budget for every loss: three learning rates, two seeds, staleness 4, half a run, one task."""
    for seed, loss, rate in product(TUNING_SEEDS, LOSSES, RATES):
        yield Cell(task=MAIN_TASK, loss=loss, learning_rate=rate, steps=TUNING_STEPS, seed=seed)


def best_rates(rows: Iterable[Row]) -> dict[str, float]:
    """By loss, the tuned learning rate: of the best mean accuracy over the evaluations of a run.

    The mean over a run tells apart rates that end alike; of equals the lowest rate is taken.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["seed"] in TUNING_SEEDS:
            found.setdefault(row["loss"], {}).setdefault(row["learning_rate"], []).append(
                fmean(row["accuracies"])
            )
    return {loss: max(sorted(rates), key=lambda rate: fmean(rates[rate])) for loss, rates in found.items()}


def plan(phase: str, tasks: Sequence[str], rates: Mapping[str, float]) -> Iterator[Cell]:
    """The cells of a phase, a seed after the other, so that what is done is balanced whenever it stops."""
    if phase == "tune":
        yield from tuning()
        return
    for seed, task in product(SEEDS, tasks):
        for cell in _around(phase, task):
            yield replace(cell, seed=seed, learning_rate=rates[cell.loss])


def _around(phase: str, task: str) -> Iterator[Cell]:
    """A phase's cells of a task; all phases but the last take from what the last one covers in full."""
    pair, trio = ("aspo", "grpo"), ("aspo", "grpo", "no-is")
    main = task == MAIN_TASK
    if phase == "core":
        yield from _grid(task, loss=LOSSES if main else trio, staleness=(0, 4, 64))
    elif phase == "full":
        yield from _grid(task, loss=LOSSES, staleness=STALENESS)
        yield from _grid(task, loss=trio, staleness=(4, 16, 64), reference=("proximal",))
        yield from _grid(task, loss=pair, staleness=(16, 64), dual_clip=(False,))
        yield from _grid(task, loss=pair, staleness=(0, 4, 64), updates=(1, 12))
    elif main and phase == "ratio":
        yield from _grid(task, loss=pair, staleness=(4, 64), reference=("proximal",))
    elif main and phase == "dual":
        yield from _grid(task, loss=pair, staleness=(64,), dual_clip=(False,))
    elif main and phase == "levels":
        yield from _grid(task, loss=(*trio, "cispo"), staleness=(1, 16))
    elif main and phase == "updates":
        yield from _grid(task, loss=pair, staleness=(0, 4, 64), updates=(1, 12))


def _grid(task: str, **factors: Sequence[Any]) -> Iterator[Cell]:
    for values in product(*factors.values()):
        yield Cell(task=task, **dict(zip(factors, values, strict=True)))
