"""Rows 1 and 5 with real vLLM: kill -9 of actors and learner; it goes on, and every step is trained once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from aspo_cli.status import fetch_status
from project import learner_url, make_project, metrics_of, step_of
from services import Service, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
STEPS = 200
SETTINGS = ("--set", f"learner.steps={STEPS}", "--set", "redis.task_lease_s=5", "--set", "eval.every=1000")


def test_a_run_survives_kill_9_of_actors_and_learner(tmp_path: Path, redis_url: str, run: str) -> None:
    project = make_project(tmp_path, redis_url, run=run)
    url = learner_url(project)
    learner = Service(project, "learner", "--config", "my.toml", *SETTINGS)
    actors = [Service(project, "actor", "--config", "my.toml", *SETTINGS)]
    try:
        for step in (10, 20):
            wait_until(lambda step=step: step_of(url) >= step, 200, (learner, actors[-1]))
            wait_until(lambda: fetch_status(url)["actors"][0]["groups_in_flight"] > 0, 60, (learner,))
            actors[-1].kill()
            actors.append(Service(project, "actor", "--config", "my.toml", *SETTINGS))
        time.sleep(1)
        learner.kill()
        learner = Service(project, "learner", "--config", "my.toml", *SETTINGS)
        wait_until(lambda: step_of(url) >= 30, 200, (learner, actors[-1]))
        learner.kill()
        learner = Service(project, "learner", "--config", "my.toml", *SETTINGS)
        assert learner.wait(300) == 0, learner.text
    finally:
        learner.kill()
        for actor in actors:
            actor.kill()
    summary = json.loads((project / "runs" / run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["weight_version"] == f"{run}/3/{STEPS}"
    assert [m["step"] for m in metrics_of(project, run)] == list(range(1, STEPS + 1))
    assert all(m["ended_quarantined"] == 0 for m in metrics_of(project, run)), "part of a group was stored"
    assert summary["rollouts"] == STEPS * 4 * 8
    assert summary["accuracy_after"] > 0.9
