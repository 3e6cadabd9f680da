"""`aspo status`: the learner's status as a table, once or live."""

from __future__ import annotations

import itertools
import re
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aspo.schemas import PolicyVersion
from aspo.text import printable
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
        console.print_json(data=status, ensure_ascii=True)  # strangers wrote some of it
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
    trouble = [Text(status["trouble"], style="red")] if status["trouble"] else []
    actors = actor_table(status["actors"], status.get("without_actors_seconds"), status["version"])
    return Group(run_table(status), *trouble, actors)


def run_table(status: Status) -> Table:
    """What the learner is doing, as pairs of name and value."""
    metrics = status["metrics"]
    mean, worst = _number(metrics.get("staleness_mean"), 1), _number(metrics.get("staleness_max"), 0)
    tasks, groups = _number(metrics.get("queue_tasks"), 0), _number(metrics.get("queue_rollouts"), 0)
    title = f"run {status['run']}: {status['phase']}"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    cells = {
        "step": f"{status['step']}/{status['steps']}",
        "version": status["version"] or "-",
        "live": _live(status),
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


def actor_table(actors: list[Status], absent_s: float | None, newest: str | None) -> Table | Text:
    """The actors alive, a row each, and how many versions each is behind the newest one."""
    if not actors and absent_s is None:
        return Text("the learner cannot ask Redis which actors are alive", style="yellow")
    if not actors:
        lasting = f"no actor has been alive for {absent_s:,.0f} s"
        return Text(f"{lasting}; start one with: aspo actor --config FILE", style="yellow")
    # Where it is narrow the names take several lines, and the numbers one.
    alive = f"{len(actors)} actor{'s' if len(actors) > 1 else ''} alive"
    table = Table(
        title=alive,
        title_justify="left",
        title_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for name in ("actor", "state"):
        table.add_column(name, overflow="fold", min_width=len("sampling"))
    for name in ("version", "lag", "tokens/s", "groups", "flying", "pause", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for actor in actors:
        table.add_row(
            Text(printable(actor["id"])),
            Text(printable(_short(actor["state"]))),
            Text(printable(_short(actor["version"])) or "-"),
            _lag(actor["version"], newest),
            f"{actor['tokens_per_second']:,.0f}",
            f"{actor['groups']:,}",
            str(actor["groups_in_flight"]),
            f"{actor['weight_pause_seconds'] * 1000:.0f} ms",
            str(actor["reward_failures"]),
        )
    return table


def _live(status: Status) -> str:
    """What actors are to run, and what keeps or may soon replace it."""
    live = _short(status["live"] or "-")
    if status["held"]:
        return f"{live} (held)"
    return f"{live} (trying {_short(status['trial']['version'])})" if status["trial"] else live


def _lag(version: str, newest: str | None) -> str:
    """Steps from an actor's version to the newest; - where one is unknown or of another epoch."""
    try:
        there, here = PolicyVersion.parse(newest or ""), PolicyVersion.parse(version)
    except ValueError:
        return "-"
    return str(there.step - here.step) if there.epoch == here.epoch else "-"


def _short(text: str) -> str:
    """Versions in a text without their run's name."""
    return re.sub(r"\S+/(\d+/\d+)", r"\1", text)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
