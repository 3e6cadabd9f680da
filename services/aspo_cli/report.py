"""`aspo report`: what one run or several came to, as one HTML file that loads nothing, and as PNG files.

run_report(["demo", "demo.1"], Path("runs"), output=None, as_json=False)
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import typer

from aspo.config import ConfigError
from aspo.text import printable
from aspo_learner.curves import FIGURES, draw

TITLES = {"learning": "Learning", "optimisation": "Optimisation", "asynchrony": "Asynchrony"}
_EVENTS = 40  # of the last that are shown
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder holds; `settings` and `summary` are empty where it has none yet."""

    name: str
    folder: Path
    steps: list[dict[str, float]]
    settings: dict[str, Any]
    summary: dict[str, Any]
    events: list[dict[str, Any]]


def run_report(names: list[str], runs: Path, *, output: Path | None, as_json: bool) -> None:
    """Write the report of some runs, by their names or folders, and say where it is."""
    read = [read_run(name, runs) for name in names]
    if len({run.name for run in read}) < len(read):
        raise ConfigError("two of the runs have the same name; a report names each run once")
    folder = output or read[0].folder / "report"
    page = write_report(read, folder)
    facts = {run.name: _facts(run) for run in read}
    typer.echo(json.dumps({"report": str(page), "runs": facts}) if as_json else page)


def write_report(runs: list[Run], folder: Path) -> Path:
    """Write index.html and the figures in `folder`; gives the path of the page."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = {}
        for name, panels in FIGURES.items():
            path = folder / f"{name}.png"
            draw({run.name: run.steps for run in runs}, panels, path)
            figures[TITLES[name]] = (base64.b64encode(path.read_bytes()).decode(), ", ".join(panels))
        page = folder / "index.html"
        page.write_text(_render(runs, figures))
    except OSError as error:
        raise ConfigError(f"cannot write {folder} ({error.strerror}); name another by --output") from None
    return page


def _render(runs: list[Run], figures: dict[str, tuple[str, str]]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    facts = [_facts(run) for run in runs]
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=", ".join(run.name for run in runs),
        names=[run.name for run in runs],
        facts={label: [one[label] for one in facts] for label in facts[0]},
        settings=_differences(runs),
        several=len(runs) > 1,
        figures=figures,
        events={run.name: [_event(event) for event in run.events[-_EVENTS:]] for run in runs if run.events},
    )


def _event(event: dict[str, Any]) -> dict[str, str]:
    return {name: printable(str(event.get(name, "")), 4000) for name in ("level", "source", "message")}


def read_run(name: str, runs: Path) -> Run:
    """Read a run by its name or folder; raises ConfigError if there is none or it has done no step."""
    folder = next((f for f in (runs / name, Path(name)) if (f / "metrics.jsonl").is_file()), None)
    if folder is None:
        there = sorted(path.parent.name for path in runs.glob("*/metrics.jsonl"))
        known = f"in {runs} there are: {', '.join(there)}" if there else f"there is none in {runs}"
        raise ConfigError(f"no run {name!r} with a metrics.jsonl; {known}; --runs names another folder")
    steps = [line for line in _lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int | float)]
    if not steps:
        raise ConfigError(f"run {name!r} has not done a step yet; ask again later")
    settings, summary = _object(folder / "config.json"), _object(folder / "summary.json")
    events = _lines(folder / "events.jsonl")
    return Run(printable(folder.resolve().name), folder, steps, settings, summary, events)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that may still be written to: its last line may be half a one."""
    read = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        read += [value] if isinstance(value, dict) else []
    return read


def _object(path: Path) -> dict[str, Any]:
    """The object of a file, empty where there is none."""
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise ConfigError(f"{path} is no JSON; move it away") from None
    return value if isinstance(value, dict) else {}


def _facts(run: Run) -> dict[str, str]:
    """A run in a few figures, by their labels; the same labels for every run."""
    steps, last = run.steps, run.steps[-1]
    tail = steps[-max(1, len(steps) // 10) :]
    accuracies = [m["accuracy"] for m in steps if "accuracy" in m]
    before, after = run.summary.get("accuracy_before"), run.summary.get("accuracy_after")
    if after is None and accuracies:
        after = accuracies[-1]
    # Those before and after training are of no step.
    accuracies += [value for value in (before, after) if value is not None]
    trained = sum(m.get("train_seconds", 0.0) for m in steps)
    return {
        "steps": f"{last['step']:,.0f}",
        "hours": f"{last.get('seconds', 0.0) / 3600:.2f}",
        "completion tokens": f"{sum(m.get('tokens', 0.0) for m in steps):,.0f}",
        "reward, mean of the last tenth": _mean(tail, "reward"),
        "held-out accuracy before": _number(before),
        "held-out accuracy after": _number(after),
        "best held-out accuracy": _number(max(accuracies, default=None)),
        "entropy, last tenth": _mean(tail, "entropy"),
        "staleness, mean": _mean(steps, "staleness_mean"),
        "learner tokens/s while training": _number(_rate(steps, trained), 0),
        "time spent waiting": _share(sum(m.get("wait_seconds", 0.0) for m in steps), trained),
        "groups set aside": f"{last.get('ended_quarantined', 0.0):,.0f}",
        "state": "done" if run.summary else "not finished",
    }


def _rate(steps: list[dict[str, float]], seconds: float) -> float | None:
    return sum(m.get("tokens", 0.0) for m in steps) / seconds if seconds else None


def _share(waited: float, trained: float) -> str:
    return f"{waited / (waited + trained):.0%}" if waited + trained else "-"


def _mean(steps: list[dict[str, float]], name: str) -> str:
    values = [m[name] for m in steps if name in m]
    return _number(sum(values) / len(values) if values else None)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _differences(runs: list[Run]) -> dict[str, list[str]]:
    """Of one run the settings that are not at their default, of several those in which they differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    shown = {}
    for name in names:
        found = [run.settings.get(name, {}) for run in runs]
        values = [json.dumps(one.get("value"), ensure_ascii=False) if one else "-" for one in found]
        differs = len(set(values)) > 1 if len(runs) > 1 else found[0].get("source") != "default"
        if differs:
            shown[name] = [printable(value) for value in values]
    return shown
