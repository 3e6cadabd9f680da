"""The client and its mirror over real sockets: resumed, verified, whole or not at all, peers included."""

from __future__ import annotations

import asyncio
import gzip
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import SecretStr
from safetensors.torch import load_file

from aspo.config import AuthConfig
from aspo.weights import state as state_module
from aspo.weights.client import Mirror, VersionGone, WeightClient, export
from aspo.weights.leases import Leases
from aspo.weights.manifest import WeightsError
from aspo.weights.store import WeightStore
from versions import FILES, follow, tensors, version

Serve = Callable[..., str]


def same(mirror: Mirror, step: int) -> bool:
    expected = tensors(step)
    found = mirror.state.tensors
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


async def test_a_mirror_follows_by_deltas_bit_for_bit(store: WeightStore, puller: WeightClient) -> None:
    mirror = Mirror(puller)
    kinds = []
    for step in range(9):
        store.put(version(step), tensors(step), FILES)
        kinds.append(await follow(puller, mirror))
        assert same(mirror, step)
    assert kinds == ["snapshot"] + ["delta"] * 8
    assert puller.stats.plans == {"snapshot": 1, "delta": 8}
    assert puller.stats.last_bytes < sum(t.nbytes for t in tensors(0).values())


async def test_random_jumps_arrive_bit_for_bit(tmp_path: Path, serve: Serve, store: WeightStore) -> None:
    store._keep = 100
    url, draw = serve(), random.Random(0)
    step = 0
    async with WeightClient(url, tmp_path / "cache") as client:
        mirror = Mirror(client)
        for _ in range(8):
            for _ in range(draw.choice([1, 2, 5, 9, 17])):
                store.put(version(step), tensors(step), FILES)
                step += 1
            await follow(client, mirror)
            assert same(mirror, step - 1)
        for back in (step - 3, 1, step - 2):
            store.roll_back(version(back))
            await follow(client, mirror)
            assert same(mirror, back)


async def test_an_update_says_what_changed_since_the_version_before(
    store: WeightStore, puller: WeightClient
) -> None:
    mirror = Mirror(puller)
    store.put(version(0), tensors(0), FILES)
    await follow(puller, mirror)
    for step in (1, 2, 3):
        store.put(version(step), tensors(step), FILES)
    plan = await puller.latest(have=mirror.version)
    assert plan is not None
    update = await mirror.follow(plan)
    assert (update.base, update.version) == ("r/1/0", "r/1/3")
    assert puller.stats.versions_behind == 3
    old, new = tensors(0), tensors(3)
    for name, (positions, values) in update.changes.items():
        if positions is None:
            assert torch.equal(values, new[name])
            continue
        differing = (old[name] != new[name]).reshape(-1).nonzero().reshape(-1)
        assert set(differing.tolist()) <= set(positions.tolist())
        assert torch.equal(values, new[name].reshape(-1)[torch.from_numpy(positions)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
async def test_an_export_loads_bit_for_bit(
    store: WeightStore, puller: WeightClient, dtype: torch.dtype, tmp_path: Path
) -> None:
    for step in range(3):
        store.put(version(step), tensors(step, dtype), FILES)
    await export(puller, await puller.plan("r/1/2"), tmp_path / "model")
    loaded = load_file(tmp_path / "model/model.safetensors")
    for name, tensor in tensors(2, dtype).items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)
    assert (tmp_path / "model/config.json").read_bytes() == b"{}"


async def test_large_versions_are_exported_with_an_index(
    store: WeightStore, puller: WeightClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(state_module, "MAX_BLOB_BYTES", 5000)
    for step in range(2):
        store.put(version(step), tensors(step), FILES)
    mirror = await export(puller, await puller.plan("r/1/1"), tmp_path / "model")
    assert same(mirror, 1)
    assert sorted(p.name for p in (tmp_path / "model").glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


class Cut:
    """Answers the first request for a blob with a part of it, then closes the connection."""

    def __init__(self) -> None:
        self.ranges: list[str | None] = []

    def __call__(self, app: FastAPI) -> None:
        @app.middleware("http")
        async def cut(request: Request, call_next: Callable[..., object]) -> object:
            if "/blobs/" not in request.url.path:
                return await call_next(request)  # type: ignore[misc]
            self.ranges.append(request.headers.get("range"))
            response = await call_next(request)  # type: ignore[misc]
            if len(self.ranges) > 1:
                return response
            body = b"".join([chunk async for chunk in response.body_iterator])  # type: ignore[attr-defined]
            return Response(body[: len(body) // 2], headers={"content-length": str(len(body) // 2)})


async def test_a_cut_download_goes_on_where_it_stopped(
    store: WeightStore, serve: Serve, tmp_path: Path
) -> None:
    store.put(version(0), tensors(0), FILES)
    cut = Cut()
    async with WeightClient(serve(spoil=cut), tmp_path / "cache") as client:
        plan = await client.latest()
        assert plan is not None
        await client.pull(plan)
    assert cut.ranges == [None, f"bytes={plan.transfers[0].blobs[0].size // 2}-"]
    assert client.stats.retries == 1


def flip(app: FastAPI) -> None:
    """Flip a bit of every blob."""

    @app.middleware("http")
    async def spoil(request: Request, call_next: Callable[..., object]) -> object:
        response = await call_next(request)  # type: ignore[misc]
        if "/blobs/" not in request.url.path:
            return response
        body = bytearray(b"".join([chunk async for chunk in response.body_iterator]))  # type: ignore[attr-defined]
        body[-1] ^= 1
        return Response(bytes(body), status_code=response.status_code)  # type: ignore[attr-defined]


async def test_a_flipped_bit_is_never_handed_on(
    store: WeightStore, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 2)
    store.put(version(0), tensors(0), FILES)
    async with WeightClient(serve(spoil=flip), tmp_path / "cache") as client:
        mirror = Mirror(client)
        plan = await client.latest()
        assert plan is not None
        with pytest.raises(WeightsError, match="arrived corrupted"):
            await mirror.follow(plan)
        assert mirror.version is None
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".part"]


async def test_a_spoilt_cache_is_fetched_again(store: WeightStore, puller: WeightClient) -> None:
    store.put(version(0), tensors(0), FILES)
    plan = await puller.latest()
    assert plan is not None
    [[path]] = await puller.pull(plan)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    [[again]] = await puller.pull(plan)
    assert again.read_bytes()[-1:] != b"?"


async def test_a_replayed_or_foreign_delta_leaves_the_version_in_place(
    store: WeightStore, puller: WeightClient
) -> None:
    mirror = Mirror(puller)
    for step in range(3):
        store.put(version(step), tensors(step), FILES)
        await follow(puller, mirror)
    replayed = store.plan(version(2), have="r/1/1")
    assert replayed is not None
    with pytest.raises(WeightsError, match="from r/1/1 cannot be applied to r/1/2"):
        await mirror.follow(replayed)
    assert mirror.version == "r/1/2"
    assert same(mirror, 2)


async def test_a_lying_delta_leaves_no_version_and_the_next_plan_heals(
    store: WeightStore, puller: WeightClient
) -> None:
    """The blob is what the plan says, but of another base: the learner itself would have to be wrong."""
    mirror = Mirror(puller)
    store.put(version(0), tensors(0), FILES)
    await follow(puller, mirror)
    for name in mirror.state.tensors:
        mirror.state.tensors[name].zero_()
    store.put(version(1), tensors(1), FILES)
    with pytest.raises(WeightsError):
        await follow(puller, mirror)
    assert mirror.version is None
    assert await follow(puller, mirror) == "snapshot+deltas"
    assert same(mirror, 1)


async def test_a_version_collected_during_the_pull_is_gone(store: WeightStore, puller: WeightClient) -> None:
    store.put(version(0), tensors(0), FILES)
    plan = await puller.latest()
    assert plan is not None
    for step in range(1, 12):
        store.put(version(step), tensors(step), FILES)
    with pytest.raises(VersionGone):
        await puller.pull(plan)
    assert await follow(puller, Mirror(puller)) in ("snapshot", "snapshot+deltas")


@pytest.mark.parametrize("peers", [0, 1])
async def test_a_cache_on_a_full_disk_is_one_clear_error(
    store: WeightStore, puller: WeightClient, monkeypatch: pytest.MonkeyPatch, peers: int
) -> None:
    store.put(version(0), tensors(0), FILES)
    plan = await puller.latest()
    assert plan is not None

    opened = Path.open

    def no_space(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".part":
            raise OSError(28, "No space left on device")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", no_space)
    with pytest.raises(WeightsError, match=r"cannot write to .*No space left on device; free space"):
        await puller.fetch(plan.transfers[0].blobs, [puller._url] * peers)


async def test_an_answer_without_end_is_cut_short(
    store: WeightStore, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.MAX_MANIFEST_BYTES", 2**20)

    def bomb(app: FastAPI) -> None:
        @app.middleware("http")
        async def answer(request: Request, call_next: Callable[..., object]) -> Response:
            return Response(gzip.compress(bytes(2**26)), headers={"content-encoding": "gzip"})

    async with WeightClient(serve(spoil=bomb), tmp_path / "cache") as client:
        with pytest.raises(WeightsError, match="more than 1048576 bytes"):
            await client.latest()


async def test_readers_only_ever_see_whole_versions(store: WeightStore, puller: WeightClient) -> None:
    """A publisher at full speed against a mirror that follows whatever is latest."""
    stop = threading.Event()

    def publish() -> None:
        step = 0
        while not stop.is_set():
            store.put(version(step), tensors(step % 50), FILES)
            step += 1

    thread = threading.Thread(target=publish)
    thread.start()
    mirror, seen = Mirror(puller), 0
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            plan = await puller.latest(have=mirror.version, wait_s=1)
            if plan is None:
                continue
            try:
                await mirror.follow(plan)
            except VersionGone:
                continue
            assert same(mirror, plan.manifest.policy_version.step % 50)
            mirror.state.verify(plan.manifest)
            seen += 1
    finally:
        stop.set()
        thread.join()
    assert seen > 3


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name peers for small plans, too."""
    monkeypatch.setattr("aspo.weights.server._PEERS_FROM", 0)


async def peers_of(store: WeightStore, serve: Serve, leases: Leases, **options: object) -> list[str]:
    """Announce a second server of the same store as a peer that runs the newest version."""
    peer = serve(**options)
    leases.renew("peer", store.newest(), peer)
    return [peer]


@pytest.mark.usefixtures("_any_size")
async def test_blobs_come_from_a_peer_that_has_the_version(
    store: WeightStore, serve: Serve, leases: Leases, tmp_path: Path
) -> None:
    store.put(version(0), tensors(0), FILES)
    asked = Cut()
    asked.ranges.append("skip")
    url = serve(spoil=asked)
    await peers_of(store, serve, leases)
    async with WeightClient(url, tmp_path / "cache") as client:
        mirror = Mirror(client)
        await follow(client, mirror)
        assert same(mirror, 0)
        assert client.stats.bytes_from_peers == client.stats.bytes > 0
    assert asked.ranges == ["skip"], "the learner served no blob"


@pytest.mark.parametrize("lie", [flip, Cut(), "dead"])
@pytest.mark.usefixtures("_any_size")
async def test_a_lying_peer_does_no_harm(
    store: WeightStore, serve: Serve, leases: Leases, tmp_path: Path, lie: object
) -> None:
    store.put(version(0), tensors(0), FILES)
    url = serve()
    if lie == "dead":
        leases.renew("peer", version(0), "http://127.0.0.1:1")
    else:
        await peers_of(store, serve, leases, spoil=lie)
    async with WeightClient(url, tmp_path / "cache") as client:
        mirror = Mirror(client)
        await follow(client, mirror)
        assert same(mirror, 0)
        assert client.stats.bytes_from_peers == 0


@pytest.mark.usefixtures("_any_size")
async def test_a_peer_never_sees_the_token(
    store: WeightStore, serve: Serve, leases: Leases, tmp_path: Path
) -> None:
    store.put(version(0), tensors(0), FILES)
    auth = AuthConfig(actor_token=SecretStr("secret"))
    seen: list[str] = []

    def note(app: FastAPI) -> None:
        @app.middleware("http")
        async def spy(request: Request, call_next: Callable[..., object]) -> object:
            seen.append(request.headers["authorization"])
            return await call_next(request)  # type: ignore[misc]

    url = serve(auth=auth)
    await peers_of(store, serve, leases, auth=auth, spoil=note)
    async with WeightClient(url, tmp_path / "cache", token="secret") as client:
        await follow(client, Mirror(client))
        assert client.stats.bytes_from_peers > 0
    assert seen
    assert not any("secret" in value for value in seen)


async def test_a_cancelled_pull_resumes(store: WeightStore, serve: Serve, tmp_path: Path) -> None:
    store.put(version(0), tensors(0), FILES)

    def slow(app: FastAPI) -> None:
        @app.middleware("http")
        async def wait(request: Request, call_next: Callable[..., object]) -> object:
            if "/blobs/" in request.url.path:
                await asyncio.sleep(0.5)
            return await call_next(request)  # type: ignore[misc]

    async with WeightClient(serve(spoil=slow), tmp_path / "cache") as client:
        mirror = Mirror(client)
        plan = await client.latest()
        assert plan is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await mirror.follow(plan)
        await mirror.follow(plan)
        assert same(mirror, 0)
