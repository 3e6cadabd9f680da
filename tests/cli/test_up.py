"""`aspo up`: one command runs everything, starts again what dies, and ends all of it in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aspo.config import ConfigError, load_config
from aspo_cli import shares
from aspo_cli.processes import Processes, free_port, is_served
from aspo_cli.shares import Shares, split_cores, split_gpus
from aspo_cli.up import Service as Plan
from aspo_cli.up import plan
from project import learner_url, make_project, step_of
from scripted import ScriptedActor
from services import Service, wait_until


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def project(tmp_path: Path, port: int, run: str) -> Path:
    """A project whose Redis is not there yet."""
    return make_project(tmp_path, f"redis://127.0.0.1:{port}/0", run=run)


@pytest.fixture
def up(project: Path) -> Iterator[Service]:
    """`aspo up` without an actor: they come from elsewhere."""
    service = Service(project, "up", "--config", "my.toml", "--actors", "0")
    yield service
    service.stop(timeout_s=120)


@pytest.fixture
def ranked_up(project: Path) -> Iterator[Service]:
    """`aspo up` with a learner of two processes, without an actor."""
    service = Service(project, "up", "--config", "my.toml", "--actors", "0", "--ranks", "2")
    yield service
    service.stop(timeout_s=120)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def pid_of(service: Service, word: str) -> int | None:
    """The process that `aspo up` has started with a word in its command line, None while there is none."""
    children = children_of(service.process.pid)
    found = [pid for pid in children if word in Path(f"/proc/{pid}/cmdline").read_text()]
    return found[0] if found else None


def kill_part(service: Service, word: str) -> None:
    """End a part as kill -9 does, and wait until it has been started again."""
    first = pid_of(service, word)
    assert first is not None, service.text
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: pid_of(service, word) not in (first, None), 30, (service,))


@pytest.mark.faults
def test_a_learner_that_dies_comes_back_and_all_ends_in_order(
    up: Service, project: Path, port: int, run: str
) -> None:
    """Its training goes on where it was, and Ctrl-C leaves a checkpoint and no process."""
    url, folder = learner_url(project), project / "runs" / run
    wait_until(lambda: step_of(url) >= 0, 60, (up,))
    with ScriptedActor(f"redis://127.0.0.1:{port}/0", run, folder):
        wait_until(lambda: step_of(url) >= 1, 60, (up,))
        kill_part(up, "\0learner\0")
        wait_until(lambda: step_of(url) >= 1, 60, (up,))
    assert up.stop(signal.SIGINT) == 130, up.text
    assert "learner ended with code -9; starting it again in 1 s" in up.text
    assert re.search(r"^learner  \| .* step 1  reward", up.text, re.MULTILINE), up.text
    assert f"watch it at {url}, or by aspo top --learner {url}" in up.text
    assert "stopped as told" in up.text
    assert not is_served(port)
    assert list((folder / "state" / "checkpoints").iterdir())
    assert "stopping after this step" in (folder / "logs" / "learner.log").read_text()


@pytest.mark.faults
def test_a_learner_of_two_ranks_comes_back_when_one_dies(
    ranked_up: Service, project: Path, port: int, run: str
) -> None:
    url, folder = learner_url(project), project / "runs" / run
    wait_until(lambda: step_of(url) >= 0, 90, (ranked_up,))
    with ScriptedActor(f"redis://127.0.0.1:{port}/0", run, folder):
        wait_until(lambda: step_of(url) >= 1, 60, (ranked_up,))
        launcher = pid_of(ranked_up, "aspo_cli.ranks")
        assert launcher is not None
        os.kill(children_of(launcher)[1], signal.SIGKILL)
        wait_until(lambda: pid_of(ranked_up, "aspo_cli.ranks") not in (launcher, None), 60, (ranked_up,))
        wait_until(lambda: step_of(url) >= 3, 90, (ranked_up,))
    assert ranked_up.stop(signal.SIGINT) == 130, ranked_up.text
    assert list((folder / "state" / "checkpoints").resolve().glob("*/model-00001-of-00002.safetensors"))
    assert pids_of_session(project) == []


def test_a_launcher_of_ranks_that_is_killed_takes_them_with_it(tmp_path: Path) -> None:
    hang = "import sys, time\nif sys.orig_argv[2:4] == ['aspo_cli', 'learner']:\n    time.sleep(60)\n"
    (tmp_path / "sitecustomize.py").write_text(hang)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "aspo_cli.ranks", "2", "--config", "my.toml"]
    launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    try:
        wait_until(lambda: len(children_of(launcher.pid)) == 2, 60)
        ranks = children_of(launcher.pid)
        wait_until(lambda: all(b"-m\0aspo_cli\0learner" in command_of(pid) for pid in ranks), 30)
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not any(command_of(pid) for pid in ranks), 10)


def command_of(pid: int) -> bytes:
    """The command line of a process, nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.faults
@pytest.mark.vllm
def test_a_killed_actor_comes_back_and_the_training_completes(project: Path, run: str) -> None:
    command = ["up", "--config", "my.toml", "--actors", "2", "--set", "learner.steps=400"]
    service, url = Service(project, *command), learner_url(project)
    try:
        wait_until(lambda: step_of(url) >= 2, 240, (service,))
        kill_part(service, "actor-0-1")
        log = project / "runs" / run / "logs" / "actor-1.log"
        wait_until(lambda: log.read_text().count("engine runs") == 2, 240, (service,))
        assert service.wait(300) == 0, service.text
    finally:
        service.process.terminate()  # and with it what it has started
        service.wait(120)
    summary = json.loads((project / "runs" / run / "summary.json").read_text())
    assert summary["steps"] == 400
    assert "training is complete" in service.text
    assert pids_of_session(project) == []


def pids_of_session(project: Path) -> list[int]:
    """Every process that still works in the project's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").resolve() == project.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_mistake_of_a_part_ends_all_at_once_with_its_words(
    project: Path, port: int, run: str, ranks: int
) -> None:
    """It would come again, so nothing is started a second time."""
    flags = ["--config", "my.toml", "--actors", "0", "--ranks", str(ranks), "--set", "model.path=nowhere"]
    service = Service(project, "up", *flags)
    assert service.wait(60) == 2, service.text
    assert "learner ended with code 2" in service.text
    assert "model.path 'nowhere' cannot be loaded" in service.text
    assert "starting it again" not in service.text
    assert not is_served(port)


def test_a_redis_that_is_there_is_used_and_left_alone(project: Path, redis_url: str, run: str) -> None:
    made = plan(project / "my.toml", 1, redis_url, ["redis.url=redis://elsewhere"])
    assert (made.own_redis, made.config.redis.url, made.overrides) == (False, redis_url, [])
    elsewhere = plan(project / "my.toml", 1, None, ["redis.url=rediss://queue.example:6380/0"])
    assert not elsewhere.own_redis
    taken = plan(project / "my.toml", 0, None, [f"redis.url={redis_url}"])
    with (
        pytest.raises(ConfigError, match="that is the Redis to use say --redis URL"),
        Processes(project / "logs") as parts,
    ):
        taken.start(parts)


@pytest.mark.parametrize(
    ("actors", "override", "words"),
    [
        (1, "learner.prot=1", "unknown key 'learner.prot'; did you mean 'port'?"),
        (1, "learner.port=1", "set the same port in both"),
        (2, "actor.advertise_url=http://a:1", "cannot be that of several actors"),
        (2, "actor.port=65535", "set actor.port \\(0 picks free ones\\)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    project: Path, actors: int, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(project / "my.toml", actors, None, [override])


def test_gpus_are_split_and_too_few_are_refused(project: Path) -> None:
    config = load_config(project / "my.toml", ["actor.engine.tensor_parallel_size=2"])
    split = split_gpus(["4", "5", "6", "7", "GPU-8"], config, 2)
    assert split.learner == {"CUDA_VISIBLE_DEVICES": "4"}
    assert [share["CUDA_VISIBLE_DEVICES"] for share in split.actors] == ["5,6", "7,GPU-8"]
    with pytest.raises(ConfigError, match="make 7, and there are 5; lower --actors"):
        split_gpus(["4", "5", "6", "7", "8"], config, 3)
    on_cpu = load_config(project / "my.toml", ["learner.device=cpu"])
    split = split_gpus(["0", "1", "2", "3"], config, 1, ranks=2)
    assert (split.learner, split.actors) == (
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        [{"CUDA_VISIBLE_DEVICES": "2,3"}],
    )
    split = split_gpus(["0", "1"], on_cpu, 2)
    assert (split.learner["CUDA_VISIBLE_DEVICES"], len(split.actors)) == ("", 2)
    with pytest.raises(ConfigError, match="set it to cuda"):
        split_gpus(["0", "1"], load_config(project / "my.toml", ["learner.device=cuda:1"]), 1)


def test_gpus_are_those_named_else_those_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "nvidia-smi"
    lines = (
        "GPU 0: NVIDIA H200 (UUID: GPU-1)",
        "  MIG 1g.18gb Device 0: (UUID: MIG-1)",
        "GPU 1: NVIDIA H200",
    )
    driver.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    driver.chmod(0o755)
    monkeypatch.delenv(shares.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shares.visible_gpus() == ["0", "1"]
    monkeypatch.setenv(shares.VISIBLE, "3, GPU-7")
    assert shares.visible_gpus() == ["3", "GPU-7"]
    monkeypatch.setenv(shares.VISIBLE, "")
    assert shares.visible_gpus() == []
    monkeypatch.delenv(shares.VISIBLE)
    driver.unlink()
    assert shares.visible_gpus() == []


def test_cores_are_split_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shares.THREADS, raising=False)
    assert split_cores(16, 3).learner == {"OMP_NUM_THREADS": "8"}
    assert [share["OMP_NUM_THREADS"] for share in split_cores(16, 3).actors] == ["2", "2", "2"]
    assert split_cores(16, 3, ranks=4).learner == {"OMP_NUM_THREADS": "2"}
    assert split_cores(1, 2).actors == [{"OMP_NUM_THREADS": "1"}] * 2
    monkeypatch.setenv(shares.THREADS, "3")
    assert split_cores(16, 1) == Shares({}, [{}], "3 threads each, as OMP_NUM_THREADS says")


def test_actors_differ_in_name_and_port(project: Path) -> None:
    made = plan(project / "my.toml", 2, None, ["actor.port=9000", "actor.probe_port=9100"])
    names = [list(Plan._own_settings(made, number)) for number in (0, 1)]
    assert names[1] == ['actor.id="actor-0-1"', "actor.port=9001", "actor.probe_port=9101"]
    alone = plan(project / "my.toml", 1, None, [])
    assert list(Plan._own_settings(alone, 0)) == [], "its name is in the config"
