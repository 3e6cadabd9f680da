"""A user's mistakes: one line that says what to do, exit code 2, no traceback."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import save_model
from rollouts import write_config
from services import Service


@pytest.fixture
def project(tmp_path: Path, redis_url: str, run: str) -> Path:
    save_model(tmp_path / "model", hidden_size=32, layers=1)
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1" * 600, "answer": "2"}]
    for name, count in (("good", 1), ("long", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:count]))
    good = tmp_path / "good.jsonl"
    write_config(tmp_path, run=run, model=tmp_path / "model", data=good, redis_url=redis_url)
    return tmp_path


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that something already listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("service", "override", "words"),
    [
        ("learner", "learner.stepps=1", "unknown key 'learner.stepps'; did you mean 'steps'?"),
        ("learner", "model.path=/no/such/model", "model.path '/no/such/model' cannot be loaded"),
        ("learner", "redis.url=redis://127.0.0.1:1/0", "start redis-server or set redis.url"),
        ("learner", "data.path=none.jsonl", "no prompt file at none.jsonl"),
        ("learner", "data.prompt_column=question", "has no column 'question' (it has prompt, answer)"),
        (
            "learner",
            "data.path={folder}/long.jsonl",
            "row 1: the prompt has 600 tokens, but the context leaves",
        ),
        ("learner", "sampling.max_tokens=512", "leaves no room for a prompt"),
        ("learner", "learner.host=0.0.0.0", "refusing to serve on 0.0.0.0 without tokens"),
        ("learner", "learner.port={busy}", "Address already in use); choose another port"),
        ("learner", "learner.device=cuda", "torch sees no GPU"),
        (
            "actor",
            "reward.function=my_rewards:f",
            "No module named 'my_rewards'; put its folder on PYTHONPATH",
        ),
        ("actor", "reward.function=aspo_actor.rewards:nope", "has no 'nope'"),
        ("actor", "redis.url=redis://127.0.0.1:1/0", "start redis-server or set redis.url"),
        ("learner", "learner.probe_port={busy}", "Address already in use); choose another port"),
        ("actor", "actor.host=0.0.0.0", "refusing to serve on 0.0.0.0 without tokens"),
        ("actor", "actor.port={busy}", "Address already in use); choose another port"),
    ],
)
def test_a_mistake_is_one_line(
    project: Path, busy_port: int, service: str, override: str, words: str
) -> None:
    override = override.format(folder=project, busy=busy_port)
    settings = ("--set", "actor.port=0", "--set", override)
    command = Service(project, service, "--config", "config.toml", *settings, forked=True)
    try:
        code = command.wait(90)
    finally:
        command.kill()
    errors = [line for line in command.text.splitlines() if line.startswith("aspo: error:")]
    # A Redis that is not there may come; what else is wrong stays wrong, and is not to be tried again.
    assert code == (1 if "redis.url" in override else 2), command.text
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in command.text


def test_no_config_and_no_learner_are_said_plainly(tmp_path: Path) -> None:
    for arguments, words in (
        (("learner", "--config", "none.toml"), "no config file at none.toml"),
        (("status", "--once", "--learner", "http://127.0.0.1:1"), "no learner answers at http://127.0.0.1:1"),
    ):
        command = Service(tmp_path, *arguments)
        assert command.wait(60) == 2
        assert words in command.text
        assert "Traceback" not in command.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["weights", "ls", "--learner", "http://127.0.0.1:1"], "no learner answers at http://127.0.0.1:1"),
        (["weights", "ls", "--learner", "localhost:1"], "is not a URL; write --learner http://HOST:PORT"),
        (["weights", "verify", "--learner", "localhost:1"], "is not a URL; write --learner http://HOST:PORT"),
        (["weights", "show", "demo 1é", "--learner", "http://127.0.0.1:1"], "no learner answers"),
        (["weights", "pull", "model"], "model exists; name a folder that does not"),
        (["weights", "verify", "--store", "nowhere"], "nowhere is not a store of weights"),
        (["relay", "relay", "--host", "0.0.0.0"], "refusing to serve on 0.0.0.0 without tokens"),
        (["relay", "relay", "--tls-cert", "a.pem"], "tls_cert and tls_key go together"),
        (["relay", "relay", "--token-file", "none"], "cannot read none (No such file or directory)"),
        (["relay", "good.jsonl"], "cannot keep weights in good.jsonl"),
    ],
)
def test_a_mistake_about_weights_is_one_line(project: Path, arguments: list[str], words: str) -> None:
    service = Service(project, *arguments, forked=True)
    assert service.wait(30) == 2, service.text
    assert words in service.text
    assert service.text.strip().count("\n") == 0, service.text
