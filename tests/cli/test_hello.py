"""Row 20 of the fault matrix: actors that do not fit their learner are refused before they work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from aspo.hello import heard
from aspo.queue import connect
from aspo.schemas import SCHEMA_VERSION
from aspo_cli.processes import free_port
from models import char_tokenizer
from project import REWARD, learner_url, make_project, post
from services import Service, wait_until

RUN = "hello"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"), redis_url, run=RUN)
    (folder / "my_reward.py").write_text(REWARD + REWARD.replace("sevens", "more_sevens"))
    return folder


def start_learner(project: Path, client: redis.Redis, *settings: str) -> Service:
    """Start a learner, and wait until it has said hello."""
    client.delete(f"aspo:{RUN}:hello")
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    learner = Service(project, "learner", "--config", "my.toml", *overrides, forked=True)
    wait_until(lambda: heard(client, RUN), 60, (learner,))
    return learner


@pytest.fixture(scope="module")
def learner(project: Path, redis_url: str) -> Iterator[Service]:
    with connect(redis_url) as client:
        service = start_learner(project, client)
    yield service
    service.kill()


def refusal_of(project: Path, client: redis.Redis, *settings: str) -> str:
    """Start an actor that is to be refused; gives the line that it ends with."""
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    actor = Service(project, "actor", "--config", "my.toml", *overrides, forked=True)
    try:
        assert actor.wait(60) == 2, actor.text
    finally:
        actor.kill()
    assert "Traceback" not in actor.text
    streams = (f"aspo:{RUN}:tasks:{purpose}" for purpose in ("train", "eval"))
    assert [client.xpending(stream, "aspo")["pending"] for stream in streams] == [0, 0], "it took tasks"
    [line] = [line for line in actor.text.splitlines() if line.startswith("aspo: error:")]
    return line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "reward.function=my_reward:more_sevens",
            "reward.function is 'my_reward:more_sevens' here and 'my_reward:sevens' at the learner; start "
            "both from the same settings",
        ),
        ('data.reward_columns=["wanted", "split"]', "data.reward_columns is ['wanted', 'split'] here"),
        ("model.dtype=bfloat16", "model.dtype is 'bfloat16' here and 'float32' at the learner"),
        ("actor.engine.max_model_len=32", "max_model_len is 32 here and 64 at the learner"),
        ("run.name=another", "serves run 'hello' and this actor is of run 'another'; mend run.name"),
    ],
)
def test_other_settings_than_the_learners_are_refused(
    learner: Service, project: Path, client: redis.Redis, setting: str, words: str
) -> None:
    assert words in refusal_of(project, client, setting)


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (
            msgspec.json.encode({"tokenizer": "", "settings": {}, "schema": SCHEMA_VERSION + 1, "more": 1}),
            f"this actor writes schema version {SCHEMA_VERSION}, the learner reads {SCHEMA_VERSION + 1}; run "
            "the same release of aspo on both sides",
        ),
        (b"[2]", "in a way that this actor cannot read; run the same release of aspo on both sides"),
    ],
)
def test_another_release_is_refused(
    learner: Service, project: Path, client: redis.Redis, hello: bytes, words: str
) -> None:
    key = f"aspo:{RUN}:hello"
    post(f"{learner_url(project)}/v1/pause")  # lest it say its own again
    own = client.set(key, hello, get=True)
    assert words in refusal_of(project, client)
    client.set(key, own)


def test_a_relay_that_still_serves_another_tokenizer_is_found_out(
    learner: Service, project: Path, client: redis.Redis, tmp_path: Path
) -> None:
    """Last in this module: it ends the module's learner."""
    port, others = free_port(), []
    arguments = ("relay", "weights", "--learner", learner_url(project), "--port", str(port))
    relay = Service(tmp_path, *arguments, forked=True)
    try:
        wait_until(lambda: (tmp_path / "weights" / "live").exists(), 60, (learner, relay))
        learner.kill()
        char_tokenizer("9876543210+=\n ").save_pretrained(project / "start")
        others.append(start_learner(project, client, f"learner.port={free_port()}"))
        line = refusal_of(project, client, f"actor.learner_url=http://127.0.0.1:{port}")
        assert "the tokenizer that came with the weights is not the learner's" in line
        assert "mend actor.learner_url" in line
    finally:
        for service in (relay, *others):
            service.kill()
