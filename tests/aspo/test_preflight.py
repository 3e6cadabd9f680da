"""What keeps a service from starting: a Redis that would lose the queue, a disk without room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from aspo.preflight import (
    ROOM_FLOOR,
    count_weights,
    folder_findings,
    preflight,
    redis_findings,
    room_needed,
)
from models import save_model, tiny_qwen3
from rollouts import write_config
from services import Service, redis_server


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_the_redis_that_the_demo_starts_is_as_it_should_be(tmp_path: Path, redis_url: str) -> None:
    model = save_model(tmp_path / "model", hidden_size=32, layers=1)
    config = write_config(tmp_path, model=model, redis_url=redis_url)
    assert preflight("learner", config) == preflight("actor", config) == []


@pytest.mark.parametrize(
    ("options", "severity", "words"),
    [
        (
            ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"],
            "error",
            "maxmemory-policy allkeys-lru); set maxmemory-policy to noeviction",
        ),
        (["--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"], "error", "maxmemory-policy"),
        (["--appendonly", "no"], "warning", "the queue is lost if it crashes; set appendonly to yes"),
    ],
)
def test_a_redis_that_would_lose_the_queue_is_found_out(
    tmp_path: Path, options: list[str], severity: str, words: str
) -> None:
    with redis_server(tmp_path, *options) as url:
        [finding] = preflight("actor", write_config(tmp_path, model="hub/name", redis_url=url))
    assert finding.severity == severity
    assert words in finding.text


def test_a_full_memory_without_eviction_is_fine(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "100mb") as url:
        assert preflight("actor", write_config(tmp_path, model="hub/name", redis_url=url)) == []


def test_an_old_redis_is_refused(client: redis.Redis) -> None:
    info = client.info()
    assert redis_findings(info) == []
    for version in ("6.0.16", "5.0.7", "3.2"):
        [finding] = redis_findings(info | {"redis_version": version})
        assert finding.severity == "error"
        assert f"Redis {version} is too old; run redis-server 6.2 or newer" in finding.text
    for version in ("6.2.0", "7.0.15", "8.0.0", "10.1.2"):
        assert redis_findings(info | {"redis_version": version}) == []


def test_a_user_who_may_not_ask_is_told_so(tmp_path: Path, redis_url: str, client: redis.Redis) -> None:
    client.acl_setuser("mute", enabled=True, nopass=True, commands=["+ping"], keys=["*"])
    try:
        url = redis_url.replace("//", "//mute:any@")
        [finding] = preflight("actor", write_config(tmp_path, model="hub/name", redis_url=url))
    finally:
        client.acl_deluser("mute")
    assert finding.severity == "warning"
    assert "grant its user +info" in finding.text


def test_a_disk_without_room_is_an_error(tiny_disk: Path) -> None:
    folder = tiny_disk / "runs" / "mine"
    assert folder_findings(folder, 500_000) == []
    [finding] = folder_findings(folder, 5_000_000)
    assert finding.severity == "error"
    assert "needs 5 MB of disk and 1 MB are free" in finding.text
    assert not folder.parent.exists(), "asking leaves nothing behind"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    (tmp_path / "file").write_text("")
    for folder, blamed in ((tiny_disk / "runs", tiny_disk), (tmp_path / "file" / "run", tmp_path / "file")):
        [finding] = folder_findings(folder, 0)
        assert finding.severity == "error"
        assert f"cannot write to {blamed}" in finding.text
        assert "set run.dir" in finding.text


def test_the_room_is_that_of_the_models_checkpoints(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", hidden_size=64, layers=2)
    weights = sum(tensor.numel() for tensor in tiny_qwen3(hidden_size=64, layers=2).parameters())
    assert count_weights(model) == weights
    config = write_config(tmp_path, model=model)
    needed = room_needed("learner", config)
    assert needed == weights * (3 * 12 + 3 * 4)
    written = config.run.path / "state" / "checkpoints" / "step-1"
    written.mkdir(parents=True)
    (written / "model").write_bytes(bytes(1000))
    assert room_needed("learner", config) == needed - 1000, "what a resumed run has written needs no room"
    assert room_needed("actor", config) == weights * 2 * 4
    os.truncate(model / "model.safetensors", 20)
    assert room_needed("learner", config) == ROOM_FLOOR
    shutil.rmtree(model)
    assert room_needed("actor", config) == ROOM_FLOOR


@pytest.mark.parametrize("service", ["check", "learner", "actor"])
def test_a_service_does_not_start_on_a_redis_that_evicts(tmp_path: Path, service: str) -> None:
    """In a moment, for the model is not even looked for, and with both findings told apart."""
    options = ("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
    with redis_server(tmp_path, *options) as url:
        write_config(tmp_path, model="no/such-model", redis_url=url)
        command = Service(tmp_path, service, "--config", "config.toml")
        try:
            assert command.wait(60) == 2
        finally:
            command.kill()
    lines = command.text.splitlines()
    assert sum("set maxmemory-policy to noeviction" in line for line in lines) == 1
    assert sum("set appendonly to yes" in line for line in lines) == 1
    assert "Traceback" not in command.text
    assert "model.path" not in command.text


def test_a_check_says_when_all_is_well(tmp_path: Path, redis_url: str) -> None:
    write_config(tmp_path, model=save_model(tmp_path / "model"), redis_url=redis_url)
    command = Service(tmp_path, "check", "--config", "config.toml", "--role", "actor")
    assert command.wait(60) == 0, command.text
    assert command.text == f"ok: actor of run test, Redis at {redis_url}\n"
