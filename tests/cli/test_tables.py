"""What `aspo status` and `aspo weights ls` show, on a terminal of 80 columns; and `aspo --version`."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from aspo.presence import ActorStatus
from aspo.weights.server import VersionInfo, Versions
from aspo_cli.status import render
from aspo_cli.weights import versions_table
from aspo_learner.app import LearnerStatus, TrialStatus
from services import Service

WIDTH = 80


def shown(what: RenderableType) -> str:
    """What a terminal shows of it, nothing of it cut off."""
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(what)
    text = capture.get()
    assert "…" not in text, text
    assert max(map(len, text.splitlines())) <= WIDTH
    return text


def actor(name: str, **fields: object) -> ActorStatus:
    busy = {"state": "sampling", "version": "demo/1/1137", "groups": 1234567, "groups_in_flight": 128}
    rates = {"tokens_per_second": 23456.7, "weight_pause_seconds": 0.0123, "reward_failures": 4321}
    return ActorStatus.model_validate({"id": name, "run": "demo", "url": "", **busy, **rates, **fields})


def status(**fields: object) -> LearnerStatus:
    actors = [actor("gpu-node-pool-a-17-3821"), actor("new", state="loading demo/1/1138", version="")]
    base = {"run": "demo", "phase": "training", "step": 1138, "steps": 20000, "accuracy": 0.913}
    released = {"version": "demo/1/1138", "live": "demo/1/1137"}
    return LearnerStatus.model_validate({**base, **released, "actors": actors, **fields})


@pytest.mark.parametrize(
    ("fields", "live"),
    [
        ({}, "1/1137"),
        ({"held": True}, "1/1137 (held)"),
        ({"trial": TrialStatus(version="demo/1/1138", canary="a")}, "1/1137 (trying 1/1138)"),
    ],
)
def test_the_status_fits_80_columns(fields: dict[str, object], live: str) -> None:
    text = shown(render(status(**fields).model_dump()))
    cells = [cell.strip() for cell in text.replace("│", "  ").split("  ") if cell.strip()]
    for cell in ("1138/20000", "demo/1/1138", live, "23,457", "1,234,567", "128", "12 ms", "4321"):
        assert cell in cells, text
    assert "sampling" in text


def test_the_status_says_how_many_actors_are_alive_and_what_to_do_without() -> None:
    assert "2 actors alive" in shown(render(status().model_dump()))
    assert "1 actor alive" in shown(render(status(actors=[actor("a")]).model_dump()))
    alone = shown(render(status(actors=[], without_actors_seconds=1234.5).model_dump()))
    assert "no actor has been alive for 1,234 s; start one with: aspo actor --config FILE" in alone
    assert "cannot ask Redis" in shown(render(status(actors=[]).model_dump()))


def test_the_versions_fit_80_columns() -> None:
    ways = {"demo/1/1136": 123_456, "demo/1/1129": 987_654, "snapshot": 123_456_789}
    found = [
        VersionInfo(
            version=f"demo/1/{step}",
            live=step == 1136,
            changed_fraction=0.0123,
            state_digest="",
            transfers=ways,
            running=[f"gpu-node-pool-a-{i}-3821" for i in range(count)],
        )
        for step, count in ((1136, 400), (1137, 1))
    ]
    text = shown(versions_table(Versions(live="demo/1/1136", held=False, versions=found).model_dump()))
    for cell in ("demo/1/1136  live    1.23%", "demo/1/1137", "from 1136: 123 kB", "400 clients"):
        assert cell in text, text
    assert "-0-3821" in text


def test_the_version_of_the_program_is_shown(tmp_path: Path) -> None:
    command = Service(tmp_path, "--version")
    assert command.wait(60) == 0
    assert command.text == f"aspo {importlib.metadata.version('aspo')}\n"
