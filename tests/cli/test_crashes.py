"""Rows 1 to 3 of the fault matrix: a learner killed at every step of the protocol, a zombie, a second one.

The rollouts are the same in every run (`scripted`), so that a run with kills can be held, bit for bit,
against one without.
"""

from __future__ import annotations

import http.client
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from crashing import Outcome, Project, ends_well, nothing_is_left, run_undisturbed
from project import step_of
from scripted import ScriptedActor
from services import Service, wait_until

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


def test_a_learner_killed_at_every_step_trains_as_if_it_had_not_died(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str
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


@pytest.mark.faults
def test_a_learner_of_adapters_killed_now_and_then_trains_as_if_it_had_not_died(
    project: Project, tmp_path: Path, client: redis.Redis, redis_url: str
) -> None:
    lora = ("learner.lora.rank=2", "learner.learning_rate=0.01")
    undisturbed = run_undisturbed(tmp_path / "undisturbed", redis_url, *lora)
    with ScriptedActor(redis_url, project.run, project.runs):
        for failpoint in ("step.trained:2", "publish.stored:3", "checkpoint.shard:2", "checkpoint.renamed:1"):
            learner = project.learner(*lora, failpoint=failpoint)
            assert learner.wait(60) == -signal.SIGKILL, f"{failpoint} was not reached:\n{learner.text}"
        ends_well(project, project.learner(*lora), client, undisturbed)
    assert (project.runs / "adapter" / "adapter_model.safetensors").exists()


def test_a_zombie_is_refused_everywhere_and_exits(
    project: Project, undisturbed: Outcome, redis_url: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        zombie = project.learner()
        wait_until(lambda: step_of(project.url) >= 4, 60, (zombie,))
        zombie.process.send_signal(signal.SIGSTOP)
        successor = project.learner("learner.port=0")
        wait_until(lambda: "continuing run" in successor.text, 60, (successor,))
        with asked(f"{project.url}/v1/weights/latest") as answer:
            zombie.process.send_signal(signal.SIGCONT)
            assert answer() in (503, None)
        assert zombie.wait(30) == 1, zombie.text
        assert "another learner has taken run" in zombie.text
        assert "Traceback" not in zombie.text
        assert successor.wait(120) == 0, successor.text
    assert project.outcome() == undisturbed


@contextmanager
def asked(url: str) -> Iterator[Callable[[], int | None]]:
    """Send a GET; gives what waits for its status, None if the service ends before it answers."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("GET", parts.path)

    def answer() -> int | None:
        try:
            return connection.getresponse().status
        except OSError:
            return None

    yield answer
    connection.close()


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
