"""The users that are shipped for Redis: each role can do all of its work, and nothing else."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from aspo.fence import Fence
from aspo.hello import heard, say
from aspo.preflight import preflight
from aspo.presence import ActorStatus, announce, present, withdraw
from aspo.quarantine import Quarantine
from aspo.queue import QueueError, RolloutReader, RolloutWriter, TaskQueue, connect
from aspo.schemas import Hello, Task
from aspo_cli.processes import find_redis_server, free_port, redis_command
from aspo_learner.identity import claim_run
from models import save_model
from rollouts import write_config
from services import Service, redis_server

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"
As = Callable[[str], redis.Redis]
EVERYONE = (
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG GET *",
    "KEYS *",
    "SCAN 0",
    "ACL LIST",
    "EVAL return 0",
    "SHUTDOWN",
    "MONITOR",
    "GET other:key",
    "DEL other:key",
    "PUBLISH aspo:r:x y",
)
ACTOR = (
    "GET aspo:r:lease",
    "SET aspo:r:lease mine",
    "SET aspo:r:epoch 9",
    "INCR aspo:r:epoch",
    "DEL aspo:r:epoch",
    "DEL aspo:r:id",
    "SET aspo:r:id mine",
    "XADD aspo:r:quarantine * a b",
    "XRANGE aspo:r:quarantine - +",
    "XDEL aspo:r:quarantine 1-1",
    "XTRIM aspo:r:rollouts:a MAXLEN 0",
    "XGROUP DESTROY aspo:r:rollouts:a aspo",
)
ACTOR_7 = (
    "XACK aspo:r:rollouts:a aspo 1-1",
    "XDEL aspo:r:rollouts:a 1-1",
    "DEL aspo:r:rollouts:a",
    "SET aspo:r:rollouts:a x",
    "XREADGROUP GROUP aspo learner STREAMS aspo:r:rollouts:a >",
    "XADD aspo:r:tasks:train * task x",
    "DEL aspo:r:tasks:train",
    "SREM aspo:r:rollout-streams aspo:r:rollouts:a",
    "SET aspo:r:incarnation 0",
    "SET aspo:r:hello x",
)
READER = (
    "XDEL aspo:r:quarantine 1-1",
    "XADD aspo:r:quarantine * a b",
    "XTRIM aspo:r:quarantine MAXLEN 0",
    "XRANGE aspo:r:rollouts:a - +",
    "GET aspo:r:epoch",
    "SMEMBERS aspo:r:actors",
    "MULTI",
)


def redis_major() -> int:
    text = subprocess.run(
        [find_redis_server(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"v=(\d+)\.", text)
    assert found is not None
    return int(found[1])


@pytest.fixture(
    scope="module",
    params=[
        "users.acl",
        pytest.param(
            "users-7.acl", marks=pytest.mark.skipif(redis_major() < 7, reason="selectors came with Redis 7")
        ),
    ],
)
def acl(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def url(acl: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis with the shipped users; each role's password is its name."""
    folder = tmp_path_factory.mktemp("acl")
    text = (DEPLOY / acl).read_text()
    for role in ("admin", "learner", "actor", "reader"):
        text = text.replace(f"@{role.upper()}@", hashlib.sha256(role.encode()).hexdigest())
    (folder / "users.acl").write_text(text)
    with redis_server(folder, "--aclfile", str(folder / "users.acl")) as found:
        yield found


@pytest.fixture
def connected(url: str) -> Iterator[As]:
    clients: list[redis.Redis] = []

    def connect_as(role: str) -> redis.Redis:
        clients.append(connect(url.replace("//", f"//{role}:{role}@")))
        return clients[-1]

    yield connect_as
    for client in clients:
        client.close()


def test_each_role_can_do_all_of_its_work(connected: As, run: str, tmp_path: Path) -> None:
    admin, learner, actor = (connected(role) for role in ("admin", "learner", "actor"))
    admin.acl_log_reset()
    _queue_protocol(learner, actor, run)
    claim_run(learner, run, tmp_path)
    fence = Fence.acquire(learner, run, tmp_path)
    assert fence.execute(lambda pipeline: pipeline.get(f"aspo:{run}:epoch")) == [b"1"]
    hello = Hello(tokenizer="", settings={})
    say(fence, run, hello)
    assert heard(actor, run) == hello
    fence.release()
    assert not admin.exists(f"aspo:{run}:lease")
    status = ActorStatus(id="a", run=run, url="", state="sampling", version="")
    announce(actor, status, ttl_s=10)
    announce(actor, status.model_copy(update={"id": "b"}), ttl_s=10)
    withdraw(actor, run, "a")
    admin.delete(f"aspo:{run}:actor:b")  # as its time to live does
    assert present(learner, run) == []
    quarantine = Quarantine(learner, run)
    [entry] = Quarantine(connected("reader"), run).entries()
    quarantine.requeue(entry.id)
    assert quarantine.purge() == quarantine.purge(older_s=1) == 0
    # redis-py tells Redis its name, and does not mind being refused.
    assert [entry for entry in admin.acl_log() if entry["object"] not in ("client", "client|setinfo")] == []


def _queue_protocol(learner: redis.Redis, actor: redis.Redis, run: str) -> None:
    asked, taken = TaskQueue(learner, run), TaskQueue(actor, run, lease_s=3600)
    for purpose in ("train", "eval"):
        asked.reset(purpose)  # type: ignore[arg-type]
    common = {"purpose": "train", "prompt_ids": [1], "group_size": 1, "max_tokens": 1, "temperature": 1.0}
    asked.put(Task(uid=f"{i}", index=i, reward_inputs={}, **common) for i in range(2))  # type: ignore[arg-type]
    claims = taken.claim("a", count=2, block_ms=1)
    taken.renew("a", claims)
    taken.hand_back("a", claims[1:])
    assert [claim.task.index for claim in taken.claim("b", count=1)] == [1]
    writer = RolloutWriter(actor, run, "a")
    for claim in claims:
        writer.put(claim.task.uid, b"payload")
    writer._sent -= 1
    writer.put("1", b"payload")  # a retry, which looks whether it had been stored
    taken.finish(claims)
    assert (asked.depth()["train"], asked.next_index("train")) == (0, 2)
    reader = RolloutReader(learner, run)
    deliveries = reader.read(count=10)
    reader.quarantine(deliveries[0], "nan-logprob", max_bytes=100)
    reader.replay()
    assert reader.read(count=10) == deliveries
    reader.acknowledge(deliveries)
    assert reader.depth() == 0
    assert reader.forget(()) == 1


def test_a_learner_can_hold_a_lease_and_fence_by_it(connected: As, run: str) -> None:
    learner, key = connected("learner"), f"aspo:{run}:lease"
    assert learner.set(key, "me", px=60_000, nx=True)
    with learner.pipeline() as pipeline:
        pipeline.watch(key)
        assert pipeline.get(key) == b"me"
        pipeline.multi()
        pipeline.pexpire(key, 60_000)
        pipeline.xack(f"aspo:{run}:rollouts:a", "aspo", "1-1")
        assert pipeline.execute() == [True, 0]
    learner.delete(key)


@pytest.mark.parametrize(
    ("role", "commands"),
    [("learner", EVERYONE), ("actor", EVERYONE + ACTOR), ("reader", EVERYONE + READER)],
    ids=["learner", "actor", "reader"],
)
def test_all_else_is_refused(connected: As, acl: str, role: str, commands: tuple[str, ...]) -> None:
    client = connected(role)
    if acl == "users-7.acl" and role == "actor":
        commands += ACTOR_7
    for command in commands:
        words = ["EVAL", "return 0", "0"] if command.startswith("EVAL") else command.split()
        with pytest.raises(NoPermissionError):
            client.execute_command(*words)


def test_nobody_comes_in_without_a_password(url: str) -> None:
    for user in ("", "learner:wrong@", "default:@"):
        with pytest.raises(QueueError, match="refused the password"):
            connect(url.replace("//", f"//{user}"))


def test_a_redis_whose_passwords_are_not_set_does_not_start(acl: str, tmp_path: Path) -> None:
    command = [*redis_command(tmp_path, free_port()), "--aclfile", str(DEPLOY / acl)]
    started = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert started.returncode != 0
    assert "ACL" in started.stdout


def test_preflight_is_content_with_each_role(url: str, tmp_path: Path) -> None:
    for role in ("learner", "actor"):
        config = write_config(tmp_path, model="m", redis_url=url.replace("//", f"//{role}:{role}@"))
        assert preflight(role, config) == []  # type: ignore[arg-type]


def test_the_wrong_user_is_told_plainly(url: str, tmp_path: Path, run: str) -> None:
    write_config(tmp_path, model="m", run=run, redis_url=url.replace("//", "//reader:reader@"))
    purge = Service(tmp_path, "quarantine", "purge", "--config", "config.toml", "--all", "--yes")
    assert purge.wait(60) == 2
    assert "use the user `learner` to requeue and purge" in purge.text
    save_model(tmp_path / "model", hidden_size=32, layers=1)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = ("--set", f"model.path={tmp_path}/model", "--set", f"data.path={tmp_path}/prompts.jsonl")
    learner = Service(tmp_path, "learner", "--config", "config.toml", *settings)
    try:
        assert learner.wait(90) == 2, learner.text
    finally:
        learner.kill()
    assert "Redis denies the user of redis.url a command" in learner.text
    assert "Traceback" not in purge.text + learner.text
