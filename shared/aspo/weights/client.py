"""Pulls versions from a learner over HTTP and trusts nothing it has not verified.

    async with WeightClient("http://learner:8000", Path("cache"), token=None) as client:
        mirror = Mirror(client)
        while True:
            plan = await client.latest(have=mirror.version, wait_s=30)  # None: nothing newer yet
            if plan is not None:
                update = await mirror.follow(plan)                      # verified, in memory
        await export(client, await client.plan("demo/1/42"), Path("my-model"))

Blobs come from the peers that the plan names, where there are any, else from the learner; their names are
their digests, so it does not matter who sends them. Memory is bounded by the model and one blob of a delta.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from aspo.http import blob_ticket
from aspo.tls import UNTRUSTED, client_context
from aspo.weights import adapters
from aspo.weights.adapters import Merger
from aspo.weights.blobs import BlobStore, file_digest
from aspo.weights.delta import Change
from aspo.weights.manifest import (
    MAX_MANIFEST_BYTES,
    BlobRef,
    Manifest,
    Plan,
    Transfer,
    WeightsError,
    decode_manifest,
    decode_plan,
)
from aspo.weights.state import State

T = TypeVar("T")
RETRIES = 8
_RETRY_CEILING_S = 5.0
_CHUNK = 2**20
_PARALLEL = 4
_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=90)
_PEER_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=3, sock_read=10)
_PEER_REST_S = 60.0


class Refused(WeightsError):
    """The learner answers and will not give it, however often it is asked."""


class VersionGone(Refused):
    """The version is no longer kept by the learner; ask for a plan from nothing."""


@dataclass(slots=True)
class PullStats:
    """What following cost: totals in bytes, seconds and counts since the start, and of the last plan.

    `versions_behind` is the steps by which the client lagged when it asked, 0 where it came from nothing.
    """

    bytes: int = 0
    bytes_from_peers: int = 0
    seconds: float = 0.0
    retries: int = 0
    plans: dict[str, int] = field(default_factory=dict)
    last_bytes: int = 0
    last_seconds: float = 0.0
    last_kind: str = ""
    versions_behind: int = 0


class WeightClient:
    """A verified, resuming reader of one learner's versions.

    `cache` holds blobs by digest. `name` leases what this client runs, so that the learner keeps the deltas
    from there; `serves` is the URL at which it offers its blobs to others. `tls_ca` is a PEM file of whom to
    believe, the system's CAs if None.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        token: str | None = None,
        name: str | None = None,
        serves: str | None = None,
        role: str = "reader",
        tls_ca: Path | None = None,
    ) -> None:
        self._url, self._token = url.rstrip("/"), token
        self._name, self._role, self.serves = name, role, serves
        self.cache = BlobStore(cache)
        self.stats = PullStats()
        self.on_bytes: Callable[[int], None] | None = None  # told of every piece that arrives
        self._tls = client_context(tls_ca)
        self._session: aiohttp.ClientSession | None = None
        self._resting: dict[str, float] = {}  # peers that failed, until when they are left alone

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, connector=aiohttp.TCPConnector(ssl=self._tls))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def latest(self, have: str | None = None, wait_s: float = 0.0) -> Plan | None:
        """The plan for the version to run, or None if it still is `have` after `wait_s` seconds.

        Raises `WeightsError` when the learner cannot be reached or answers nonsense.
        """
        query = {"have": have, "client": self._name, "serves": self.serves, "role": self._role}
        known = {name: value for name, value in query.items() if value is not None}
        data = await self._get("/v1/weights/latest", known | {"wait": str(wait_s)})
        if data is None:
            return None
        plan = decode_plan(data)
        if plan.transfers and plan.base not in (None, have):
            raise WeightsError(f"the plan for {plan.manifest.version} starts from {plan.base}, not {have}")
        return plan

    async def plan(self, version: str) -> Plan:
        """The plan for one version from nothing; raises `VersionGone` if it is no longer kept."""
        data = await self._get(f"/v1/weights/{version}/plan", {})
        plan = decode_plan(data or b"")
        _require_version(plan.manifest, version)
        return plan

    async def manifest(self, version: str) -> Manifest:
        """The manifest of one version; raises `VersionGone` if it is no longer kept."""
        data = await self._get(f"/v1/weights/{version}", {})
        manifest = decode_manifest(data or b"")
        _require_version(manifest, version)
        return manifest

    async def pull(self, plan: Plan) -> list[list[Path]]:
        """Fetch a plan's blobs and verify their digests; gives the paths of each transfer's blobs."""
        began = time.monotonic()
        refs = [ref for transfer in plan.transfers for ref in transfer.blobs]
        paths = dict(zip([ref.digest for ref in refs], await self.fetch(refs, plan.peers), strict=True))
        stats = self.stats
        stats.last_bytes, stats.last_seconds, stats.last_kind = plan.size, time.monotonic() - began, plan.kind
        stats.bytes, stats.seconds = stats.bytes + plan.size, stats.seconds + stats.last_seconds
        stats.versions_behind = plan.steps
        stats.plans[plan.kind] = stats.plans.get(plan.kind, 0) + 1
        return [[paths[ref.digest] for ref in transfer.blobs] for transfer in plan.transfers]

    async def fetch(self, refs: Sequence[BlobRef], peers: Sequence[str] = ()) -> list[Path]:
        """Fetch blobs, a few at a time, and verify their digests; gives their paths in the cache."""
        gate = asyncio.Semaphore(_PARALLEL)

        async def one(ref: BlobRef) -> Path:
            async with gate:
                return await self._fetch(ref, peers)

        jobs = {digest: asyncio.create_task(one(ref)) for digest, ref in {r.digest: r for r in refs}.items()}
        try:
            await asyncio.gather(*jobs.values())
        finally:  # one has failed: none may go on writing to files that the next try will resume
            for job in jobs.values():
                job.cancel()
            await asyncio.gather(*jobs.values(), return_exceptions=True)
        return [jobs[ref.digest].result() for ref in refs]

    async def post(self, path: str, body: object) -> None:
        """Tell the learner something; raises `WeightsError` if it cannot be told."""
        assert self._session is not None, "use the client as a context manager"
        try:
            headers = self._authorization(self._token)
            async with self._session.post(self._url + path, json=body, headers=headers) as response:
                await _check(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WeightsError(f"{self._url}{path}: {error}") from error

    async def _get(self, path: str, query: dict[str, str]) -> bytes | None:
        async def attempt() -> bytes | None:
            assert self._session is not None, "use the client as a context manager"
            headers = self._authorization(self._token)
            async with self._session.get(self._url + path, params=query, headers=headers) as response:
                if response.status == 304:
                    return None
                await _check(response)
                return await _bounded(response)

        return await self._retry(attempt, path)

    async def _fetch(self, ref: BlobRef, peers: Sequence[str]) -> Path:
        """Give the verified blob's path; a cut download goes on where it stopped."""
        path = self.cache.folder / ref.digest
        if self.cache.has(ref) and await asyncio.to_thread(self.cache.verify, ref.digest) is not None:
            return path
        partial = path.with_suffix(".part")
        what = f"/v1/blobs/{ref.digest[:12]}"
        try:
            if not await self._fetch_from_peers(ref, partial, peers):
                await self._retry(lambda: self._download(self._url, ref, partial), what)
            os.replace(partial, path)
        except OSError as error:  # the network's have been met by then
            folder = self.cache.folder
            raise WeightsError(
                f"cannot write to {folder}: {error.strerror}; free space or mend permissions"
            ) from error
        return path

    async def _fetch_from_peers(self, ref: BlobRef, partial: Path, peers: Sequence[str]) -> bool:
        """Try each peer once; one that fails or lies is left alone for a while."""
        now = time.monotonic()
        for peer in peers:
            if self._resting.get(peer, 0.0) > now or peer == self.serves:
                continue
            try:
                async with asyncio.timeout(_PEER_REST_S):
                    await self._download(peer.rstrip("/"), ref, partial, peer=True)
            except (aiohttp.ClientError, TimeoutError, ValueError, WeightsError):
                self._resting[peer] = time.monotonic() + _PEER_REST_S
                continue
            self.stats.bytes_from_peers += ref.size
            return True
        return False

    async def _download(self, url: str, ref: BlobRef, partial: Path, *, peer: bool = False) -> None:
        await self._resume(url, ref, partial, peer=peer)
        if await asyncio.to_thread(file_digest, partial) != ref.digest:
            partial.unlink()
            raise WeightsError(f"blob {ref.digest[:12]} arrived corrupted")

    async def _resume(self, url: str, ref: BlobRef, partial: Path, *, peer: bool) -> None:
        assert self._session is not None, "use the client as a context manager"
        have = partial.stat().st_size if partial.exists() else 0
        if have == ref.size:
            partial.touch()
            return
        # A peer is not trusted with the token: a ticket opens this one blob.
        token = blob_ticket(self._token, ref.digest) if peer and self._token else self._token
        headers = self._authorization(token)
        if 0 < have < ref.size:
            headers |= {"Range": f"bytes={have}-", "If-Range": f'"{ref.digest}"'}
        timeout = _PEER_TIMEOUT if peer else _TIMEOUT
        async with self._session.get(
            f"{url}/v1/blobs/{ref.digest}", headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            await _check(response)
            with partial.open("ab" if response.status == 206 else "wb") as file:
                async for chunk in response.content.iter_chunked(_CHUNK):
                    file.write(chunk)
                    if self.on_bytes is not None:
                        self.on_bytes(len(chunk))
                    if file.tell() > ref.size:
                        break
        received = partial.stat().st_size
        if received < ref.size:
            raise WeightsError(f"blob {ref.digest[:12]} was cut off after {received} of {ref.size} bytes")
        if received > ref.size:
            partial.unlink()
            raise WeightsError(f"blob {ref.digest[:12]} is larger than its plan says")

    def _authorization(self, token: str | None) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def _retry(self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        last: Exception | None = None
        for count in range(RETRIES):
            if count:
                self.stats.retries += 1
                await asyncio.sleep(min(_RETRY_CEILING_S, 0.05 * 2**count) * random.uniform(0.5, 1.0))
            try:
                return await attempt()
            except Refused:
                raise
            except aiohttp.ClientConnectorCertificateError as error:
                cause = error.certificate_error
                raise Refused(
                    f"the certificate of {self._url} is not trusted ({cause}); {UNTRUSTED}"
                ) from error
            except (aiohttp.ClientError, TimeoutError, WeightsError) as error:
                last = error
        if isinstance(last, aiohttp.ClientConnectionError):
            raise WeightsError(
                f"no learner answers at {self._url}, asked {RETRIES} times for {what}; start one, or "
                "mend the URL"
            ) from last
        raise WeightsError(f"{self._url}{what}: {last or 'no answer'} (after {RETRIES} tries)") from last


@dataclass(frozen=True, slots=True)
class Update:
    """What `Mirror.follow` did: the positions that changed and their new values, by tensor.

    `base` is the version that they changed from; None if everything was replaced, and then `files` are
    safetensors files of the whole if those exist already.
    """

    version: str
    base: str | None
    changes: dict[str, Change]
    files: tuple[Path, ...] = ()


class Mirror:
    """A verified copy of one version in memory, moved on by plans; after a failure it is of no version.

    `state` holds its tensors as published, `weights` those that a model runs with: the same, unless the
    version is one of adapters.
    """

    def __init__(self, client: WeightClient) -> None:
        self._client = client
        self.state = State({})
        self.manifest: Manifest | None = None
        self._base: tuple[BlobRef, ...] = ()
        self._merger: Merger | None = None

    @property
    def version(self) -> str | None:
        """The version held, None before the first and after a failure: the next plan starts from nothing."""
        return self.state.version

    @property
    def weights(self) -> State:
        """What a model runs with at the version held."""
        return self.state if self._merger is None else self._merger.weights

    async def restore(self) -> None:
        """Hold what is in memory against the manifest, and merge adapters anew; raises `WeightsError`."""
        assert self.manifest is not None
        await asyncio.to_thread(self.state.verify, self.manifest)
        self._base = ()
        await self._take_base(self.manifest, ())
        if self._merger is not None:
            await asyncio.to_thread(self._merger.follow, self.state)

    async def _take_base(self, manifest: Manifest, peers: Sequence[str]) -> None:
        """Load what a version's adapters are merged into, unless it is there already."""
        refs = adapters.base_of(manifest)
        if refs == self._base:
            return
        self._merger, self._base = None, ()
        if refs:
            config, *parts = await self._client.fetch(refs, peers)
            self._merger = await asyncio.to_thread(lambda: Merger(config.read_bytes(), parts))
        self._base = refs

    async def follow(self, plan: Plan) -> Update:
        """Pull a plan and move to its version; raises `WeightsError`, the state then as it was or of none."""
        paths = await self._client.pull(plan)
        await self._take_base(plan.manifest, plan.peers)
        base = self.version
        if plan.base != base:
            base = None
        update = await asyncio.to_thread(self._move, plan, paths, base)
        self.manifest = plan.manifest
        used = {ref.digest for transfer in plan.transfers for ref in transfer.blobs}
        self._client.cache.keep_only(used | {ref.digest for ref in plan.manifest.files.values()})
        return update

    def _move(self, plan: Plan, paths: list[list[Path]], base: str | None) -> Update:
        changes: dict[str, Change] = {}
        for transfer, files in zip(plan.transfers, paths, strict=True):
            if transfer.base is None:
                self.state = State({})  # before the next is loaded: there is room for one
                self.state = _load(transfer, files)
                continue
            blobs = (path.read_bytes() for path in files)
            found = self.state.advance(transfer, blobs, last=transfer is plan.transfers[-1])
            changes = {
                name: _composed(self.state.tensors[name], [c[name] for c in (changes, found) if name in c])
                for name in changes.keys() | found.keys()
            }
        if self.version != plan.manifest.version:
            raise WeightsError(f"the plan for {plan.manifest.version} led to {self.version}")
        if base is None:
            self.state.verify(plan.manifest)
        if self._merger is not None:
            return self._merge(self._merger, plan.manifest.version)
        whole = tuple(paths[0]) if plan.kind == "snapshot" else ()
        return Update(plan.manifest.version, base, changes, whole)

    def _merge(self, merger: Merger, version: str) -> Update:
        """Bring the weights to the adapters held; what changed is known whatever way led to these."""
        former = merger.weights.version
        try:
            changes = merger.follow(self.state)
        except WeightsError:
            self.state.version = None
            raise
        return Update(version, former, changes)


async def export(client: WeightClient, plan: Plan, folder: Path, *, adapter: bool = False) -> Mirror:
    """Write a version as a folder that `from_pretrained` loads; returns the verified copy in memory.

    Adapters are merged into their base, or, as an `adapter`, written as peft loads them.
    """
    mirror = Mirror(client)
    if adapter and not adapters.base_of(plan.manifest):
        raise WeightsError(f"{plan.manifest.version} has whole weights and no adapters; pull it as a model")
    files = adapters.exported_files(plan.manifest.files, adapter=adapter)
    sources = await client.fetch(list(files.values()), plan.peers)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in zip(files, sources, strict=True):
        shutil.copyfile(source, folder / name)
    await mirror.follow(plan)
    if adapter:
        safetensors.torch.save_file(mirror.state.tensors, folder / adapters.TENSORS, {"format": "pt"})
    else:
        await asyncio.to_thread(mirror.weights.save, folder)
    return mirror


def _load(transfer: Transfer, files: Sequence[Path]) -> State:
    state = State.load(files)
    state.version = transfer.version
    return state


def _composed(tensor: Tensor, changes: Sequence[Change]) -> Change:
    """One change for several in a row, of which `tensor` is the result."""
    if len(changes) == 1:
        return changes[0]
    positions = [change.positions for change in changes if change.positions is not None]
    if len(positions) < len(changes):
        return Change(None, tensor)
    union = functools.reduce(np.union1d, positions)
    return Change(union, tensor.reshape(-1)[torch.from_numpy(union)])


def _require_version(manifest: Manifest, version: str) -> None:
    if manifest.version != version:
        raise WeightsError(f"asked for version {version}, got {manifest.version}")


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """Read an answer, however well it is compressed, no further than a plan can be long."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        body += chunk
        if len(body) > MAX_MANIFEST_BYTES:
            raise Refused(f"{response.url.origin()} answers with more than {MAX_MANIFEST_BYTES} bytes")
    return bytes(body)


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status in (200, 206):
        return
    code, text = _error_of(await response.content.read(4096))
    message = f"{response.url.origin()} answered {response.status}: {text}"
    if response.status == 410 or code == "no_blob":
        raise VersionGone(message)
    if 400 <= response.status < 500 and code != "no_version":
        raise Refused(f"{message} (check the learner's URL and the token)")
    raise WeightsError(message)


def _error_of(body: bytes) -> tuple[str, str]:
    """The code, and the message with its hint, of an error answer, or whatever text it holds."""
    try:
        error = json.loads(body)["error"]
        return str(error["code"]), f"{error['message']}; {error['hint']}"
    except (ValueError, KeyError, TypeError):
        return "", " ".join(body.decode(errors="replace").split())[:200]
