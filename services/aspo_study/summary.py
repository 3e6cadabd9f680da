"""What the runs come to, as tables in Markdown: means over seeds with 95 % intervals by Student's t.

Runs of one seed meet the same problems, so settings are compared seed by seed: a difference is the mean of
the seeds' differences with the t interval of these, and its effect size that mean over the standard deviation
within a setting (pooled over the two).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aspo.config import ConfigError
from aspo_study.cells import LOSSES, MAIN_TASK, RATES, SEEDS, SETTING, TUNING_SEEDS, Cell, Row, best_rates

T_95 = (0.0, 0.0, 12.706, 4.303, 3.182, 2.776)  # Student's t for an interval of 95 %, by the number of values
CONFIRMED = "confirmed.csv"
Values = dict[int, float]  # by seed
_TEXT = {"task", "loss", "reference"}
FIGURES = {
    "entropy": ("entropy_end", 3),
    "KL to start": ("kl_start", 3),
    "weight, A > 0": ("weight_mean_pos", 2),
    "clipped, A > 0": ("clip_fraction_pos", 3),
    "clipped, A < 0": ("clip_fraction_neg", 3),
    "dual-clipped, A < 0": ("dual_clip_fraction_neg", 4),
    "gradient norm": ("grad_norm_median", 1),
    "99 % / median": ("norm_tail", 1),
    "max / median": ("norm_peak", 1),
    "repetition": ("repetition", 3),
}


class Study:
    """Results by setting; figures are looked up by a cell, whatever its seed and learning rate."""

    def __init__(self, rows: Iterable[Row], confirmed: Iterable[Row] = ()) -> None:
        self.confirmed = list(confirmed)
        everything = [_with_tails(row) for row in rows]
        self.tuned = [row for row in everything if row["seed"] in TUNING_SEEDS]
        self.rows = [row for row in everything if row["seed"] in SEEDS]
        self._found: dict[tuple[Any, ...], dict[int, Row]] = {}
        for row in self.rows:
            self._found.setdefault(_setting(row), {})[row["seed"]] = row

    @property
    def tasks(self) -> list[str]:
        """In the order of the alphabet."""
        return sorted({row["task"] for row in self.rows + self.tuned})

    def values(self, cell: Cell, figure: str) -> Values:
        """A figure's values by seed; empty where nothing was run."""
        return {seed: float(row[figure]) for seed, row in sorted(self._rows(cell).items())}

    def _rows(self, cell: Cell) -> dict[int, Row]:
        return self._found.get(_setting({name: getattr(cell, name) for name in SETTING}), {})

    def curves(self, cell: Cell) -> list[list[float]]:
        """The seeds' accuracies by evaluation."""
        return [row["accuracies"] for row in self._rows(cell).values()]

    def levels(self, **fixed: Any) -> list[int]:
        """The stalenesses that were run under some settings."""
        chosen = (row for row in self.rows if all(row[name] == value for name, value in fixed.items()))
        return sorted({row["staleness"] for row in chosen})


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in SETTING if name not in ("learning_rate", "seed", "steps"))


def _by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(_setting(row), []).append(row)
    return list(found.values())


def _with_tails(row: Row) -> Row:
    median = row["grad_norm_median"]
    tails = {"norm_tail": row["grad_norm_p99"] / median, "norm_peak": row["grad_norm_max"] / median}
    return row | tails | {"accuracy_last": row["accuracies"][-1]}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t, for up to five values."""
    half = T_95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), half


def show(values: Values, digits: int = 2) -> str:
    """Mean and half-width, and the number of seeds where it is not that of the plan."""
    known = [value for value in values.values() if np.isfinite(value)]
    if not known:
        return ""
    mean, half = interval(known)
    text = f"{mean:.{digits}f} ± {half:.{digits}f}" if len(known) > 1 else f"{mean:.{digits}f}"
    return text if len(known) == len(SEEDS) else f"{text} (n = {len(known)})"


def difference(left: Values, right: Values) -> str:
    """Left less right, seed by seed, with its interval and effect size; bold where that excludes 0."""
    seeds = sorted(left.keys() & right.keys())
    if len(seeds) < 2:
        return ""
    mean, half = interval([left[seed] - right[seed] for seed in seeds])
    pooled = np.sqrt(np.mean([np.var([side[s] for s in seeds], ddof=1) for side in (left, right)]))
    size = f", d = {mean / pooled:+.1f}" if pooled > 0 else ""
    text = f"{mean:+.3f} ± {half:.3f}{size}"
    text = f"**{text}**" if abs(mean) > half else text
    return text if len(seeds) == len(SEEDS) else f"{text} (n = {len(seeds)})"


def apart(left: Values, right: Values) -> str:
    """Left less right where seeds have nothing in common, with the interval of the two together."""
    if not left or not right:
        return ""
    (a, of_a), (b, of_b) = interval(list(left.values())), interval(list(right.values()))
    return f"{a - b:+.3f} ± {float(np.hypot(of_a, of_b)):.3f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Iterable[Row], confirmed: Iterable[Row] = ()) -> str:
    """All tables of the study, and of what was run with the service."""
    study = Study(rows, confirmed)
    return "\n\n".join(part for section in _SECTIONS for part in section(study)) + "\n"


def _tuning(study: Study) -> Iterator[str]:
    yield "### Learning rates"
    yield f"Mean accuracy over the tuning runs ({MAIN_TASK}, staleness 4), the best in bold:"
    chosen = best_rates(study.tuned)
    body = []
    for loss in LOSSES:
        means = {rate: _tuning_mean(study, loss, rate) for rate in RATES}
        cells = [f"**{text}**" if rate == chosen.get(loss) else text for rate, text in means.items()]
        body.append([loss, *cells])
    yield table(["loss", *(f"{rate:g}" for rate in RATES)], body)


def _tuning_mean(study: Study, loss: str, rate: float) -> str:
    runs = [r["accuracies"] for r in study.tuned if (r["loss"], r["learning_rate"]) == (loss, rate)]
    return f"{np.mean(runs):.3f}" if runs else ""


def _accuracy(figure: str, title: str) -> Callable[[Study], Iterator[str]]:
    def section(study: Study) -> Iterator[str]:
        yield f"### {title}"
        for task in study.tasks:
            levels = study.levels(task=task)
            base = Cell(task=task)
            body = [
                [loss, *(show(study.values(replace(base, loss=loss, staleness=k), figure)) for k in levels)]
                for loss in LOSSES
            ]
            yield f"{task}, by staleness:"
            yield table(["loss", *map(str, levels)], (line for line in body if any(line[1:])))

    return section


def _against_grpo(study: Study) -> Iterator[str]:
    yield "### Final accuracy less GRPO's"
    for task in study.tasks:
        levels = study.levels(task=task)
        body = []
        for loss in LOSSES:
            pairs = [
                (Cell(task=task, loss=loss, staleness=k), Cell(task=task, loss="grpo", staleness=k))
                for k in levels
            ]
            cells = [difference(*(study.values(cell, "accuracy_final") for cell in pair)) for pair in pairs]
            body.append([loss, *cells])
        yield f"{task}, by staleness:"
        yield table(
            ["loss", *map(str, levels)], (line for line in body if line[0] != "grpo" and any(line[1:]))
        )


def _described(study: Study) -> Iterator[str]:
    yield "### What the runs looked like"
    for task in study.tasks:
        body = []
        for loss in LOSSES:
            for k in study.levels(task=task):
                cell = Cell(task=task, loss=loss, staleness=k)
                body.append([loss, str(k), *(show(study.values(cell, *f), d) for *f, d in FIGURES.values())])
        yield f"{task}:"
        yield table(["loss", "staleness", *FIGURES], (line for line in body if any(line[2:])))


def _slice(title: str, **setting: Any) -> Callable[[Study], Iterator[str]]:
    """A section on one setting that differs from the study's usual one."""

    def section(study: Study) -> Iterator[str]:
        body = []
        for task in study.tasks:
            for loss in LOSSES:
                for k in study.levels(task=task, loss=loss, **setting):
                    usual = Cell(task=task, loss=loss, staleness=k)
                    cells = (replace(usual, **setting), usual)
                    figures = ("accuracy_final", "accuracy_best", "entropy_end", "norm_peak")
                    pairs = [[study.values(cell, figure) for cell in cells] for figure in figures]
                    shown = [show(pairs[0][0]), difference(*pairs[0]), difference(*pairs[1])]
                    shown += [f"{show(a)} (usual: {show(b)})" for a, b in pairs[2:]]
                    body.append([task, loss, str(k), *shown])
        if body:
            yield f"### {title}"
            yield table(
                [
                    "task",
                    "loss",
                    "staleness",
                    "final",
                    "final, less usual",
                    "best, less usual",
                    "entropy",
                    "max / median norm",
                ],
                body,
            )

    return section


def _confirmed(study: Study) -> Iterator[str]:
    """The service's runs beside those of the sampler at the staleness that is the service's bound."""
    body = []
    for runs in _by_setting(study.confirmed):
        cell = Cell(**{key: runs[0][key] for key in SETTING})
        served = {row["seed"]: row["accuracy_after"] for row in runs}
        sampled = study.values(cell, "accuracy_last")
        lag = f"{np.mean([row['staleness_mean'] for row in runs]):.1f}"
        body.append(
            [cell.loss, str(cell.staleness), lag, show(served), show(sampled), apart(served, sampled)]
        )
    if body:
        yield "### With the full service"
        yield table(["loss", "bound", "staleness", "service", "sampler", "difference"], body)


_SECTIONS = (
    _tuning,
    _accuracy("accuracy_final", "Final accuracy"),
    _accuracy("accuracy_best", "Best accuracy"),
    _against_grpo,
    _described,
    _slice("Ratio to the proximal policy", reference="proximal"),
    _slice("No dual clip", dual_clip=False),
    _slice("One update a batch", updates=1),
    _slice("Twelve updates a batch", updates=12),
    _confirmed,
)


def figures(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each setting with its seeds' number, and each figure's mean and the half-width of its interval."""
    names = ["accuracy_final", "accuracy_best", *(name for name, _ in FIGURES.values())]
    return [
        {name: of[0][name] for name in SETTING if name != "seed"}
        | {"seeds": len(of)}
        | {name: interval([float(row[name]) for row in of]) for name in names}
        for of in _by_setting(Study(rows).rows)
    ]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write results in the order of their settings, numbers to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in sorted(rows, key=lambda row: [str(row[name]) for name in SETTING]):
            writer.writerow({name: _text(value) for name, value in row.items()})


def read_csv(path: Path) -> list[Row]:
    """Read what `write_csv` has written; raises ConfigError."""
    try:
        with path.open(newline="") as file:
            return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no results of a study ({error}); name another --data") from None


def read_confirmed(data: Path) -> list[Row]:
    """The service's results beside a study's data; none where there are none."""
    path = data.with_name(CONFIRMED)
    return read_csv(path) if path.exists() else []


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:.4g}" for number in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    if name == "accuracies":
        return [float(number) for number in text.split()]
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.isdigit() else float(text)
