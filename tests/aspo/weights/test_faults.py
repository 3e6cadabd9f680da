"""Rows 17 and 18 of the fault matrix: spoilt downloads, learners killed at any moment; jumps, too."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import repeat
from pathlib import Path

import aiohttp
import pytest

from aspo.schemas import PolicyVersion
from aspo.weights.client import Mirror, WeightClient
from aspo.weights.manifest import Transfer, WeightsError, state_digest
from aspo.weights.state import describe
from aspo.weights.store import MERGE, WeightStore
from proxy import Fault, Proxy
from publishing import KEEP, SNAPSHOT_EVERY, content, start
from versions import FILES, follow, version

Serve = Callable[..., str]


@functools.cache
def published(name: str) -> str:
    """The digest of what `content` gives for a name."""
    return state_digest(describe(content(PolicyVersion.parse(name))))


def held(mirror: Mirror) -> str:
    """The digest of what a mirror holds, computed anew."""
    return state_digest(describe(mirror.state.tensors))


def put(store: WeightStore, step: int, epoch: int = 1) -> str:
    named = version(step, epoch)
    store.put(named, content(named), FILES)
    return str(named)


def span(transfer: Transfer) -> int:
    """Steps that a transfer leads over, 0 for a snapshot."""
    steps = [PolicyVersion.parse(name).step for name in (transfer.base, transfer.version) if name]
    return steps[-1] - steps[0]


@pytest.fixture
async def proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    monkeypatch.setattr("aspo.weights.client._TIMEOUT", aiohttp.ClientTimeout(total=None, sock_read=0.5))
    async with Proxy("127.0.0.1", int(serve().rsplit(":", 1)[1])) as proxy:
        yield proxy


@pytest.fixture
async def puller(proxy: Proxy, tmp_path: Path) -> AsyncIterator[WeightClient]:
    async with WeightClient(proxy.url, tmp_path / "cache", name="actor") as client:
        yield client


def random_faults(draw: random.Random, size: int) -> Iterator[Fault]:
    """Faults of answers of about `size` bytes, most of which spoil them."""
    while True:
        at = draw.randrange(size)
        yield draw.choice(
            [
                Fault(cut_at=at),
                Fault(flip_at=at, mask=1 << draw.randrange(8)),
                Fault(flip_at=at // 2, cut_at=at),
                Fault(delay_s=0.02, bytes_per_s=2e5),
            ]
        )


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(0, 25), *(pytest.param(seed, 250, marks=pytest.mark.faults) for seed in (1, 2))],
)
async def test_a_spoilt_download_leaves_the_old_version_or_the_new(
    store: WeightStore,
    proxy: Proxy,
    puller: WeightClient,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    steps: int,
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 2)
    draw, mirror, failed = random.Random(seed), Mirror(puller), 0
    put(store, 0)
    await follow(puller, mirror)
    for step in range(1, steps):
        old, new = mirror.version, put(store, step)
        plan = store.plan(version(step), old)
        assert plan is not None
        faults = random_faults(draw, plan.size + 300)
        proxy.inject(next(faults) for _ in range(draw.randrange(1, 5)))
        try:
            await follow(puller, mirror)
        except WeightsError:
            failed += 1
        assert mirror.version in (old, new)
        assert held(mirror) == published(str(mirror.version))
    assert 0 < failed < steps - 1
    proxy.heal()
    await follow(puller, mirror)
    assert mirror.version == str(version(steps - 1))
    assert held(mirror) == published(str(mirror.version))
    assert all(re.fullmatch("[0-9a-f]{64}", path.name) for path in puller.cache.folder.iterdir())


@pytest.mark.parametrize(
    "fault", [Fault(cut_at=0), Fault(flip_at=400), Fault(swallow=True)], ids=["cut", "flipped", "swallowed"]
)
async def test_retries_are_bounded_and_leave_the_version_in_place(
    store: WeightStore, proxy: Proxy, puller: WeightClient, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 3)
    mirror = Mirror(puller)
    put(store, 0)
    await follow(puller, mirror)
    put(store, 1)
    proxy.inject(repeat(fault), b"/v1/blobs/")
    asked = len(proxy.requests)
    with pytest.raises(WeightsError, match=r"/v1/blobs/.* \(after 3 tries\)|asked 3 times"):
        await follow(puller, mirror)
    blobs = [request for request in proxy.requests[asked:] if b"/v1/blobs/" in request]
    assert puller.stats.retries == 2
    assert 3 <= len(blobs) <= 6, "a connection found closed when it is used again is opened anew, unasked"
    assert (mirror.version, held(mirror)) == ("r/1/0", published("r/1/0"))
    proxy.heal()
    assert await follow(puller, mirror) == "delta"
    assert held(mirror) == published("r/1/1")


async def test_a_link_that_breaks_every_time_gets_there_and_carries_nothing_twice(
    store: WeightStore, proxy: Proxy, puller: WeightClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 3)
    received: list[int] = []
    puller.on_bytes = received.append
    put(store, 0)
    proxy.inject(repeat(Fault(cut_at=3000)), b"/v1/blobs/")
    mirror, failed = Mirror(puller), 0
    while mirror.version is None:
        try:
            await follow(puller, mirror)
        except WeightsError:
            failed += 1
    assert held(mirror) == published("r/1/0")
    assert failed >= 2
    assert sum(received) == puller.stats.last_bytes


async def test_a_hundred_versions_and_any_jump_between_them_arrive_bit_for_bit(
    tmp_path: Path, serve: Serve, store: WeightStore
) -> None:
    """One mirror follows every version; the others jump between kept ones, back and forth."""
    store._keep, store._snapshot_every = 200, 16
    draw, epochs = random.Random(0), {0: 1, 37: 2, 71: 3}
    digests: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    merged = 0
    async with WeightClient(serve(), tmp_path / "cache") as client:
        first, others = Mirror(client), [Mirror(client) for _ in range(5)]
        for step in range(100):
            named = version(step, max(epoch for begin, epoch in epochs.items() if begin <= step))
            digests[str(named)] = store.put(named, content(named), FILES).state_digest
            await follow(client, first)
            assert (first.version, held(first)) == (str(named), digests[str(named)])
        for _ in range(30):
            target = draw.choice(list(digests))
            store.roll_back(PolicyVersion.parse(target))
            for mirror in draw.sample(others, 3):
                plan = await client.latest(have=mirror.version)
                if plan is None:
                    continue
                await mirror.follow(plan)
                assert (mirror.version, held(mirror)) == (target, digests[target])
                kinds[plan.kind] += 1
                merged += any(span(transfer) == MERGE for transfer in plan.transfers)
    assert kinds.keys() == {"snapshot", "delta", "snapshot+deltas"}
    assert merged > 0


class Learners:
    """One learner after another over one folder, each killed, and a client that follows through it all."""

    def __init__(self, folder: Path, run: str, redis_url: str, proxy: Proxy, client: WeightClient) -> None:
        self.folder, self._run, self._redis_url, self._proxy = folder, run, redis_url, proxy
        self._client, self.mirror = client, Mirror(client)
        self.followed: dict[str, str] = {}
        self.epoch = 0

    async def follow(self) -> None:
        """Follow for ever; what the mirror holds is always what was published under its version's name."""
        while True:
            try:
                plan = await self._client.latest(have=self.mirror.version, wait_s=1.0)
                if plan is not None:
                    await self.mirror.follow(plan)
            except WeightsError:
                await asyncio.sleep(0.01)  # between two learners
                continue
            name = str(self.mirror.version)
            assert held(self.mirror) == published(name)
            self.followed[name] = published(name)

    async def live_and_die(self, *, die_at: int = 0, after_s: float = 0.0) -> None:
        """Start a learner and see it die: by itself at a change of a file, or so long after it published."""
        process, pipe = start(self.folder, self._run, self._redis_url, die_at)
        try:
            with contextlib.suppress(EOFError):  # dead before it served or published
                epoch, port = await asyncio.to_thread(pipe.recv)
                assert epoch > self.epoch
                self.epoch, self._proxy.target = epoch, ("127.0.0.1", port)
                while die_at:
                    await asyncio.to_thread(pipe.recv)
                await asyncio.to_thread(pipe.recv)
            await asyncio.sleep(after_s)
        finally:
            process.kill()
            process.join()
            pipe.close()
        assert process.exitcode == -signal.SIGKILL

    def check(self) -> None:
        """What the dead learner left opens, is whole, and is what was published."""
        store = WeightStore(self.folder)
        assert store.left_out == []
        for kept in store.versions():
            store.verify(kept)
            manifest = store.manifest(kept)
            assert manifest is not None
            assert manifest.state_digest == published(str(kept))


@pytest.fixture
async def learners(
    tmp_path: Path, run: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Learners]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the server that forks the learners
    monkeypatch.setattr(
        "aspo.weights.client.RETRIES", 1
    )  # `follow` asks again, lest it rests while one lives
    async with Proxy("127.0.0.1", 1) as proxy, WeightClient(proxy.url, tmp_path / "c", name="a") as client:
        learners = Learners(tmp_path / "weights", run, redis_url, proxy, client)
        following = asyncio.create_task(learners.follow())
        yield learners
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


@pytest.mark.parametrize(("seed", "kills"), [(0, 20), pytest.param(1, 100, marks=pytest.mark.faults)])
async def test_learners_killed_at_any_moment_leave_only_whole_versions(
    learners: Learners, seed: int, kills: int
) -> None:
    draw = random.Random(seed)
    for kill in range(kills):
        if kill % 2:
            await learners.live_and_die(after_s=draw.uniform(0.0, 0.2))
        else:
            await learners.live_and_die(die_at=draw.randrange(1, 100))
        learners.check()
    assert len(learners.followed) > kills
    assert_tidied_by_the_next(learners)


@pytest.mark.faults
async def test_a_learner_killed_before_each_change_of_a_file_leaves_only_whole_versions(
    learners: Learners,
) -> None:
    await learners.live_and_die(die_at=150)
    for change in range(1, 120):
        await learners.live_and_die(die_at=change)
        learners.check()
    assert_tidied_by_the_next(learners)


def assert_tidied_by_the_next(learners: Learners) -> None:
    """The next publication leaves nothing in the folder but what its versions are made of."""
    store = WeightStore(learners.folder, keep=KEEP, snapshot_every=SNAPSHOT_EVERY)
    newest = store.newest()
    assert newest is not None
    named = PolicyVersion(run=newest.run, epoch=learners.epoch + 1, step=newest.step)
    store.put(named, content(named), FILES)
    manifests = [store.manifest(kept) for kept in store.versions()]
    transfers = [transfer for kept in store.versions() for transfer in store.transfers(kept)]
    blobs = {ref.digest for transfer in transfers for ref in transfer.blobs}
    blobs |= {ref.digest for manifest in manifests if manifest for ref in manifest.files.values()}
    assert {path.name for path in learners.folder.iterdir()} == {"blobs", "live", "manifests", "transfers"}
    assert {path.name for path in store.blobs.folder.iterdir()} == blobs
    assert len(list((learners.folder / "manifests").iterdir())) == len(manifests)
    assert len(list((learners.folder / "transfers").iterdir())) == len(transfers)
