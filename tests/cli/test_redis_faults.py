"""Rows 7 to 12 of the fault matrix: Redis loses replies, its memory, its disk or all it held.

The common criterion is the outcome of an undisturbed run, bit for bit, with nothing left unacknowledged.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
import redis

from aspo.quarantine import Quarantine
from aspo.queue import GROUP
from aspo_cli.status import fetch_status
from crashing import Outcome, Project, ends_well, nothing_is_left, run_on, run_undisturbed
from project import metrics_of, step_of
from proxy import Fault, Proxy
from scripted import ScriptedActor
from services import RedisServer, Service, wait_until

LOST = Fault(cut_at=0)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Makes redis-servers of the test's own."""
    servers: list[RedisServer] = []

    def make(*options: str) -> RedisServer:
        servers.append(RedisServer(tmp_path / f"redis-{len(servers)}", *options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", int(redis_url.rpartition(":")[2].partition("/")[0])) as proxy:
        yield proxy


def reaches(project: Project, learner: Service, step: int) -> None:
    wait_until(lambda: step_of(project.url) >= step, 60, (learner,))


def test_rollouts_whose_stores_were_not_confirmed_are_stored_and_trained_once(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str, proxy: Proxy
) -> None:
    """Row 7, the actor's side: XADD is carried out, and its reply lost."""
    proxy.inject(repeat(LOST, 6), b"XADD")
    with ScriptedActor(f"redis://127.0.0.1:{proxy.port}/0", project.run, project.runs):
        ends_well(project, project.learner(), client, undisturbed)
    assert proxy.spoilt == 6
    assert metrics_of(project.folder, project.run)[-1]["ended_duplicate"] == 0


@pytest.mark.parametrize("command", [pytest.param(b"XREADGROUP", marks=pytest.mark.faults), b"XACK"])
def test_what_the_learner_was_not_told_it_learns_and_does_once(
    project: Project,
    undisturbed: Outcome,
    client: redis.Redis,
    redis_url: str,
    proxy: Proxy,
    command: bytes,
) -> None:
    """Row 7, the learner's side: rollouts on their way to it, and the EXEC of its acknowledgement."""
    proxy.inject(repeat(LOST, 6), command)
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner(f"redis.url=redis://127.0.0.1:{proxy.port}/0")
        ends_well(project, learner, client, undisturbed)
    assert proxy.spoilt == 6
    assert "no rollout for" not in learner.text, "it waited instead of reading again"


@pytest.mark.parametrize(
    "policy", ["everysec", *(pytest.param(policy, marks=pytest.mark.faults) for policy in ("always", "off"))]
)
def test_a_killed_redis_loses_no_rollout_or_has_them_made_again(
    tmp_path: Path, own_redis: Callable[..., RedisServer], undisturbed: Outcome, run: str, policy: str
) -> None:
    """Row 8: with an append-only file nothing is lost, without one all of it; nothing is trained twice."""
    server = own_redis(*(("--appendonly", "no") if policy == "off" else ("--appendfsync", policy)))
    with run_on(tmp_path / "disturbed", run, server.url) as (project, client):
        learner = project.learner("learner.max_staleness=5")
        for losses, step in enumerate((4, 10, 16), 1):
            reaches(project, learner, step)
            server.kill()
            server.start()
            if policy == "off":
                wait_until(lambda losses=losses: f"(loss {losses})" in learner.text, 30, (learner,))
        ends_well(project, learner, client, undisturbed)
        assert client.get(f"aspo:{run}:epoch") == b"1"
        assert client.get(f"aspo:{run}:id") == (project.runs / "id").read_bytes()
    assert ("Redis has lost data" in learner.text) == (policy == "off")
    assert ("asked again for" in learner.text) == (policy == "off")


@pytest.mark.faults
def test_an_altered_rollout_is_set_aside_and_asked_for_again(
    project: Project, client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """Row 10: an entry that was edited in Redis; its task is trained later, so the plan is another."""
    stream = f"aspo:{project.run}:rollouts:scripted"
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner("learner.max_staleness=5")
        reaches(project, learner, 6)
    tasks = f"aspo:{project.run}:tasks:train"
    wait_until(lambda: client.xlen(tasks) >= 12, 30, (learner,))
    learner.process.send_signal(signal.SIGSTOP)
    with ScriptedActor(redis_url, project.run, project.runs):
        wait_until(lambda: client.xlen(tasks) == 0, 30)
        altered = alter_unread(client, stream)
        assert altered > 0
        learner.process.send_signal(signal.SIGCONT)
        assert learner.wait(120) == 0, learner.text
    assert nothing_is_left(client, project.run)
    plan = project.runs / "state" / "plan.jsonl"
    assert project.outcome() == run_undisturbed(tmp_path / "again", redis_url, plan=plan)
    kinds = [entry.kind for entry in Quarantine(client, project.run).entries()]
    assert kinds == ["undecodable: digest"] * altered


def alter_unread(client: redis.Redis, stream: str) -> int:
    """Flip a bit of every entry that the learner has not read; returns how many there were."""
    [group] = client.xinfo_groups(stream)
    unread = client.xrange(stream, min=f"({group['last-delivered-id'].decode()}")
    read = client.xrange(stream, max=group["last-delivered-id"])
    with client.pipeline(transaction=True) as pipeline:
        pipeline.delete(stream)
        for entry_id, fields in read:
            pipeline.xadd(stream, fields, id=entry_id)
        for entry_id, fields in unread:
            payload = bytearray(fields[b"group"])
            payload[-30] ^= 1
            pipeline.xadd(stream, fields | {b"group": bytes(payload)}, id=entry_id)
        pipeline.xgroup_create(stream, GROUP, id="0")
        pipeline.execute()
    return len(unread)


@pytest.mark.faults
def test_a_full_redis_is_drained_and_then_goes_on(
    tmp_path: Path, own_redis: Callable[..., RedisServer], undisturbed: Outcome, run: str
) -> None:
    """Row 11: out of memory, actors wait with what they have and the learner trains what is stored."""
    server = own_redis()
    with run_on(tmp_path / "disturbed", run, server.url) as (project, client):
        learner = project.learner("learner.max_staleness=5")
        reaches(project, learner, 6)
        client.config_set("maxmemory", 1)
        wait_until(lambda: fetch_status(project.url)["trouble"], 30, (learner,))
        assert "cannot be written to" in fetch_status(project.url)["trouble"]
        wait_until(lambda: fetch_status(project.url)["phase"] == "waiting for rollouts", 60, (learner,))
        stream = f"aspo:{run}:rollouts:scripted"
        [group] = client.xinfo_groups(stream)
        assert group["last-delivered-id"] == client.xinfo_stream(stream)["last-generated-id"]
        client.config_set("maxmemory", 0)
        ends_well(project, learner, client, undisturbed)
    before, _, after = learner.text.partition("Redis takes no writes")
    assert "no actor is alive" in before, "the scripted actor does not announce itself"
    assert "no actor is alive" not in after, "it could not have announced itself"


@pytest.mark.faults
def test_a_full_disk_under_redis_stops_nobody_for_good(
    tmp_path: Path, own_redis: Callable[..., RedisServer], undisturbed: Outcome, run: str
) -> None:
    """Row 9: the append-only file cannot grow, so Redis refuses every write, reading as a group too."""
    server = own_redis("--auto-aof-rewrite-percentage", "0")
    with run_on(tmp_path / "disturbed", run, server.url) as (project, client):
        learner = project.learner("learner.max_staleness=5")
        reaches(project, learner, 6)
        unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        wait_until(lambda: fetch_status(project.url)["trouble"], 30, (learner,))
        assert "MISCONF" in fetch_status(project.url)["trouble"]
        wait_until(lambda: "Redis takes no writes" in learner.text, 60, (learner,))
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
        ends_well(project, learner, client, undisturbed)


@pytest.mark.faults
def test_the_queue_stays_under_its_cap_while_the_learner_sleeps(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str
) -> None:
    """Row 12: actors run out of tasks, so what is stored is bounded however long the learner is away."""
    stream, tasks = f"aspo:{project.run}:rollouts:scripted", f"aspo:{project.run}:tasks:train"
    staleness, batch, cadence = 5, 4, 3
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner(f"learner.max_staleness={staleness}")
        for step in (6, 12, 18):
            reaches(project, learner, step)
            learner.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: client.xlen(tasks) == 0, 30)
            # What is trained, but not yet covered by a checkpoint, is stored beside what waits.
            assert client.xlen(stream) <= (staleness + 1 + cadence) * batch
            learner.process.send_signal(signal.SIGCONT)
        ends_well(project, learner, client, undisturbed)
    assert metrics_of(project.folder, project.run)[-1]["ended_stale"] == 0
