"""Runs with faults, to be held bit for bit against the same run without: learners on one folder.

The rollouts depend on their tasks alone (`scripted`), so nothing that befalls a run may change its outcome.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from blake3 import blake3

from aspo.failpoints import VARIABLE
from aspo.queue import connect
from project import learner_url, make_project, metrics_of
from scripted import ScriptedActor
from services import Service

Outcome = dict[str, Any]
STEPS = 36
SETTINGS = [
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=3",
    "learner.max_staleness=40",  # what is dropped as stale depends on when it was sampled
    "eval.every=1000",
    "eval.max_prompts=2",
]


class Project:
    """A run's folder, and learners on it."""

    def __init__(self, folder: Path, redis_url: str, run: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.run = make_project(folder, redis_url, run=run), run
        self.url = learner_url(folder)
        self.runs = folder / "runs" / run
        self.learners: list[Service] = []

    def learner(self, *settings: str, failpoint: str | None = None) -> Service:
        """Start a learner, off within a second, that kills itself at a failpoint if one is named."""
        arguments = [argument for setting in (*SETTINGS, *settings) for argument in ("--set", setting)]
        environment = {VARIABLE: failpoint} if failpoint else None
        learner = Service(
            self.folder, "learner", "--config", "my.toml", *arguments, environment=environment, forked=True
        )
        self.learners.append(learner)
        return learner

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for learner in self.learners:
            learner.kill()

    def outcome(self) -> Outcome:
        """What must not depend on kills: the losses, the weights, the plan, and how much was trained."""
        summary = json.loads((self.runs / "summary.json").read_text())
        plan = self.runs / "state" / "plan.jsonl"
        return {
            "losses": [line["loss"] for line in metrics_of(self.folder, self.run)],
            "weights": blake3((self.runs / "model" / "model.safetensors").read_bytes()).hexdigest(),
            "plan": [json.loads(line)["tasks"] for line in plan.read_text().splitlines()],
            "rollouts": summary["rollouts"],
            "accuracy_before": summary["accuracy_before"],
        }


def run_undisturbed(folder: Path, redis_url: str, *settings: str, plan: Path | None = None) -> Outcome:
    """The outcome of a run without a fault, of the same batches as another if its `plan` is given."""
    with Project(folder, redis_url, f"undisturbed-{uuid.uuid4().hex[:8]}") as project:
        if plan is not None:
            (project.runs / "state-0").mkdir(parents=True)
            tasks = [json.loads(line) | {"entries": []} for line in plan.read_text().splitlines()]
            lines = [json.dumps(step) + "\n" for step in tasks]
            (project.runs / "state-0" / "plan.jsonl").write_text("".join(lines))
        with ScriptedActor(redis_url, project.run, project.runs):
            learner = project.learner(*settings)
            assert learner.wait(120) == 0, learner.text
        return project.outcome()


@contextmanager
def run_on(
    folder: Path, run: str, url: str, *, actor_url: str | None = None, test_url: str | None = None
) -> Iterator[tuple[Project, redis.Redis]]:
    """A project on a Redis of its own with its one actor, and a client; each may reach Redis another way."""
    with (
        Project(folder, url, run) as project,
        ScriptedActor(actor_url or url, run, project.runs, lease_s=0.0),
        connect(test_url or url, retries=60) as client,
    ):
        yield project, client


def nothing_is_left(client: redis.Redis, run: str) -> bool:
    """Whether every rollout stored was acknowledged."""
    streams = client.smembers(f"aspo:{run}:rollout-streams")
    return all(client.xlen(stream) == 0 for stream in streams)


def ends_well(project: Project, learner: Service, client: redis.Redis, undisturbed: Outcome) -> None:
    """The common criterion."""
    assert learner.wait(120) == 0, learner.text
    assert "Traceback" not in learner.text
    assert project.outcome() == undisturbed
    assert nothing_is_left(client, project.run)
