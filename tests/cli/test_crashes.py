"""Rows 1 to 3 of the fault matrix: a learner killed at every step of the protocol, a zombie, a second one.

The rollouts are the same in every run (`scripted`), so that a run with kills can be held, bit for bit,
against one without.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from blake3 import blake3

from aspo.failpoints import VARIABLE
from project import learner_url, make_project, metrics_of, step_of
from scripted import ScriptedActor
from services import Service, wait_until

STEPS = 36
SETTINGS = [
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=3",
    "learner.max_staleness=40",  # what is dropped as stale depends on when it was sampled
    "eval.every=1000",
    "eval.max_prompts=2",
]
FAILPOINTS = (
    "step.read:2",
    "step.planned:3",
    "step.trained:2",
    "publish.storing:2",
    "publish.stored:3",
    "publish.live:2",
    "checkpoint.shard:2",
    "checkpoint.manifest:1",
    "checkpoint.renamed:2",
    "acknowledge.before:1",
    "acknowledge.after:2",
)


class Project:
    """A run's folder, and learners on it."""

    def __init__(self, folder: Path, redis_url: str, run: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.run = make_project(folder, redis_url, run=run), run
        self.url = learner_url(folder)
        self.runs = folder / "runs" / run
        self.learners: list[Service] = []

    def learner(self, *settings: str, failpoint: str | None = None) -> Service:
        arguments = [argument for setting in (*SETTINGS, *settings) for argument in ("--set", setting)]
        environment = {VARIABLE: failpoint} if failpoint else None
        learner = Service(
            self.folder, "learner", "--config", "my.toml", *arguments, environment=environment, forked=True
        )
        self.learners.append(learner)
        return learner

    def outcome(self) -> dict[str, object]:
        """What must not depend on kills: the losses, the weights, the plan, and how much was trained."""
        summary = json.loads((self.runs / "summary.json").read_text())
        return {
            "losses": [line["loss"] for line in metrics_of(self.folder, self.run)],
            "weights": blake3((self.runs / "model" / "model.safetensors").read_bytes()).hexdigest(),
            "plan": (self.runs / "state" / "plan.jsonl").read_text(),
            "rollouts": summary["rollouts"],
            "accuracy_before": summary["accuracy_before"],
        }


@pytest.fixture
def project(tmp_path: Path, redis_url: str, run: str) -> Iterator[Project]:
    project = Project(tmp_path / "killed", redis_url, run)
    yield project
    for learner in project.learners:
        learner.kill()


@pytest.fixture
def undisturbed(tmp_path: Path, redis_url: str, run: str) -> Iterator[dict[str, object]]:
    """The outcome of the same run without a fault."""
    project = Project(tmp_path / "undisturbed", redis_url, f"{run}-u")
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner()
        assert learner.wait(120) == 0, learner.text
    return project.outcome()


def nothing_is_left(client: redis.Redis, run: str) -> bool:
    """Whether every rollout stored was acknowledged."""
    streams = client.smembers(f"aspo:{run}:rollout-streams")
    return all(client.xlen(stream) == 0 for stream in streams)


def test_a_learner_killed_at_every_step_trains_as_if_it_had_not_died(
    project: Project, undisturbed: dict[str, object], client: redis.Redis, redis_url: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        for failpoint in FAILPOINTS:
            learner = project.learner(failpoint=failpoint)
            assert learner.wait(60) == -signal.SIGKILL, f"{failpoint} was not reached:\n{learner.text}"
        learner = project.learner()
        assert learner.wait(120) == 0, learner.text
    assert project.outcome() == undisturbed
    assert nothing_is_left(client, project.run)
    epochs = {
        path.name.split("-")[-2] for path in (project.runs / "state" / "weights" / "manifests").iterdir()
    }
    assert str(len(FAILPOINTS) + 1) in epochs


def test_a_zombie_is_refused_everywhere_and_exits(
    project: Project, undisturbed: dict[str, object], redis_url: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        zombie = project.learner()
        wait_until(lambda: step_of(project.url) >= 4, 60, (zombie,))
        zombie.process.send_signal(signal.SIGSTOP)
        successor = project.learner("learner.port=0")
        wait_until(lambda: "continuing run" in successor.text, 60, (successor,))
        zombie.process.send_signal(signal.SIGCONT)
        assert zombie.wait(30) == 1, zombie.text
        assert "another learner has taken run" in zombie.text
        assert "Traceback" not in zombie.text
        assert successor.wait(120) == 0, successor.text
    assert project.outcome() == undisturbed


def test_a_second_learner_refuses_to_start(project: Project, redis_url: str) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        first = project.learner("learner.steps=1000")
        wait_until(lambda: step_of(project.url) >= 1, 60, (first,))
        began = time.monotonic()
        second = Service(project.folder, "learner", "--config", "my.toml", "--set", "learner.port=0")
        assert second.wait(10) == 2, second.text
        assert time.monotonic() - began < 5
        assert "holds run" in second.text
        assert step_of(project.url) >= 1
        assert first.stop() == 0, first.text
