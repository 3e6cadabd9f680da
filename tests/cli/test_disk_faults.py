"""Rows 15, 16 and 23 of the fault matrix: full disks, spoilt checkpoints and clocks that are off."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from aspo_cli.status import fetch_status
from crashing import SETTINGS, Outcome, Project, ends_well
from project import post, step_of
from scripted import ScriptedActor
from services import Service, wait_until

FAKETIME = os.environ.get("LIBFAKETIME", "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


def checkpoints(project: Project) -> list[Path]:
    return sorted((project.runs / "state" / "checkpoints").glob("step-*"))


def test_a_full_disk_under_the_checkpoints_is_waited_out(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str
) -> None:
    """Row 15: the checkpoint before stays, nothing is acknowledged, and the learner says why it waits."""
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner()
        wait_until(lambda: len(checkpoints(project)) >= 2, 60, (learner,))
        unlimited = resource.prlimit(learner.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(learner.process.pid, resource.RLIMIT_FSIZE, (2**17, unlimited[1]))
        wait_until(lambda: fetch_status(project.url)["phase"] == "waiting for disk", 60, (learner,))
        kept, stored = checkpoints(project), unacknowledged(client, project.run)
        status = fetch_status(project.url)
        assert "File too large" in status["trouble"]
        assert int(kept[-1].name.split("-")[1]) < status["step"]
        assert stored > 0
        post(f"{project.url}/v1/checkpoint")
        wait_until(lambda: unacknowledged(client, project.run) >= stored, 10, (learner,))
        assert checkpoints(project) == kept
        assert learner.text.count("cannot be written") == 1, learner.text
        resource.prlimit(learner.process.pid, resource.RLIMIT_FSIZE, unlimited)
        ends_well(project, learner, client, undisturbed)


def unacknowledged(client: redis.Redis, run: str) -> int:
    return int(client.xlen(f"aspo:{run}:rollouts:scripted"))


def test_a_learner_told_to_stop_does_not_wait_for_disk(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str
) -> None:
    """Row 15, stopped meanwhile: a plain error, and the next learner goes on from the checkpoint before."""
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner()
        wait_until(lambda: len(checkpoints(project)) >= 1, 60, (learner,))
        resource.prlimit(learner.process.pid, resource.RLIMIT_FSIZE, (2**17, 2**40))
        wait_until(lambda: fetch_status(project.url)["phase"] == "waiting for disk", 60, (learner,))
        assert learner.stop() == 1
        assert "aspo: error: the checkpoint of step" in learner.text
        assert "Traceback" not in learner.text
        ends_well(project, project.learner(), client, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["state/plan.jsonl", "metrics.jsonl"])
def test_a_full_disk_under_a_log_of_the_run_ends_the_learner_plainly(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str, name: str
) -> None:
    """Row 15, the files that grow line by line: one line says what to do, and the next learner goes on."""
    path = project.runs / name
    kept, full = path.with_suffix(".kept"), path.with_suffix(".full")
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner()
        wait_until(lambda: step_of(project.url) >= 8, 60, (learner,))
        kept.hardlink_to(path)
        full.symlink_to("/dev/full")
        full.rename(path)
        assert learner.wait(60) == 1, learner.text
        assert "No space left on device); free some" in learner.text
        assert "Traceback" not in learner.text
        kept.rename(path)
        with path.open("a") as file:
            file.write('{"step": ')  # a disk takes what it can
        ends_well(project, project.learner(), client, undisturbed)


def flip(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def lose_a_part(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


@pytest.mark.parametrize(
    "spoil", [flip, *(pytest.param(spoil, marks=pytest.mark.faults) for spoil in (truncate, lose_a_part))]
)
def test_a_spoilt_checkpoint_is_passed_over_for_the_one_before(
    project: Project,
    undisturbed: Outcome,
    client: redis.Redis,
    redis_url: str,
    spoil: Callable[[Path], None],
) -> None:
    """Row 16: what the older one does not cover was acknowledged, so its tasks are asked for again."""
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner(failpoint="step.trained:11")
        assert learner.wait(60) < 0, learner.text
        newest = checkpoints(project)[-1]
        spoil(newest)
        learner = project.learner()
        ends_well(project, learner, client, undisturbed)
    assert f"checkpoint {newest.name} is damaged" in learner.text
    assert f"from the checkpoint of step {int(newest.name.split('-')[1]) - 3}" in learner.text
    assert "are asked for again" in learner.text


@pytest.mark.faults
@pytest.mark.skipif(not Path(FAKETIME).exists(), reason="there is no libfaketime; LIBFAKETIME may name it")
@pytest.mark.parametrize("offset", ["+1h", "-1h"])
def test_a_clock_an_hour_off_changes_nothing(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str, offset: str
) -> None:
    """Row 23: the learner's clock against those of Redis and of the actors, and across its restart."""
    environment = {"LD_PRELOAD": FAKETIME, "FAKETIME": offset}
    arguments = [argument for setting in SETTINGS for argument in ("--set", setting)]
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner()
        wait_until(lambda: step_of(project.url) >= 9, 60, (learner,))
        learner.kill()
        learner = Service(
            project.folder, "learner", "--config", "my.toml", *arguments, environment=environment
        )
        project.learners.append(learner)
        ends_well(project, learner, client, undisturbed)
