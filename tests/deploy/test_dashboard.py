"""The Grafana dashboard asks for what the services export, and for all that the design promises."""

from __future__ import annotations

import copy
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import manifests
from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboard.json"
PROMISED = {
    "Training": {"reward", "accuracy", "entropy", "kl_reference", "clip_fraction_pos", "clip_fraction_neg"}
    | {"dual_clip_fraction_pos", "dual_clip_fraction_neg", "ratio_mean_pos", "ratio_mean_neg"},
    "Asynchrony": {"staleness_mean", "staleness_max", "queue_tasks", "queue_rollouts", "wait_seconds"},
    "Weights": {"weights_bytes", "weight_patches", "weight_syncs", "weight_step", "weight_pause_seconds"},
    "System": {"process_resident_memory_bytes", "process_cpu_seconds_total", "groups", "reward_failures"},
}
Dashboard = dict[str, Any]


def load() -> Dashboard:
    found: Dashboard = json.loads(DASHBOARD.read_text())
    return found


def check(dashboard: Dashboard) -> Iterator[str]:
    """What is wrong with a dashboard."""
    panels = dashboard["panels"]
    if len({panel["id"] for panel in panels}) != len(panels):
        yield "two panels share an id"
    cells = [cell for panel in panels for cell in _cells(panel["gridPos"])]
    if len(set(cells)) != len(cells) or any(x >= 24 for x, _ in cells):
        yield "panels overlap, or leave the grid"
    for panel in panels:
        for target in panel.get("targets", []):
            for name in manifests.unknown_metrics(target["expr"]):
                yield f"{panel['title']} asks for {name}, which no service exports"
            if target["datasource"]["uid"] != "${datasource}":
                yield f"{panel['title']} asks another Prometheus than the chosen one"
            if any(target["expr"].count(a) != target["expr"].count(b) for a, b in ("()", "{}", "[]")):
                yield f"{panel['title']} has a query with open brackets"
    for row, names in PROMISED.items():
        shown = " ".join(_queries(panels, row))
        for name in names:
            if not any(f"{prefix}{name}{{" in shown for prefix in ("", "aspo_learner_", "aspo_actor_")):
                yield f"{row} does not show {name}"


def _cells(at: dict[str, int]) -> list[tuple[int, int]]:
    return [(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])]


def _queries(panels: list[Dashboard], row: str) -> Iterator[str]:
    title = ""
    for panel in panels:
        if panel["type"] == "row":
            title = panel["title"]
        elif title == row:
            yield from (target["expr"] for target in panel["targets"])


def test_the_dashboard_is_sound() -> None:
    assert list(check(load())) == []


def panel(dashboard: Dashboard, number: int) -> Dashboard:
    found: Dashboard = [each for each in dashboard["panels"] if each["type"] != "row"][number]
    return found


MUTANTS: dict[str, Callable[[Dashboard], Any]] = {
    "a metric of another name": lambda d: panel(d, 0)["targets"][0].update(expr="aspo_learner_rewards"),
    "a metric of another project": lambda d: panel(d, 0)["targets"][0].update(expr="vllm_requests"),
    "an open bracket": lambda d: panel(d, 0)["targets"][0].update(expr="sum(aspo_learner_reward"),
    "a fixed Prometheus": lambda d: panel(d, 1)["targets"][0]["datasource"].update(uid="prom"),
    "panels on each other": lambda d: panel(d, 1).update(gridPos=panel(d, 0)["gridPos"]),
    "an id twice": lambda d: panel(d, 1).update(id=panel(d, 0)["id"]),
    "no entropy": lambda d: panel(d, 1).update(targets=[]),
    "a row without a name": lambda d: d["panels"][0].update(title="Learning"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_catches_its_mutant(mutant: str) -> None:
    dashboard = copy.deepcopy(load())
    MUTANTS[mutant](dashboard)
    assert list(check(dashboard))


@pytest.mark.parametrize(("service", "table"), [("learner", LEARNER_METRICS), ("actor", ACTOR_METRICS)])
def test_what_counts_as_exported_is_what_a_service_shows(service: str, table: dict[str, str]) -> None:
    auth, gauges = AuthConfig(), Gauges(service, table)
    app = create_app(service, auth=auth, ready=lambda: None, registry=gauges.registry)
    with (
        Server(app, listen("127.0.0.1", 0, auth)) as server,
        urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer,
    ):
        lines = answer.read().decode().splitlines()
    shown = {line.split(" ")[0].split("{")[0] for line in lines if line and not line.startswith("#")}
    other = "actor" if service == "learner" else "learner"
    assert shown == {name for name in manifests.exported() if not name.startswith(f"aspo_{other}_")}
