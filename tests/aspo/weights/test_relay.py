"""A relay over real sockets: actors behind it follow the learner's versions and never ask the learner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from aspo.config import AuthConfig, HttpConfig
from aspo.http import url_of
from aspo.weights.client import Mirror, WeightClient
from aspo.weights.relay import Relay
from aspo.weights.store import WeightStore
from versions import FILES, tensors, version

Serve = Callable[..., str]


@pytest.fixture
async def relay(serve: Serve, tmp_path: Path) -> AsyncIterator[Relay]:
    relay = Relay(serve(), tmp_path / "relay", AuthConfig(), HttpConfig())
    running = asyncio.create_task(relay.run())
    yield relay
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def follow(client: WeightClient, mirror: Mirror, step: int) -> str:
    async with asyncio.timeout(20):
        while True:
            plan = await client.latest(have=mirror.version, wait_s=10)
            if plan is None or plan.manifest.policy_version.step < step:
                await asyncio.sleep(0.01)
                continue
            await mirror.follow(plan)
            expected = tensors(step)
            assert all(torch.equal(mirror.state.tensors[name], expected[name]) for name in expected)
            return plan.kind


async def test_actors_behind_a_relay_follow_by_deltas(
    store: WeightStore, relay: Relay, tmp_path: Path
) -> None:
    store.put(version(0), tensors(0), FILES)
    async with WeightClient(url_of(relay.place.listener), tmp_path / "cache") as client:
        mirror = Mirror(client)
        assert await follow(client, mirror, 0) == "snapshot"
        for step in (1, 2, 3):
            await asyncio.to_thread(store.put, version(step), tensors(step), FILES)
            assert await follow(client, mirror, step) == "delta"


async def test_a_late_actor_and_a_long_run_are_served_too(
    store: WeightStore, relay: Relay, tmp_path: Path
) -> None:
    async with WeightClient(url_of(relay.place.listener), tmp_path / "cache") as client:
        mirror = Mirror(client)
        for step in range(40):
            await asyncio.to_thread(store.put, version(step), tensors(step), FILES)
            if step % 8 == 7:
                await follow(client, mirror, step)
    async with WeightClient(url_of(relay.place.listener), tmp_path / "late") as late:
        kind = await follow(late, Mirror(late), 39)
        assert kind in ("snapshot", "snapshot+deltas")
    assert len(list((tmp_path / "relay/manifests").iterdir())) < 40, "the relay collects, too"


async def test_a_relay_follows_a_rollback(store: WeightStore, relay: Relay, tmp_path: Path) -> None:
    for step in range(3):
        store.put(version(step), tensors(step), FILES)
    async with WeightClient(url_of(relay.place.listener), tmp_path / "cache") as client:
        mirror = Mirror(client)
        await follow(client, mirror, 2)
        store.roll_back(version(1))
        async with asyncio.timeout(20):
            while mirror.version != "r/1/1":
                plan = await client.latest(have=mirror.version, wait_s=10)
                if plan is not None:
                    await mirror.follow(plan)
        assert torch.equal(mirror.state.tensors["embed"], tensors(1)["embed"])


async def test_a_restarted_relay_serves_what_it_has(store: WeightStore, relay: Relay, tmp_path: Path) -> None:
    store.put(version(0), tensors(0), FILES)
    async with WeightClient(url_of(relay.place.listener), tmp_path / "cache") as client:
        await follow(client, Mirror(client), 0)
    again = Relay("http://127.0.0.1:1", tmp_path / "relay", AuthConfig(), HttpConfig())
    running = asyncio.create_task(again.run())
    async with WeightClient(url_of(again.place.listener), tmp_path / "cache2") as client:
        await follow(client, Mirror(client), 0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
