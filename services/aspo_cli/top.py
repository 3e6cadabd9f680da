"""`aspo top`: a learner and its actors, live, with where the time goes and how the reward runs.

watch("http://127.0.0.1:8000", None, every_s=1.0, count=None, as_json=False)
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aspo_cli.ask import LearnerUnreachable
from aspo_cli.status import PIPE_WIDTH, Status, actor_table, fetch_status, run_table

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # columns of a line and of the bar
_CURVES = {"reward": 3, "tokens/s": 0, "entropy": 3}  # digits of the last value
_PHASES = {"wait": "yellow", "train": "green", "publish": "cyan", "checkpoint": "magenta"}


class Series:
    """What has been seen of a run, a value a step; a learner that goes back takes its steps with it."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, float]] = {name: {} for name in _CURVES}

    def add(self, status: Status) -> None:
        """Take in one status."""
        metrics, step = status["metrics"], int(status["step"])
        rate = sum(actor["tokens_per_second"] for actor in status["actors"])
        values = {"reward": metrics.get("reward"), "entropy": metrics.get("entropy"), "tokens/s": rate}
        for name, value in values.items():
            kept = {at: old for at, old in self._seen[name].items() if at <= step}
            self._seen[name] = kept | ({step: value} if value is not None else {})

    def __getitem__(self, name: str) -> list[float]:
        return list(self._seen[name].values())


def watch(url: str, token: str | None, *, every_s: float, count: int | None, as_json: bool) -> None:
    """Show the status every so often, `count` times or until Ctrl-C; as JSON, a line each."""
    statuses = looks(url, token, every_s=every_s, count=count)
    if as_json:
        for status, trouble in statuses:
            typer.echo(json.dumps({"trouble": str(trouble)} if trouble else status))
        return
    series = Series()
    on_terminal = sys.stdout.isatty()
    console = Console(width=None if on_terminal else PIPE_WIDTH)
    with Live(console=console, auto_refresh=False, screen=on_terminal) as live:
        for status, trouble in statuses:
            if trouble is None:
                series.add(status)
            live.update(view(status, series, trouble), refresh=True)


def looks(
    url: str, token: str | None, *, every_s: float, count: int | None
) -> Iterator[tuple[Status, LearnerUnreachable | None]]:
    """The status again and again; the last one that was heard with the trouble while none is."""
    status = fetch_status(url, token)
    yield status, None
    rounds = itertools.count(1) if count is None else range(1, count)
    for _ in rounds:
        time.sleep(every_s)
        try:
            status = fetch_status(url, token)
        except LearnerUnreachable as error:
            yield status, error
            continue
        yield status, None


def view(status: Status, series: Series, trouble: Exception | None = None) -> Group:
    """The screen: run, time, curves, actors."""
    said = [str(text) for text in (trouble, status["trouble"]) if text]
    return Group(
        run_table(status),
        *(Text(text, style="red") for text in said),
        _times(status["metrics"]),
        _curves(series),
        actor_table(status["actors"], status.get("without_actors_seconds"), status["version"]),
    )


def _times(metrics: dict[str, float]) -> Text:
    """Where the last step's time went, as a bar and in seconds."""
    seconds = {phase: metrics.get(f"{phase}_seconds", 0.0) for phase in _PHASES}
    total = sum(seconds.values())
    if not total:
        return Text("no step yet", style="dim")
    text = Text("last step  ", style="dim")
    for phase, share in seconds.items():
        text.append("█" * round(_WIDTH * share / total), style=_PHASES[phase])
    text.append("\n           ")
    for phase, share in seconds.items():
        text.append(f"{phase} {share:.2f} s  ", style=_PHASES[phase])
    return text


def _curves(series: Series) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, digits in _CURVES.items():
        values = series[name]
        last = f"{values[-1]:,.{digits}f}" if values else "-"
        table.add_row(Text(name, style="dim"), sparkline(values, _WIDTH - 12), last)
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between the least and the greatest of them."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)
