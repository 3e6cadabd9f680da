"""Fifty SIGKILLs of learner, actor and Redis in one run: nothing lost, nothing twice, the same weights."""

from __future__ import annotations

import os
import random
import re
from datetime import datetime
from pathlib import Path

import pytest

from aspo.queue import connect
from crashing import Project, nothing_is_left, run_undisturbed
from project import metrics_of, step_of
from scripted import ScriptedProcess
from services import RedisServer, Service, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
KILLS, STEPS = 50, 600
SETTINGS = (f"learner.steps={STEPS}", "learner.max_staleness=1000", "learner.learning_rate=1e-5")


def test_fifty_random_kills_change_nothing(
    tmp_path: Path, redis_url: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 1, 5 and 8 at random: every rollout is stored or made again, and trained once.

    What is late because its actor died is trained later, so the run is held against one of the same plan.
    """
    seed = int(os.environ.get("ASPO_KILL_SEED", "7"))
    chance, recoveries = random.Random(seed), list[float]()
    server = RedisServer(tmp_path / "redis", "--appendfsync", "everysec")
    try:
        with Project(tmp_path / "disturbed", server.url, run) as project:
            actor = ScriptedProcess(server.url, run, project.runs)
            learner = project.learner(*SETTINGS)
            victims = {"learner": 0, "actor": 0, "redis": 0}
            for _ in range(KILLS):
                moves_on(project, learner, chance.randint(1, 4))
                victim = chance.choice(list(victims))
                victims[victim] += 1
                if victim == "learner":
                    learner.kill()
                    learner, seconds = recovered(project)
                    recoveries.append(seconds)
                elif victim == "actor":
                    actor.kill()
                    actor.start()
                else:
                    server.kill()
                    server.start()
            assert learner.wait(200) == 0, learner.text
            actor.kill()
            with connect(server.url) as client:
                assert nothing_is_left(client, project.run)
            assert_each_step_once(project)
            plan = project.runs / "state" / "plan.jsonl"
            again = run_undisturbed(tmp_path / "undisturbed", redis_url, *SETTINGS, plan=plan)
            assert project.outcome() == again
    finally:
        server.stop()
    recoveries.sort()
    with capsys.disabled():
        print(
            f"\nkilled {victims}, seed {seed}; from a learner's start to its first new step, but for loading "
            f"the model: median {recoveries[len(recoveries) // 2]:.1f} s, longest {recoveries[-1]:.1f} s"
        )


def moves_on(project: Project, learner: Service, steps: int) -> None:
    """Wait for some more steps."""
    wait_until(lambda: step_of(project.url) >= 0, 60, (learner,))
    wanted = step_of(project.url) + steps
    wait_until(lambda: step_of(project.url) >= wanted, 60, (learner,))
    assert wanted < STEPS - 10, "the run has come to its end before the kills had"


def recovered(project: Project) -> tuple[Service, float]:
    """Start a learner after a kill; the seconds from its start to the end of its first step.

    The loading of the model is left out, and so are the imports: it is forked with them behind it. Most of
    what is left is the wait for the dead one's lease.
    """
    started = datetime.now()
    learner = project.learner(*SETTINGS)
    wait_until(lambda: re.search(r"step \d+  reward", learner.text), 60, (learner,))
    held, loaded, stepped = (
        logged(learner, words) for words in ("holds run", "serves on", r"step \d+  reward")
    )
    return learner, (stepped - started - (loaded - held)).total_seconds()


def logged(learner: Service, words: str) -> datetime:
    """When a learner first logged something."""
    line = re.search(rf"^(\S+ \S+) \w+ \S+: .*{words}", learner.text, re.MULTILINE)
    assert line, learner.text
    return datetime.fromisoformat(line[1].replace(",", "."))


def assert_each_step_once(project: Project) -> None:
    assert [line["step"] for line in metrics_of(project.folder, project.run)] == list(range(1, STEPS + 1))
