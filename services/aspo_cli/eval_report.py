"""What an evaluation leaves behind: results.json, answers.jsonl, results.png, and a table on the terminal."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from aspo.config import ConfigError, EvalSet
from aspo_learner.estimates import Estimate, describe

INTERVAL = "95 %, Wilson's for the effective number of prompts"


@dataclass(frozen=True, slots=True)
class SetResult:
    """A set's figures, and what they were computed from, a dict for each prompt."""

    name: str
    k: int
    temperature: float
    figures: dict[str, Estimate]
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, chosen: EvalSet, rows: list[dict[str, Any]], right_above: float) -> SetResult:
        """Compute the figures."""
        rewards = np.array([row["rewards"] for row in rows])
        figures = describe(rewards, [row["answers"] for row in rows], right_above=right_above)
        return cls(chosen.label, chosen.k, chosen.temperature, figures, rows)

    @property
    def summary(self) -> dict[str, Any]:
        """For results.json."""
        tokens = np.array([row["tokens"] for row in self.rows])
        return {
            "prompts": len(self.rows),
            "k": self.k,
            "temperature": self.temperature,
            "tokens_mean": float(tokens.mean()),
            "reward_failed_fraction": float(np.mean([row["failed"] for row in self.rows])),
            "figures": {name: dataclasses.asdict(figure) for name, figure in self.figures.items()},
        }


@dataclass(frozen=True, slots=True)
class Report:
    """One evaluation; `versions` are all that gave answers."""

    run: str
    versions: list[str]
    how: str
    sets: list[SetResult]
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """For results.json."""
        sets = {found.name: found.summary for found in self.sets}
        said = {"run": self.run, "versions": self.versions, "sampled_by": self.how, "interval": INTERVAL}
        return said | {"seconds": self.seconds, "sets": sets}


def require_writable(folder: Path) -> None:
    """Raise ConfigError now for a folder that would take no report in the end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write to {folder} ({error.strerror}); name another with --out")


def write_report(report: Report, folder: Path, *, as_json: bool) -> None:
    """Write the files and print the table, or the JSON; raises ConfigError where nothing can be written."""
    text = json.dumps(report.summary, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(f"{text}\n")
        with (folder / "answers.jsonl").open("w") as file:
            for found in report.sets:
                file.writelines(f"{json.dumps({'set': found.name} | row)}\n" for row in found.rows)
        plot(report, folder / "results.png")
    except OSError as error:
        raise _unwritable(folder, error) from None
    if as_json:
        typer.echo(json.dumps(report.summary))
        return
    console = Console()
    (console if console.is_terminal else Console(width=100)).print(table_of(report))
    typer.echo(f"results.json, answers.jsonl and results.png are in {folder}")


def table_of(report: Report) -> Table:
    """The figures of every set."""
    several = f"{report.versions[0]} to {report.versions[-1]}"
    title = report.versions[0] if len(report.versions) == 1 else several
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    table.add_column("set", overflow="fold")
    for name in ("prompts", "figure", "value", "95 % interval"):
        table.add_column(name, no_wrap=True, justify="left" if name == "figure" else "right")
    for found in report.sets:
        for number, (name, figure) in enumerate(found.figures.items()):
            first = (found.name, f"{len(found.rows):,}") if number == 0 else ("", "")
            table.add_row(*first, name, f"{figure.value:.3f}", f"{figure.low:.3f} .. {figure.high:.3f}")
    return table


def plot(report: Report, path: Path) -> None:
    """Draw avg@k and majority@k of every set and, where there are several answers, pass@k by k."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = any(found.k > 1 for found in report.sets)
    rows = sum(1 + (found.k > 1) for found in report.sets)
    figure = Figure(figsize=(10 if several else 6, max(2.6, 1.4 + 0.45 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    _plot_figures(panels[0], report.sets)
    if several:
        _plot_pass(panels[1], report.sets)
    figure.suptitle(" to ".join(dict.fromkeys((report.versions[0], report.versions[-1]))), fontsize=11)
    figure.savefig(path, dpi=120)


def _plot_figures(axes: Any, sets: Sequence[SetResult]) -> None:
    labels: list[str] = []
    for number, found in enumerate(sets):
        for name, one in found.figures.items():
            if name.startswith("pass@"):
                continue
            _whisker(axes, one, -len(labels), f"C{number}", "o" if name.startswith("avg") else "s")
            labels.append(f"{found.name}\n{name}")
    axes.set_yticks([-place for place in range(len(labels))], labels, fontsize=9)
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    ends = [end for found in sets for one in found.figures.values() for end in (one.low, one.high)]
    axes.set_xlim(min(0.0, *ends) - 0.02, max(1.0, *ends) + 0.02)
    axes.set_title("mean reward and vote, 95 % intervals", loc="left", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


def _whisker(axes: Any, one: Estimate, height: float, color: str, marker: str) -> None:
    sides = [[one.value - one.low], [one.high - one.value]]
    axes.errorbar([one.value], [height], xerr=sides, fmt=marker, color=color, capsize=3)
    axes.annotate(f"{one.value:.3f}", (one.value, height), (0, 6), textcoords="offset points", fontsize=8)


def _plot_pass(axes: Any, sets: Sequence[SetResult]) -> None:
    ticks: set[int] = set()
    for number, found in enumerate(sets):
        curve = {int(name[5:]): one for name, one in found.figures.items() if name.startswith("pass@")}
        ticks |= curve.keys()
        values = np.array([one.value for one in curve.values()])
        low, high = (np.array([getattr(one, end) for one in curve.values()]) for end in ("low", "high"))
        axes.plot(list(curve), values, marker="o", color=f"C{number}", label=found.name, linewidth=1.4)
        axes.fill_between(list(curve), low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.set_xlabel("k")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("pass@k", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
