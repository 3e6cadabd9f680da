"""The routes over real sockets: long-poll, ETag, Range, scopes, what is gone and what never was."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from pydantic import SecretStr

from aspo.config import AuthConfig
from aspo.http import blob_ticket
from aspo.weights.client import Refused, VersionGone, WeightClient
from aspo.weights.leases import Leases
from aspo.weights.manifest import WeightsError
from aspo.weights.store import WeightStore
from versions import FILES, tensors, version


async def test_the_long_poll_answers_when_a_version_goes_live(
    store: WeightStore, puller: WeightClient
) -> None:
    store.put(version(0), tensors(0), FILES)
    assert await puller.latest(have="r/1/0", wait_s=0.05) is None
    publish = threading.Timer(0.3, store.put, (version(1), tensors(1), FILES))
    publish.start()
    started = time.monotonic()
    plan = await puller.latest(have="r/1/0", wait_s=30)
    assert plan is not None
    assert plan.manifest.version == "r/1/1"
    assert plan.kind == "delta"
    assert time.monotonic() - started < 10


async def test_a_version_that_is_not_live_wakes_nobody(store: WeightStore, puller: WeightClient) -> None:
    store.put(version(0), tensors(0), FILES)
    waiting = asyncio.create_task(puller.latest(have="r/1/0", wait_s=1.0))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(store.put, version(1), tensors(1), FILES, live=False)
    assert await waiting is None
    store.go_live(version(1))
    assert await puller.latest(have="r/1/0") is not None


async def test_a_canary_that_comes_anew_starts_from_the_live_version(
    store: WeightStore, serve: Callable[..., str], tmp_path: Path
) -> None:
    """It was killed in the middle of its trial, say, and has nothing to hold the version against."""
    store.put(version(0), tensors(0), FILES)
    store.put(version(1), tensors(1), FILES, live=False)
    store.try_out(version(1), "canary")
    async with WeightClient(serve(), tmp_path / "canary", name="canary", role="actor") as canary:
        first = await canary.latest()
        assert first is not None
        assert (first.manifest.version, first.trial) == ("r/1/0", False)
        then = await canary.latest(have="r/1/0")
        assert then is not None
        assert (then.manifest.version, then.trial) == ("r/1/1", True)


async def test_etag_of_the_latest_version_saves_the_answer(
    store: WeightStore, serve: Callable[..., str]
) -> None:
    store.put(version(0), tensors(0), FILES)
    url = serve() + "/v1/weights/latest"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as first:
            etag = first.headers["etag"]
            assert first.headers["content-encoding"] == "gzip"
        async with session.get(url, headers={"If-None-Match": etag}) as second:
            assert second.status == 304
            assert second.headers["etag"] == etag


async def test_blobs_honour_range_and_carry_their_digest_as_etag(
    store: WeightStore, serve: Callable[..., str]
) -> None:
    store.put(version(0), tensors(0), FILES)
    blob = store.transfers(version(0))[0].blobs[0]
    whole = (store.blobs.folder / blob.digest).read_bytes()
    url = f"{serve()}/v1/blobs/{blob.digest}"
    async with aiohttp.ClientSession() as session:
        for wanted, content in (
            ("bytes=10-", whole[10:]),
            ("bytes=0-0", whole[:1]),
            ("bytes=-7", whole[-7:]),
            (f"bytes=5-{2**40}", whole[5:]),
        ):
            async with session.get(url, headers={"Range": wanted}) as part:
                assert part.status == 206, wanted
                assert part.headers["etag"] == f'"{blob.digest}"'
                assert await part.read() == content
        async with session.get(url, headers={"Range": "bytes=10-", "If-Range": '"other"'}) as all_of_it:
            assert all_of_it.status == 200
            assert await all_of_it.read() == whole
        async with session.get(url, headers={"Range": f"bytes={len(whole)}-"}) as none:
            assert none.status == 416
        for nonsense in ("bytes=5-2", "bytes=-", "bytes=a-b", "bytes=0-1,3-4", "bytes=" + "9" * 5000 + "-"):
            async with session.get(url, headers={"Range": nonsense}) as ignored:
                assert ignored.status == 200, nonsense
        async with session.head(url) as head:
            assert head.status in (200, 405)


async def test_a_download_cut_off_is_read_no_further(
    store: WeightStore, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slices: list[int] = []
    pread = os.pread

    def counted(file: int, size: int, start: int) -> bytes:
        slices.append(start)
        return pread(file, size, start)

    monkeypatch.setattr("aspo.weights.server.os.pread", counted)
    digest, url = "0" * 64, serve()
    with (store.blobs.folder / digest).open("wb") as file:
        file.truncate(2**30)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/blobs/{digest}") as response:
            await response.content.read(1)
        for _ in range(3):
            async with session.get(f"{url}/livez") as probe:
                assert probe.status == 200
    assert len(slices) < 200


async def test_collected_versions_are_gone_and_unknown_ones_not_found(
    store: WeightStore, serve: Callable[..., str], tmp_path: Path
) -> None:
    for step in range(10):
        store.put(version(step), tensors(step), FILES)
    url = serve()
    async with aiohttp.ClientSession() as session:
        for path, status in {
            "weights/r/1/1": 410,
            "weights/r/1/1/plan": 410,
            "weights/r/1/99": 404,
            "weights/other/1/1": 404,
            "weights/nonsense": 400,
            "weights/..%2f..%2fetc": 400,
            "weights/nonsense/plan": 400,
            "blobs/" + "0" * 64: 404,
            "blobs/" + "G" * 64: 404,
            "blobs/..%2f..%2flive": 404,
            "blobs/live": 404,
            "weights/latest?have=" + "x" * 101: 422,
            "weights/latest?serves=file:///etc/passwd": 422,
        }.items():
            async with session.get(f"{url}/v1/{path}") as response:
                assert response.status == status, path
                assert (await response.json())["error"]["hint"]
    async with WeightClient(url, tmp_path / "cache") as client:
        with pytest.raises(VersionGone, match="no longer kept; take the latest"):
            await client.manifest("r/1/0")


async def test_a_way_that_was_collected_is_offered_to_nobody(
    store: WeightStore, puller: WeightClient
) -> None:
    """The version that the way leads to is still live: it was rolled back to."""
    for step in range(5):
        store.put(version(step), tensors(step), FILES)
    store.roll_back(version(4))
    before = await puller.latest(have="r/1/3")
    assert before is not None
    assert before.kind == "delta"
    for step in range(5, 12):
        store.put(version(step), tensors(step), FILES)
    plan = await puller.latest(have="r/1/3")
    assert plan is not None
    assert plan.kind == "snapshot"
    await puller.pull(plan)


async def test_a_nonsense_version_held_is_answered_with_a_snapshot(
    store: WeightStore, puller: WeightClient
) -> None:
    store.put(version(0), tensors(0), FILES)
    for have in ("nonsense", "r/9/9", "r/1/5", "../../x"):
        plan = await puller.latest(have=have)
        assert plan is not None
        assert plan.base is None


async def test_the_list_says_what_is_live_and_who_runs_it(
    store: WeightStore, serve: Callable[..., str], leases: Leases
) -> None:
    for step in range(3):
        store.put(version(step), tensors(step), FILES)
    store.roll_back(version(1))
    leases.renew("actor-7", version(1), None)
    async with aiohttp.ClientSession() as session, session.get(serve() + "/v1/weights") as response:
        listed = await response.json()
    assert (listed["live"], listed["held"]) == ("r/1/1", True)
    assert [v["version"] for v in listed["versions"]] == ["r/1/0", "r/1/1", "r/1/2"]
    assert listed["versions"][1]["running"] == ["actor-7"]
    assert listed["versions"][1]["live"]
    assert set(listed["versions"][0]["transfers"]) == {"snapshot"}
    assert 0 < listed["versions"][1]["changed_fraction"] < 1


async def test_polls_renew_leases_by_name(
    store: WeightStore, serve: Callable[..., str], leases: Leases
) -> None:
    store.put(version(0), tensors(0), FILES)
    store.put(version(1), tensors(1), FILES)
    query = {"client": "a", "have": "r/1/0", "serves": "http://peer:1", "role": "actor"}
    url = serve() + "/v1/weights/latest"
    async with aiohttp.ClientSession() as session, session.get(url, params=query) as response:
        assert response.status == 200
    assert leases.clients("actor") == {"a": version(0)}
    assert leases.peers(version(0), "b") == ("http://peer:1",)
    assert leases.peers(version(0), "a") == ()
    assert leases.peers(version(1), "b") == ()


async def test_tokens_guard_the_routes_by_scope(store: WeightStore, serve: Callable[..., str]) -> None:
    store.put(version(0), tensors(0), FILES)
    digest = store.transfers(version(0))[0].blobs[0].digest
    auth = AuthConfig(reader_token=SecretStr("r"), actor_token=SecretStr("a"), operator_token=SecretStr("o"))
    url = serve(auth=auth)
    ticket, other = blob_ticket("a", digest), blob_ticket("a", "0" * 64)
    expected = {
        "/v1/weights/latest": {"": 401, "r": 403, "wrong": 403, "a": 200, "o": 200, ticket: 403},
        "/v1/weights": {"": 401, "r": 200, "a": 200, ticket: 403},
        f"/v1/blobs/{digest}": {"": 401, "r": 403, "a": 200, "o": 200, ticket: 200, other: 403},
    }
    async with aiohttp.ClientSession() as session:
        for path, answers in expected.items():
            for token, status in answers.items():
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                async with session.get(url + path, headers=headers) as response:
                    assert response.status == status, (path, token)
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


async def test_an_unreachable_learner_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo.weights.client.RETRIES", 2)
    async with WeightClient("http://127.0.0.1:1", tmp_path / "cache") as client:
        with pytest.raises(WeightsError, match=r"no learner answers at http://127\.0\.0\.1:1, asked 2 times"):
            await client.latest()
