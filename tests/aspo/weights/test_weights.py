"""The weight plane over real sockets: whole or not at all, verified, resumed, immutable."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from safetensors.torch import load_file

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.schemas import PolicyVersion
from aspo.weights import store as store_module
from aspo.weights.client import Refused, VersionGone, WeightClient
from aspo.weights.manifest import WeightsError, decode_manifest
from aspo.weights.server import weight_routes
from aspo.weights.store import WeightStore

FILES = {"config.json": b"{}", "tokenizer.json": b"{ }"}


def version(step: int, epoch: int = 1) -> PolicyVersion:
    return PolicyVersion(epoch=epoch, step=step, run="r")


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (64, 32), "norm": (32,), "scalar": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights", keep=3)


@pytest.fixture
def serve(store: WeightStore) -> Iterator[Callable[..., str]]:
    """Serve the store's routes; middlewares may spoil the answers."""
    servers: list[Server] = []

    def start(auth: AuthConfig | None = None, spoil: Callable[[FastAPI], None] | None = None) -> str:
        auth = auth or AuthConfig()
        app = create_app("test", auth=auth, ready=lambda: None, registry=CollectorRegistry())
        app.include_router(weight_routes(store))
        if spoil:
            spoil(app)
        server = Server(app, listen("127.0.0.1", 0, auth))
        servers.append(server)
        return server.__enter__().url

    yield start
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture
async def puller(serve: Callable[..., str], tmp_path: Path) -> AsyncIterator[WeightClient]:
    async with WeightClient(serve(), tmp_path / "cache") as client:
        yield client


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
async def test_a_version_arrives_bit_for_bit(
    store: WeightStore, puller: WeightClient, dtype: torch.dtype, tmp_path: Path
) -> None:
    store.put(version(0), tensors(0, dtype), FILES)
    manifest = await puller.latest()
    assert manifest is not None
    assert manifest.version == "r/1/0"
    folder = await puller.export(manifest, tmp_path / "model")
    loaded = load_file(folder / "model.safetensors")
    for name, tensor in tensors(0, dtype).items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)
    assert (folder / "config.json").read_bytes() == b"{}"


async def test_large_versions_are_split_into_blobs_with_an_index(
    store: WeightStore, puller: WeightClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store_module, "MAX_BLOB_BYTES", 100)
    store.put(version(0), tensors(0), FILES)
    manifest = await puller.manifest("r/1/0")
    folder = await puller.export(manifest, tmp_path / "model")
    assert len(manifest.blobs) == 2
    assert sorted(p.name for p in folder.glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


async def test_the_long_poll_answers_when_a_version_is_published(
    store: WeightStore, puller: WeightClient
) -> None:
    store.put(version(0), tensors(0), FILES)
    assert await puller.latest(have="r/1/0", wait_s=0.05) is None
    publish = threading.Timer(0.3, store.put, (version(1), tensors(1), FILES))
    publish.start()
    started = time.monotonic()
    manifest = await puller.latest(have="r/1/0", wait_s=30)
    assert manifest is not None
    assert manifest.version == "r/1/1"
    assert time.monotonic() - started < 10


async def test_etag_of_the_latest_version_saves_the_answer(
    store: WeightStore, serve: Callable[..., str]
) -> None:
    store.put(version(0), tensors(0), FILES)
    url = serve() + "/v1/weights/latest"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as first:
            etag = first.headers["etag"]
        async with session.get(url, headers={"If-None-Match": etag}) as second:
            assert second.status == 304
            assert second.headers["etag"] == etag


async def test_blobs_honour_range_and_carry_their_digest_as_etag(
    store: WeightStore, serve: Callable[..., str]
) -> None:
    blob = store.put(version(0), tensors(0), FILES).blobs[0]
    whole = store.blob_path(blob.digest)
    assert whole is not None
    url = f"{serve()}/v1/blobs/{blob.digest}"
    async with aiohttp.ClientSession() as session:
        async with session.get(url, headers={"Range": "bytes=10-"}) as part:
            assert part.status == 206
            assert part.headers["etag"] == f'"{blob.digest}"'
            assert await part.read() == whole.read_bytes()[10:]
        async with session.get(url, headers={"Range": "bytes=10-", "If-Range": '"other"'}) as all_of_it:
            assert all_of_it.status == 200


async def test_collected_versions_are_gone_and_unknown_ones_not_found(
    store: WeightStore, serve: Callable[..., str], tmp_path: Path
) -> None:
    for step in range(5):
        store.put(version(step), tensors(step), FILES)
    assert store.versions() == [version(2), version(3), version(4)]
    url = serve()
    async with aiohttp.ClientSession() as session:
        for path, status in {
            "weights/r/1/1": 410,
            "weights/r/1/9": 404,
            "weights/other/1/1": 404,
            "weights/nonsense": 400,
            "weights/..%2f..%2fetc": 400,
            "blobs/" + "0" * 64: 404,
            "blobs/..%2f..%2flatest": 404,
            "blobs/latest": 404,
        }.items():
            async with session.get(f"{url}/v1/{path}") as response:
                assert response.status == status, path
                assert (await response.json())["error"]["hint"]
    async with WeightClient(url, tmp_path / "cache") as client:
        with pytest.raises(VersionGone):
            await client.manifest("r/1/0")


def test_a_version_never_changes(store: WeightStore) -> None:
    store.put(version(0), tensors(0), FILES)
    store.put(version(0), tensors(0), FILES)
    with pytest.raises(WeightsError, match="exists with other content"):
        store.put(version(0), tensors(1), FILES)
    store.put(version(1), tensors(1), FILES)
    with pytest.raises(WeightsError, match="older than the latest"):
        store.put(version(0), tensors(0), FILES)


def test_a_restarted_learner_serves_what_its_former_self_published(
    store: WeightStore, tmp_path: Path
) -> None:
    manifest = store.put(version(0), tensors(0), FILES)
    again = WeightStore(tmp_path / "weights", keep=3)
    assert again.latest() == version(0)
    assert again.manifest(version(0)) == manifest


def test_a_full_disk_leaves_the_old_version_live(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(version(0), tensors(0), FILES)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", no_space)
    with pytest.raises(WeightsError, match="No space left on device; free space"):
        store.put(version(1), tensors(1), FILES)
    assert store.latest() == version(0)
    assert not list((store._root / "blobs").glob(".tmp-*"))


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
    store: WeightStore, serve: Callable[..., str], tmp_path: Path
) -> None:
    manifest = store.put(version(0), tensors(0), FILES)
    cut = Cut()
    async with WeightClient(serve(spoil=cut), tmp_path / "cache") as client:
        await client.pull(manifest)
    assert cut.ranges == [None, f"bytes={manifest.blobs[0].size // 2}-"]


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
    store: WeightStore, serve: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 2)
    manifest = store.put(version(0), tensors(0), FILES)
    async with WeightClient(serve(spoil=flip), tmp_path / "cache") as client:
        with pytest.raises(WeightsError, match="arrived corrupted"):
            await client.pull(manifest)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".part"]


async def test_a_blob_with_other_tensors_than_listed_is_refused(
    store: WeightStore, puller: WeightClient, tmp_path: Path
) -> None:
    good = store.put(version(0), tensors(0), FILES)
    other = store.put(version(1), {"embed": torch.zeros(3)}, FILES)
    mixed = {**_as_dict(good), "blobs": _as_dict(other)["blobs"]}
    with pytest.raises(WeightsError, match="other tensors than its manifest lists"):
        await puller.pull(decode_manifest(_encode(mixed)))


def test_a_manifest_is_checked_before_it_is_believed(store: WeightStore) -> None:
    good = _as_dict(store.put(version(0), tensors(0), FILES))
    for key, value, words in (
        ("state_digest", "0" * 64, "do not match its state digest"),
        ("version", "../x", "not a weights manifest"),
        ("blobs", [], "names a blob that it does not list"),
        ("files", {"../evil": good["blobs"][0]}, "not a weights manifest"),
        ("blobs", [{"digest": "../../etc/passwd", "size": 1}], "not a weights manifest"),
        ("extra", 1, "not a weights manifest"),
    ):
        with pytest.raises(WeightsError, match=words):
            decode_manifest(_encode({**good, key: value}))
    for garbage in (b"", b"\xff\xfe", b"[]", b"{" * 100_000):
        with pytest.raises(WeightsError):
            decode_manifest(garbage)


async def test_tokens_guard_the_routes_by_scope(store: WeightStore, serve: Callable[..., str]) -> None:
    store.put(version(0), tensors(0), FILES)
    auth = AuthConfig(reader_token=SecretStr("r"), actor_token=SecretStr("a"), operator_token=SecretStr("o"))
    url = serve(auth=auth)
    async with aiohttp.ClientSession() as session:
        for token, status in (("", 401), ("r", 403), ("wrong", 403), ("a", 200), ("o", 200)):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with session.get(f"{url}/v1/weights/latest", headers=headers) as response:
                assert response.status == status
        async with session.get(f"{url}/v1/weights/latest", headers={"Authorization": "Bearer "}) as response:
            assert response.status == 401
        for probe in ("livez", "readyz", "metrics"):
            async with session.get(f"{url}/{probe}") as response:
                assert response.status == 200


async def test_a_refusal_is_not_asked_for_again(
    store: WeightStore, serve: Callable[..., str], tmp_path: Path
) -> None:
    store.put(version(0), tensors(0), FILES)
    url = serve(auth=AuthConfig(operator_token=SecretStr("o")))
    async with WeightClient(url, tmp_path / "cache") as client:
        with pytest.raises(Refused, match=r"401.*check the learner's URL and the token"):
            await client.latest()
    async with WeightClient(f"{url}/elsewhere", tmp_path / "cache") as client:
        with pytest.raises(Refused, match="404"):
            await client.latest()


async def test_a_spoilt_cache_is_fetched_again(
    store: WeightStore, puller: WeightClient, tmp_path: Path
) -> None:
    manifest = store.put(version(0), tensors(0), FILES)
    [path] = await puller.pull(manifest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    await puller.pull(manifest)


async def test_an_unreachable_learner_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 2)
    async with WeightClient("http://127.0.0.1:1", tmp_path / "cache") as client:
        with pytest.raises(WeightsError, match=r"127\.0\.0\.1:1/v1/weights/latest.*after 2 tries"):
            await client.latest()


async def test_readers_only_ever_see_whole_versions(
    store: WeightStore, puller: WeightClient, tmp_path: Path
) -> None:
    """A publisher at full speed against a reader that pulls whatever is latest."""
    stop = threading.Event()

    def publish() -> None:
        step = 0
        while not stop.is_set():
            store.put(version(step), tensors(step), FILES)
            step += 1

    thread = threading.Thread(target=publish)
    thread.start()
    seen = []
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            manifest = await puller.latest(have=seen[-1] if seen else None, wait_s=1)
            if manifest is None:
                continue
            try:
                [path] = await puller.pull(manifest)
            except VersionGone:
                continue
            loaded = await asyncio.to_thread(load_file, path)
            assert torch.equal(loaded["embed"], tensors(manifest.policy_version.step)["embed"])
            seen.append(manifest.version)
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 3


def _as_dict(manifest: object) -> dict[str, object]:
    import json

    return dict(json.loads(manifest.encode()))  # type: ignore[attr-defined]


def _encode(value: object) -> bytes:
    import json

    return json.dumps(value).encode()
