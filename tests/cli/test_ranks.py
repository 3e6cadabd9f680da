"""A learner of two ranks in a whole run: it publishes, and a rank's death changes nothing of the outcome."""

from __future__ import annotations

import os
import resource
import signal
import sys
import uuid
from pathlib import Path

import pytest
import redis

from aspo.failpoints import VARIABLE
from aspo_cli.processes import free_port
from aspo_cli.status import fetch_status
from crashing import SETTINGS, Outcome, Project, nothing_is_left
from project import post, step_of
from ranked import environment
from scripted import ScriptedActor
from services import Service, wait_until

STEPS = 9
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "--no-python",
)


def start(project: Project, size: int, *, failpoints: dict[int, str] | None = None) -> list[Service]:
    """Start the processes of a learner; those of whom a failpoint is named kill themselves there."""
    port = free_port()
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"learner.steps={STEPS}")]
    for rank in range(size):
        variables = environment(rank, size, port) | {VARIABLE: (failpoints or {}).get(rank, "")}
        arguments = ("learner", "--config", "my.toml", *settings)
        project.learners.append(Service(project.folder, *arguments, environment=variables, forked=True))
    return project.learners[-size:]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Outcome:
    """The outcome of a run on two ranks without a fault."""
    folder = tmp_path_factory.mktemp("ranks")
    with Project(folder, redis_url, f"ranks-{uuid.uuid4().hex[:8]}") as project:
        with ScriptedActor(redis_url, project.run, project.runs):
            for learner in start(project, 2):
                assert learner.wait(100) == 0, learner.text
                assert "Traceback" not in learner.text
        return project.outcome()


def test_a_rank_that_dies_while_the_learner_is_paused_ends_it(project: Project, redis_url: str) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        leader, follower = start(project, 2)
        wait_until(lambda: step_of(project.url) >= 2, 60, (leader, follower))
        post(f"{project.url}/v1/pause")
        wait_until(lambda: fetch_status(project.url)["phase"] == "paused", 20, (leader, follower))
        follower.kill()
        assert leader.wait(20) == 1, leader.text
    assert "process 1 of this learner has ended" in leader.text


@pytest.mark.parametrize(
    ("rank", "failpoint"),
    [(1, "checkpoint.shard:2"), pytest.param(0, "step.trained:5", marks=pytest.mark.faults)],
)
def test_a_rank_that_dies_ends_the_others_and_a_restart_goes_on_as_if_it_had_not(
    project: Project, on_two_ranks: Outcome, client: redis.Redis, redis_url: str, rank: int, failpoint: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        learners = start(project, 2, failpoints={rank: failpoint})
        killed, other = learners[rank], learners[1 - rank]
        assert killed.wait(60) == -signal.SIGKILL, killed.text
        assert other.wait(20) == 1, other.text
        assert "Traceback" not in other.text, other.text
        assert other.text.count("aspo: error: another process of this learner has ended") == 1
        for learner in start(project, 2):
            assert learner.wait(100) == 0, learner.text
    assert project.outcome() == on_two_ranks
    assert nothing_is_left(client, project.run)


@pytest.mark.faults
def test_a_full_disk_under_one_rank_is_waited_out(
    project: Project, on_two_ranks: Outcome, redis_url: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        leader, follower = start(project, 2)
        wait_until(lambda: step_of(project.url) >= 1, 60, (leader, follower))
        unlimited = resource.prlimit(follower.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(follower.process.pid, resource.RLIMIT_FSIZE, (2**14, unlimited[1]))
        wait_until(lambda: fetch_status(project.url)["phase"] == "waiting for disk", 60, (leader, follower))
        trouble = fetch_status(project.url)["trouble"]
        assert "rank 1: " in trouble
        assert "File too large" in trouble
        resource.prlimit(follower.process.pid, resource.RLIMIT_FSIZE, unlimited)
        for learner in (leader, follower):
            assert learner.wait(100) == 0, learner.text
    assert project.outcome() == on_two_ranks


@pytest.mark.faults
def test_torchrun_ends_a_learner_that_has_lost_a_rank(
    project: Project, on_two_ranks: Outcome, client: redis.Redis, redis_url: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = torchrun(project)
        wait_until(lambda: step_of(project.url) >= 4, 120, (learner,))
        ranks = children(learner)
        os.kill(ranks[1], signal.SIGKILL)
        assert learner.wait(60) == 1, learner.text
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        learner = torchrun(project)
        assert learner.wait(120) == 0, learner.text
    assert project.outcome() == on_two_ranks
    assert nothing_is_left(client, project.run)


@pytest.mark.faults
def test_a_learner_that_torchrun_is_told_to_stop_goes_on_with_another_number_of_ranks(
    project: Project, on_two_ranks: Outcome, client: redis.Redis, redis_url: str
) -> None:
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = torchrun(project)
        wait_until(lambda: step_of(project.url) >= 4, 120, (learner,))
        learner.stop()
        assert "stopping as told, at step" in learner.text
        (alone,) = start(project, 1)
        assert alone.wait(120) == 0, alone.text
        assert "continuing run" in alone.text
    found = project.outcome()
    assert found["plan"] == on_two_ranks["plan"]
    assert found["losses"] == pytest.approx(on_two_ranks["losses"], rel=1e-3, abs=1e-5)
    assert nothing_is_left(client, project.run)


def torchrun(project: Project) -> Service:
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"learner.steps={STEPS}")]
    learner = Service(project.folder, "learner", "--config", "my.toml", *settings, within=TORCHRUN)
    project.learners.append(learner)
    return learner


def children(service: Service) -> list[int]:
    pid = service.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
