"""`aspo status`: the learner's status as a table, once or live."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aspo_cli.ask import LearnerUnreachable, ask

REFRESH_S = 1.0
_TIMEOUT_S = 5.0
PIPE_WIDTH = 120  # columns of the table where there is no terminal to ask
Status = dict[str, Any]


def fetch_status(url: str, token: str | None = None) -> Status:
    """GET /v1/status; raises LearnerUnreachable, or ConfigError for a refused token."""
    expected = {"run", "metrics", "actors"}
    return ask(url, "/v1/status", token, expect=expected, timeout_s=_TIMEOUT_S)


def show_status(url: str, token: str | None, *, watch: bool, as_json: bool) -> None:
    """Print the status; with `watch`, refresh it until Ctrl-C."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    status = fetch_status(url, token)
    if as_json:
        console.print_json(data=status)
        return
    if not watch:
        console.print(render(status))
        return
    with Live(render(status), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(REFRESH_S)
                try:
                    live.update(render(fetch_status(url, token)), refresh=True)
                except LearnerUnreachable as error:
                    live.update(Group(render(status), Text(str(error), style="red")), refresh=True)
        except KeyboardInterrupt:
            return


def render(status: Status) -> Group:
    """The status as a table of the run and one of its actors."""
    return Group(_run_table(status), _actor_table(status["actors"]))


def _run_table(status: Status) -> Table:
    metrics = status["metrics"]
    mean, worst = _number(metrics.get("staleness_mean"), 1), _number(metrics.get("staleness_max"), 0)
    tasks, groups = _number(metrics.get("queue_tasks"), 0), _number(metrics.get("queue_rollouts"), 0)
    title = f"run {status['run']}: {status['phase']}"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    cells = {
        "step": f"{status['step']}/{status['steps']}",
        "version": status["version"] or "-",
        "reward": _number(metrics.get("reward"), 3),
        "accuracy": f"{_number(status['accuracy_before'], 3)} → {_number(status['accuracy'], 3)}",
        "entropy": _number(metrics.get("entropy"), 3),
        "staleness": f"{mean} (max {worst})",
        "ratio": f"{_number(metrics.get('ratio_p01'), 2)}..{_number(metrics.get('ratio_p99'), 2)}",
        "queue": f"{tasks} tasks, {groups} groups",
        "learner idle": f"{status['idle_fraction']:.0%}",
    }
    rows = list(cells.items())
    half = (len(rows) + 1) // 2
    for left, right in itertools.zip_longest(rows[:half], rows[half:], fillvalue=("", "")):
        table.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), right[1])
    return table


def _actor_table(actors: list[Status]) -> Table | Text:
    if not actors:
        return Text("no actor is alive; start one with: aspo actor --config FILE", style="yellow")
    table = Table()
    for name in ("actor", "state", "version", "tokens/s", "groups", "flying", "syncs", "pause", "failed"):
        text = name in ("actor", "state", "version")
        table.add_column(name, justify="left" if text else "right", no_wrap=True, overflow="ellipsis")
    for actor in actors:
        table.add_row(
            Text(actor["id"]),
            Text(actor["state"]),
            actor["version"] or "-",
            f"{actor['tokens_per_second']:,.0f}",
            f"{actor['groups']:,}",
            str(actor["groups_in_flight"]),
            str(actor["weight_syncs"]),
            f"{actor['weight_pause_seconds'] * 1000:.0f}",
            str(actor["reward_failures"]),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
