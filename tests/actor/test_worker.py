"""The worker over a real Redis, with a stub in the engine's place: order, drain, hand back, outages.

The real engine is tested in test_engine.py and in tests/cli/test_end_to_end.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from aspo.codec import decode_group
from aspo.config import Config, RewardConfig
from aspo.presence import ActorStatus, announce, present, withdraw
from aspo.queue import RolloutReader, TaskQueue
from aspo.schemas import Task, VersionSpan
from aspo_actor.completion import Completion
from aspo_actor.errors import EngineError
from aspo_actor.rewards.scorer import Scorer
from aspo_actor.worker import Worker
from rollouts import write_config


class StubEngine:
    """Answers every request with the same two tokens, once `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests = 0
        self.healthy, self.recoverable = True, False

    def text_of(self, token_ids: Sequence[int]) -> str:
        return "1+2="

    async def sample(self, prompt_ids: Sequence[int], *, n: int, **options: Any) -> list[Completion]:
        self.requests += 1
        await self.gate.wait()
        if self.recoverable:
            raise EngineError("damaged")
        completion = Completion(
            token_ids=np.array([5, 1], dtype=np.int32),
            logprobs=np.array([-0.5, -0.25], dtype=np.float32),
            spans=(VersionSpan("test/1/0", 2),),
            finish_reason="stop",
            text="3",
        )
        return [completion] * n


class StubSync:
    """Is at the wanted version once `arrived` is set."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()

    async def wait_for(self, version: str) -> None:
        await self.arrived.wait()


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(RewardConfig(concurrency=1), ["answer"]) as scorer:
        yield scorer


@pytest.fixture
def config(tmp_path: Path, run: str, redis_url: str) -> Config:
    return write_config(
        tmp_path,
        model="m",
        run=run,
        redis_url=redis_url,
        overrides=["actor.max_samples=8", "redis.task_lease_s=60"],
    )


def make_worker(config: Config, client: redis.Redis, scorer: Scorer, engine: Any, sync: Any = None) -> Worker:
    return Worker(config, "actor", client, engine, scorer, sync or StubSync())


def put_tasks(client: redis.Redis, run: str, count: int, **changes: Any) -> TaskQueue:
    queue = TaskQueue(client, run)
    tasks = [
        Task(
            uid=f"{run}:train:{i}",
            index=i,
            purpose="train",
            prompt_ids=[2, 3],
            group_size=4,
            max_tokens=6,
            temperature=1.0,
            reward_inputs={"answer": "3"},
            **changes,
        )
        for i in range(count)
    ]
    queue.put(tasks)
    return queue


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the worker announces nothing
            await asyncio.sleep(0.01)


async def test_a_damaged_engine_hands_its_tasks_back_and_takes_none(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    queue, engine = put_tasks(client, run, 3), StubEngine()
    worker = make_worker(config, client, scorer, engine)
    engine.gate.clear()
    working = asyncio.create_task(worker.run())
    await until(lambda: worker.in_flight == 2)
    engine.healthy, engine.recoverable = False, True
    engine.gate.set()
    await until(lambda: queue.depth()["train"] == 3 and worker.in_flight == 0)
    assert worker.groups == 0
    engine.healthy, engine.recoverable = True, False
    await until(lambda: worker.groups == 3)
    await worker.drain(5.0)
    await working


async def test_every_task_becomes_one_stored_group(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    queue = put_tasks(client, run, 10)
    worker = make_worker(config, client, scorer, StubEngine())
    working = asyncio.create_task(worker.run())
    await until(lambda: worker.groups == 10)
    await worker.drain(5)
    await working
    groups = [decode_group(d.payload) for d in RolloutReader(client, run).read(count=100)]
    assert sorted(group.uid for group in groups) == sorted(f"{run}:train:{i}" for i in range(10))
    assert all((group.rewards == 1).all() and len(group) == 4 for group in groups)
    assert queue.depth()["train"] == 0
    assert worker.tokens == 10 * 4 * 2


async def test_a_worker_goes_on_when_redis_has_lost_its_tasks(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    """Row 8, the actor's side: it holds one task when all is lost, and takes those asked for again."""
    engine = StubEngine()
    engine.gate.clear()
    put_tasks(client, run, 1)
    worker = make_worker(config, client, scorer, engine)
    working = asyncio.create_task(worker.run())
    await until(lambda: engine.requests == 1)
    client.delete(*client.keys(f"aspo:{run}:*"))
    engine.gate.set()
    await until(lambda: worker.groups == 1)
    await until(lambda: client.exists(f"aspo:{run}:tasks:train"))
    put_tasks(client, run, 3)
    await until(lambda: worker.groups == 4)
    await worker.drain(5)
    await working
    uids = {
        group.uid for group in (decode_group(d.payload) for d in RolloutReader(client, run).read(count=9))
    }
    assert uids == {f"{run}:train:{i}" for i in range(3)}


async def test_no_more_is_claimed_than_the_engine_has_places_for(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    put_tasks(client, run, 10)
    engine = StubEngine()
    engine.gate.clear()
    worker = make_worker(config, client, scorer, engine)
    working = asyncio.create_task(worker.run())
    await until(lambda: engine.requests == 2)
    await asyncio.sleep(0.1)
    assert worker.in_flight == 2
    engine.gate.set()
    await worker.drain(5)
    await working


async def test_what_is_not_done_within_the_grace_is_handed_back(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    queue = put_tasks(client, run, 2)
    engine = StubEngine()
    engine.gate.clear()
    worker = make_worker(config, client, scorer, engine)
    working = asyncio.create_task(worker.run())
    await until(lambda: engine.requests == 2)
    await worker.drain(0.1)
    await working
    assert RolloutReader(client, run).read(count=10) == []
    assert sorted(claim.task.index for claim in queue.claim("other", count=10)) == [0, 1]


async def test_a_task_waits_for_the_version_it_asks_for(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    put_tasks(client, run, 1, min_version=f"{run}/1/3")
    engine, sync = StubEngine(), StubSync()
    worker = make_worker(config, client, scorer, engine, sync)
    working = asyncio.create_task(worker.run())
    await until(lambda: worker.in_flight == 1)
    await asyncio.sleep(0.05)
    assert engine.requests == 0
    sync.arrived.set()
    await until(lambda: worker.groups == 1)
    await worker.drain(5)
    await working


async def test_an_engine_fault_ends_the_worker_and_leaves_the_task(
    config: Config, client: redis.Redis, run: str, scorer: Scorer
) -> None:
    class Broken(StubEngine):
        async def sample(self, prompt_ids: Sequence[int], *, n: int, **options: Any) -> list[Completion]:
            raise RuntimeError("engine is gone")

    queue = put_tasks(client, run, 1)
    with pytest.raises(RuntimeError, match="engine is gone"):
        await make_worker(config, client, scorer, Broken()).run()
    assert queue.depth()["train"] == 1


def test_presence_ends_with_the_last_heartbeat(client: redis.Redis, run: str) -> None:
    first, second = (ActorStatus(id=i, run=run, url="u", state="sampling", version="v") for i in "ab")
    announce(client, first, ttl_s=60)
    announce(client, second, ttl_s=60)
    assert [actor.id for actor in present(client, run)] == ["a", "b"]
    client.pexpire(f"aspo:{run}:actor:a", 0)
    assert [actor.id for actor in present(client, run)] == ["b"]
    withdraw(client, run, "b")
    assert present(client, run) == []
