"""The study's plots: small PNGs of what docs/study.md tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aspo_study.cells import LOSSES, Cell, Row
from aspo_study.summary import Study, interval
from aspo_study.trial import EVALUATE_EVERY

_PANELS = {
    "entropy_end": "Entropy at the end (nats a token)",
    "kl_start": "KL to the warm start (nats a token)",
    "weight_mean_pos": "Mean weight of tokens with A > 0",
    "norm_peak": "Largest gradient norm over the median",
}


def plot_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw every plot into a folder."""
    study = Study(rows)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = study.tasks
    accuracy = _figure(1, len(tasks))
    for axes, task in zip(accuracy.axes, tasks, strict=True):
        _by_staleness(axes, study, task, "accuracy_final", f"Final accuracy, {task}")
    curves = _figure(len(tasks), 2)
    for row, task in enumerate(tasks):
        levels = study.levels(task=task) or [0]
        for axes, staleness in zip(curves.axes[2 * row : 2 * row + 2], (levels[0], levels[-1]), strict=True):
            _by_step(axes, study, Cell(task=task, staleness=staleness))
    figures = _figure(2, len(_PANELS) // 2)
    for axes, (name, title) in zip(figures.axes, _PANELS.items(), strict=True):
        _by_staleness(axes, study, tasks[0], name, title)
    drawn = {"accuracy.png": accuracy, "curves.png": curves, "figures.png": figures}
    for name, drawing in drawn.items():
        _legend(drawing)
        drawing.savefig(folder / name, dpi=80)
    return [folder / name for name in drawn]


def _figure(rows: int, columns: int) -> Figure:
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(rows, columns)
    return figure


def _by_staleness(axes: Any, study: Study, task: str, figure: str, title: str) -> None:
    """Mean and 95 % interval by staleness, a little apart so that intervals can be told from each other."""
    levels = study.levels(task=task, updates=4, reference="behavior", dual_clip=True)
    for number, loss in enumerate(LOSSES):
        found = [study.values(Cell(task=task, loss=loss, staleness=k), figure) for k in levels]
        points = [(i, list(values.values())) for i, values in enumerate(found) if values]
        if points:
            means = np.array([interval(values) for _, values in points])
            places = [i + 0.06 * (number - 3) for i, _ in points]
            axes.errorbar(places, means[:, 0], means[:, 1], label=loss, color=f"C{number}", lw=1.2, capsize=2)
    axes.set_xticks(range(len(levels)), [str(k) for k in levels])
    _label(axes, title, "staleness (versions)")


def _by_step(axes: Any, study: Study, cell: Cell) -> None:
    """Accuracy by step, the mean over seeds."""
    for number, loss in enumerate(LOSSES):
        curves = study.curves(replace(cell, loss=loss))
        if curves:
            mean = _mean_curve(curves)
            axes.plot(EVALUATE_EVERY * np.arange(len(mean)), mean, label=loss, color=f"C{number}", lw=1.4)
    _label(axes, f"Accuracy, {cell.task}, staleness {cell.staleness}", "step")


def _mean_curve(curves: Sequence[Sequence[float]]) -> Any:
    shortest = min(map(len, curves))  # a run that diverged has ended before its time
    return np.mean([curve[:shortest] for curve in curves], axis=0)


def _label(axes: Any, title: str, along: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(along, fontsize=9)
    axes.grid(alpha=0.3)


def _legend(figure: Figure) -> None:
    handles = {
        label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        names = list(handles)
        figure.legend(
            handles.values(), names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9
        )
