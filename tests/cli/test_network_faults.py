"""Rows 13 and 14 of the fault matrix: partitions, and links that are slow and lossy.

Redis, or a relay, runs in a network namespace; who speaks to it has a link of its own, on which packets are
lost in the kernel. The common criterion is the outcome of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import redis
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from aspo_cli.processes import free_port
from aspo_cli.status import fetch_status
from crashing import Outcome, Project, ends_well, run_on
from island import CUT, DIRECTIONS, Island, can_be_made
from project import step_of
from proxy import Fault, Proxy
from scripted import ScriptedActor
from services import RedisServer, Service, wait_until
from versions import FILES, tensors, version

pytestmark = pytest.mark.faults
LINKS = ("learner", "actor", "test")
SLOW = ("rate", "1mbit", "burst", "600", "limit", "600")  # one packet may wait: of a burst the rest is lost


@pytest.fixture
def island() -> Iterator[Island]:
    if not can_be_made():
        pytest.skip("network namespaces need root, iproute2 and the kernel's tbf")
    with Island(LINKS) as island:
        yield island


@contextmanager
def run_over(island: Island, folder: Path, run: str) -> Iterator[tuple[Project, redis.Redis]]:
    """A run whose Redis is on the island; learner, actor and test each reach it by a link of their own."""
    options = ("--bind", "0.0.0.0", "--protected-mode", "no")
    server = RedisServer(folder / "redis", *options, within=island.within, host=island.far("test"))
    learner, actor, test = (f"redis://{island.far(link)}:{server.port}/0" for link in LINKS)
    try:
        with run_on(folder / "disturbed", run, learner, actor_url=actor, test_url=test) as running:
            yield running
    finally:
        server.stop()


@pytest.mark.parametrize("lost", DIRECTIONS)
@pytest.mark.parametrize("who", ["learner", "actor"])
def test_who_is_cut_off_from_redis_reconnects_alone(
    tmp_path: Path, island: Island, undisturbed: Outcome, run: str, who: str, lost: str
) -> None:
    """Row 13: packets vanish, in one direction, until the learner has noticed; nobody is told of the end."""
    with run_over(island, tmp_path, run) as (project, client):
        learner = project.learner("learner.max_staleness=5")
        wait_until(lambda: step_of(project.url) >= 6, 60, (learner,))
        island.shape(who, lost, *CUT)
        if who == "learner":
            wait_until(lambda: fetch_status(project.url)["trouble"], 60, (learner,))
        else:
            wait_until(lambda: "no rollout for" in learner.text, 60, (learner,))
        assert island.lost(who, lost) > 0
        island.heal(who, lost)
        ends_well(project, learner, client, undisturbed)
        assert client.get(f"aspo:{run}:epoch") == b"1"


def test_links_that_are_slow_and_lossy_only_take_longer(
    tmp_path: Path, island: Island, undisturbed: Outcome, run: str
) -> None:
    """Row 14: 1 Mbit/s each way and hardly a queue, so that TCP sends again, after ever longer waits."""
    with run_over(island, tmp_path, run) as (project, client):
        for link, direction in ((link, each) for link in ("learner", "actor") for each in DIRECTIONS):
            island.shape(link, direction, *SLOW)
        ends_well(project, project.learner(), client, undisturbed)
        assert island.lost("actor", "requests") > 10
        assert island.lost("learner", "replies") > 10


def test_replies_that_come_late_only_take_longer(
    project: Project, undisturbed: Outcome, client: redis.Redis, redis_url: str
) -> None:
    """Row 14: every reply of Redis is held up for a while, now short, now long."""
    port, chance = urlsplit(redis_url).port or 0, random.Random(14)
    with Proxy("127.0.0.1", port) as near_learner, Proxy("127.0.0.1", port) as near_actor:
        for proxy in (near_learner, near_actor):
            proxy.inject(Fault(delay_s=chance.expovariate(100)) for _ in count())
        with ScriptedActor(f"redis://127.0.0.1:{near_actor.port}/0", project.run, project.runs):
            learner = project.learner(f"redis.url=redis://127.0.0.1:{near_learner.port}/0")
            ends_well(project, learner, client, undisturbed)
    assert min(near_learner.spoilt, near_actor.spoilt) > 100


@pytest.mark.parametrize("lost", DIRECTIONS)
def test_who_is_cut_off_from_the_learner_serves_what_it_has_and_catches_up(
    tmp_path: Path, island: Island, lost: str
) -> None:
    """Row 13, weights: a relay, on the island, follows them as actors do."""
    auth = AuthConfig(actor_token=SecretStr("secret"))
    store, port = WeightStore(tmp_path / "weights"), free_port()
    app = create_app("learner", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, Leases()))
    app.include_router(blob_routes(store.blobs))
    request = Request(
        f"http://{island.far('test')}:{port}/v1/weights", headers={"Authorization": "Bearer secret"}
    )

    def relayed() -> str | None:
        try:
            with urlopen(request, timeout=5) as answer:
                live: str | None = json.load(answer)["live"]
                return live
        except OSError:
            return None

    with Server(app, listen(island.near("learner"), 0, auth)) as server:
        store.put(version(0), tensors(0), FILES)
        relay = Service(
            tmp_path, "relay", "relay", "--learner", server.url, "--host", "0.0.0.0", "--port", str(port),
            environment={"ASPO_TOKEN": "secret"}, within=island.within,
        )  # fmt: skip
        try:
            wait_until(lambda: relayed() == str(version(0)), 60, (relay,))
            island.shape("learner", lost, *CUT)
            for step in (1, 2):
                store.put(version(step), tensors(step), FILES)
            wait_until(lambda: island.lost("learner", lost) > 5, 60, (relay,))
            assert relayed() == str(version(0))
            island.heal("learner", lost)
            wait_until(lambda: relayed() == str(version(2)), 60, (relay,))
        finally:
            relay.kill()
