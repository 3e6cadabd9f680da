"""Real processes with secrets, among hostile strangers: no secret is told, and no stranger forges a line."""

from __future__ import annotations

import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from aspo.presence import ActorStatus, announce
from aspo.queue import RolloutWriter, connect
from project import learner_url, make_project
from scripted import ScriptedActor
from services import Service, redis_server, wait_until

PASSWORD = "redis-pass-4711"
TOKENS = {"reader": "reader-4711", "actor": "actor-4711", "operator": "operator-4711"}
WRONG = "wrong-4711"
HOSTILE = "a\n2001-01-01 00:00:00,000 INFO aspo: all is well\r\x1b[2J\x9b31m\u202e"
SETTINGS = ("learner.steps=2", "learner.max_staleness=40", "eval.every=1000", "eval.max_prompts=2")


@pytest.fixture
def locked_redis(tmp_path: Path) -> Iterator[str]:
    """A Redis that asks for a password; gives its URL with it."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder, "--requirepass", PASSWORD) as url:
        yield url.replace("://", f"://:{PASSWORD}@")


@pytest.fixture
def project(tmp_path: Path, locked_redis: str, run: str) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    make_project(folder, locked_redis, run=run)
    auth = "".join(f'{scope}_token_file = "{secrets / scope}"\n' for scope in TOKENS)
    for scope, token in TOKENS.items():
        (secrets / scope).write_text(f"{token}\n")
    config = (folder / "my.toml").read_text()
    (folder / "my.toml").write_text(f"{config}\n[auth]\n{auth}")
    return folder


def ask(url: str, token: str | None, method: str = "GET", body: bytes | None = None) -> str:
    """Call a route; gives the answer, be it an error."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers, data=body)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def be_hostile(client: redis.Redis, run: str, url: str) -> str:
    """Write to Redis and to the routes what a stranger might; gives all answers."""
    RolloutWriter(client, run, HOSTILE).put(f"{HOSTILE}:train:0", b"garbage")
    status = ActorStatus(id=HOSTILE, run=run, url=HOSTILE, state=HOSTILE, version=HOSTILE)
    announce(client, status, ttl_s=300)
    name, latest = urllib.parse.quote(HOSTILE), f"{url}/v1/weights/latest"
    report = b'{"client": "\\u001b[2J\\n", "finite": false, "kl": 0}'
    return "".join(
        (
            ask(f"{latest}?client={name}&have={name}&serves=http://{name}", TOKENS["actor"]),
            ask(f"{latest}?wait={name}", TOKENS["actor"]),
            ask(f"{url}/v1/weights/{name}/promote", TOKENS["operator"], "POST"),
            ask(f"{url}/v1/weights/{run}/1/0/report", TOKENS["actor"], "POST", report),
            ask(f"{url}/{name}", WRONG),
            *(ask(f"{url}{path}", WRONG) for path in ("/v1/status", "/docs", "/openapi.json")),
            *(ask(f"{url}{path}", TOKENS["reader"]) for path in ("/v1/pause", "/v1/status", "/openapi.json")),
            *(ask(f"{url}{path}", None) for path in ("/v1/status", "/metrics", "/readyz")),
        )
    )


def commands(project: Path, url: str, password_url: str) -> list[Service]:
    """Run what a user may ask, rightly and wrongly; gives the ended commands."""
    config, asked = ("--config", "my.toml"), ("--learner", url)
    token, wrong = {"ASPO_TOKEN": TOKENS["operator"]}, {"ASPO_TOKEN": WRONG}
    lines: list[tuple[tuple[str, ...], dict[str, str]]] = [
        (("status", "--once", *asked), token),
        (("status", "--once", "--json", *asked), token),
        (("status", "--once", *asked), wrong),
        (("weights", "ls", *asked), token),
        (("quarantine", "ls", *config), {}),
        (("check", *config), {}),
        (("check", *config, "--set", f"redis.url={password_url.replace(PASSWORD, WRONG)}"), {}),
        (("check", *config, "--set", f"redis.url=http{password_url}"), {}),
        (("actor", *config, "--set", f"redis.url=redis://:{PASSWORD}@127.0.0.1:1/0"), {}),
        (("learner", *config), {"ASPO_AUTH__ACTOR_TOKEN": TOKENS["actor"]}),
        (("learner", *config, "--set", f"auth={TOKENS['actor']}"), {}),
    ]
    found = [Service(project, *line, environment=env, forked=True) for line, env in lines]
    for service in found:
        service.wait(60)
    return found


@pytest.mark.faults
def test_no_secret_is_told_and_no_line_is_forged(project: Path, locked_redis: str, run: str) -> None:
    url, client = learner_url(project), connect(locked_redis)
    arguments = [part for setting in SETTINGS for part in ("--set", setting)]
    learner = Service(project, "learner", "--config", "my.toml", *arguments, forked=True)
    services = [learner]
    try:
        wait_until(lambda: f"run {run} serves" in learner.text, 60, (learner,))
        relay = Service(
            project, "relay", "relay", "--learner", url, "--port", "0",
            environment={"ASPO_TOKEN": TOKENS["actor"]}, forked=True,
        )  # fmt: skip
        services.append(relay)
        answers = be_hostile(client, run, url)
        wait_until(lambda: "quarantined" in learner.text and "no rollout for" in learner.text, 60, (learner,))
        ended = commands(project, url, locked_redis)
        with ScriptedActor(locked_redis, run, project / "runs" / run):
            assert learner.wait(90) == 0, learner.text
        wait_until(lambda: "still serving" in relay.text, 30, (relay,))
    finally:
        for service in services:
            service.kill()
        client.close()
    assert "2001-01-01" in answers  # so the strangers were heard
    assert_kept_secret(project, answers)
    for service in (*services, *ended):
        assert_unforged(service.text)
    assert learner.text.count("\\x1b[2J") >= 2


def assert_kept_secret(project: Path, answers: str) -> None:
    """Nothing that the processes wrote or said holds a secret; what the user wrote does."""
    written = [path for path in project.rglob("*") if path.is_file() and path.name != "my.toml"]
    assert len(written) > 30
    told = {str(path): path.read_bytes() for path in written} | {"answers": answers.encode()}
    for secret in (PASSWORD, WRONG, *TOKENS.values()):
        assert [name for name, content in told.items() if secret.encode() in content] == []


def assert_unforged(text: str) -> None:
    assert not re.search(r"[^\n\t\x20-\x7e\xa0-\u2027\u202f-\uffff]", text), text
    assert not any(line.startswith("2001-01-01") for line in text.splitlines()), text
