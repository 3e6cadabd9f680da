"""Rows 6 and 25 of the fault matrix, with real vLLM actors: none, two, a hung engine, a short notice, none.

Leases last longer than the test: what goes on after an actor has left was handed back by it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import redis

from aspo.queue import rollout_keys
from aspo_cli.status import fetch_status
from project import REWARD, learner_url, make_project, step_of
from services import Service, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
SETTINGS = ("learner.steps=100000", "redis.task_lease_s=600", "eval.every=100000", "eval.max_prompts=2")
ROUND = 5  # steps: more than the tasks ahead can feed, (max_staleness + 1) batches


class Run:
    """A run's learner and actors, all of them to be ended with the test."""

    def __init__(self, project: Path, client: redis.Redis, name: str) -> None:
        self._project, self.url = project, learner_url(project)
        self._client, self._tasks = client, f"aspo:{name}:tasks:train"
        self.services: list[Service] = []

    def start(self, role: str, *settings: str) -> Service:
        overrides = [argument for setting in (*SETTINGS, *settings) for argument in ("--set", setting)]
        service = Service(self._project, role, "--config", "my.toml", *overrides, forked=role == "learner")
        self.services.append(service)
        return service

    @property
    def actors(self) -> dict[str, Any]:
        """What the learner says of each actor alive."""
        return {actor["id"]: actor for actor in fetch_status(self.url)["actors"]}

    @property
    def holders(self) -> set[str]:
        """The actors that tasks are leased to."""
        consumers = self._client.xpending(self._tasks, "aspo")["consumers"]
        return {consumer["name"].decode() for consumer in consumers}

    def goes_on(self, *alive: Service) -> None:
        """Wait until more steps are done, and what was left behind is in the hands of the living."""
        begun = step_of(self.url)
        wait_until(lambda: step_of(self.url) >= begun + ROUND, 90, alive)
        wait_until(lambda: self.holders <= self.actors.keys(), 30, alive)


def engine_core(actor: Service) -> int:
    """The process of an actor's vLLM engine."""
    for status in Path("/proc").glob("[0-9]*/status"):
        fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        if int(fields["PPid"]) == actor.process.pid and fields["Name"].startswith("VLLM"):
            return int(status.parent.name)
    raise AssertionError("no engine")


def test_actors_come_and_go(tmp_path: Path, redis_url: str, client: redis.Redis, run: str) -> None:
    project = make_project(tmp_path, redis_url, run=run)
    (project / "my_reward.py").write_text(REWARD + REWARD.replace("sevens", "more_sevens"))
    services = Run(project, client, run)
    try:
        live_through_it(services, client, run)
    finally:
        for service in services.services:
            service.kill()


def live_through_it(services: Run, client: redis.Redis, run: str) -> None:
    """The story, in the order of the module's first line."""
    learner = services.start("learner")
    wait_until(lambda: step_of(services.url) == 0, 60, (learner,))
    assert "no actor is alive; waiting for one" in wait_until(lambda: learner.text, 10)
    hung = services.start("actor", "actor.id=hung", "actor.probe_every_s=0.5", "actor.probe_timeout_s=6")
    brief = services.start("actor", "actor.id=brief", "actor.grace_s=0")
    both = (learner, hung, brief)
    wait_until(lambda: sum(actor["groups"] > 0 for actor in services.actors.values()) == 2, 150, both)
    services.goes_on(learner, hung, brief)

    engine = engine_core(hung)
    os.kill(engine, signal.SIGSTOP)
    assert hung.wait(40) == 1, hung.text
    assert "aspo: error: " in hung.text
    assert "Traceback" not in hung.text
    assert not Path(f"/proc/{engine}").exists(), "the engine was left behind"
    services.goes_on(learner, brief)
    assert list(services.actors) == ["brief"]
    registry, left = rollout_keys(run, "brief")
    wait_until(lambda: client.smembers(registry) == {left.encode()}, 60, (learner,))

    assert brief.stop(timeout_s=20) == 0, brief.text
    assert "Traceback" not in brief.text
    stopped = step_of(services.url)
    status = wait_until(lambda: without_actors(services.url, 3.0), 30, (learner,))
    assert status["phase"] == "waiting for an actor"
    assert status["step"] <= stopped + ROUND

    late = services.start("actor", "actor.id=late")
    services.goes_on(learner, late)
    status = fetch_status(services.url)
    assert status["ended"].keys() <= {"duplicate", "stale"}, "something was quarantined"
    assert status["without_actors_seconds"] is None
    assert "actor late is here" in learner.text

    learner.kill()
    learner = services.start("learner", "reward.function=my_reward:more_sevens")
    assert late.wait(60) == 2, late.text
    assert "'my_reward:sevens' here and 'my_reward:more_sevens' at the learner" in late.text


def without_actors(url: str, at_least_s: float) -> dict[str, Any] | None:
    """The learner's status, once it has been without actors for so long."""
    status = fetch_status(url)
    absent = status["without_actors_seconds"]
    return status if absent is not None and absent >= at_least_s else None
