"""Curves of one run or several, as PNG files.

draw({"mine": steps}, LEARNING, Path("learning.png"))        # steps as in metrics.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Steps = Sequence[Mapping[str, float]]
# A panel's title, and the metrics in it with what the legend says.
Panels = Mapping[str, Mapping[str, str]]

SUMMARY: Panels = {
    "Reward": {"reward": "sampled, T = 1", "accuracy": "held-out"},
    "Entropy (nats per token)": {"entropy": "policy"},
    "Staleness (versions)": {"staleness_mean": "mean", "staleness_max": "max"},
    "Importance ratio r": {"ratio_p01": "1 %", "ratio_mean": "mean", "ratio_p99": "99 %"},
}
LEARNING: Panels = {
    "Reward": {"reward": "sampled, T = 1"},
    "Held-out accuracy": {"accuracy": "avg@k"},
    "Entropy (nats per token)": {"entropy": "policy"},
    "Response length (tokens)": {"response_length": "mean"},
}
OPTIMISATION: Panels = {
    "Importance ratio r": {"ratio_p01": "1 %", "ratio_mean": "mean", "ratio_p99": "99 %"},
    "Hard-clipped share of tokens": {"clip_fraction_pos": "A > 0", "clip_fraction_neg": "A < 0"},
    "Mismatch k3, sampler to learner (nats per token)": {"mismatch_k3": "k3"},
    "Gradient norm before clipping": {"grad_norm": "mean", "grad_norm_max": "largest"},
}
ASYNCHRONY: Panels = {
    "Staleness (versions)": {"staleness_mean": "mean", "staleness_max": "max"},
    "Queue": {"queue_tasks": "tasks", "queue_rollouts": "groups"},
    "Seconds a step": {"wait_seconds": "waiting", "train_seconds": "training"},
    "Weights published (MB a version)": {"weights_megabytes": "cheapest way"},
}
FIGURES = {"learning": LEARNING, "optimisation": OPTIMISATION, "asynchrony": ASYNCHRONY}

_STYLES = ("-", "--", ":")
_SMOOTHED_FROM = 100  # steps of the longest run; then a mean over a twentieth of them lies on the values


def draw(runs: Mapping[str, Steps], panels: Panels, path: Path) -> None:
    """Draw panels, two in a row; of one run each metric has a colour, of several each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, several = -(-len(panels) // 2), len(runs) > 1
    figure = Figure(figsize=(10, 3.25 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(map(len, runs.values()))
    width = longest // 20 if longest > _SMOOTHED_FROM else 1
    for axes, (title, curves) in zip(figure.subplots(rows, 2).flat, panels.items(), strict=True):
        for number, steps in enumerate(runs.values()):
            for index, metric in enumerate(curves):
                color, style = (number, _STYLES[index % 3]) if several else (index, "-")
                _curve(axes, steps, metric, width, color=f"C{color}", linestyle=style)
        looks = [("gray", _STYLES[i % 3]) if several else (f"C{i}", "-") for i in range(len(curves))]
        marks = [Line2D([], [], color=color, linestyle=style) for color, style in looks]
        _finish(axes, title, marks, list(curves.values()))
    if several:
        marks = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
        figure.legend(marks, list(map(_literal, runs)), loc="outside upper left", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _finish(axes: Any, title: str, marks: Sequence[Any], labels: Sequence[str]) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(marks, labels, framealpha=0.7, edgecolor="none", fontsize=9)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)


def _curve(axes: Any, steps: Steps, metric: str, width: int, **style: Any) -> None:
    """One metric of a run, as a running mean over `width` steps on its faint values."""
    points = [(m["step"], value) for m in steps if (value := _value(m, metric)) is not None]
    if not points:
        return
    x, y = np.array(points, dtype=np.float64).T
    if metric == "accuracy":
        style["drawstyle"] = "steps-post"
    elif 1 < width < len(x):
        axes.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.8)
        x, y = x[width - 1 :], np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x, y, linewidth=1.4, **style)


def _value(metrics: Mapping[str, float], name: str) -> float | None:
    if name == "weights_megabytes":
        size = metrics.get("weights_bytes")
        return None if size is None else size / 1e6
    return metrics.get(name)


def _literal(text: str) -> str:
    """Keep a run's name from being read as mathematics."""
    return text.replace("$", r"\$")
