"""The HTTP routes that serve a `WeightStore`: plans with long-poll, manifests, and blobs with Range.

app.include_router(weight_routes(store, leases))
app.include_router(blob_routes(store.blobs))        # this alone where a cache is re-served
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import re
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from aspo.http import ApiError, Scope, disconnected, require
from aspo.schemas import PolicyVersion
from aspo.weights.blobs import BlobStore
from aspo.weights.leases import Leases
from aspo.weights.manifest import Plan
from aspo.weights.store import WeightStore

MAX_WAIT_S = 60.0
_COMPRESS_FROM = 1024
_SLICE = 2**20
_PEERS_FROM = 4 * 2**20  # bytes; what is less is sooner fetched than asked around for
_KEPT_ANSWERS = 64


class BlobResponse(Response):
    """A blob, or the one range of it that was asked for, in large slices straight from the page cache."""

    def __init__(self, path: Path, digest: str, wanted: str | None) -> None:
        size = path.stat().st_size
        super().__init__(media_type="application/octet-stream")
        self.headers.update(
            {"etag": f'"{digest}"', "accept-ranges": "bytes", "cache-control": "max-age=31536000, immutable"}
        )
        self._file = path.open("rb")
        self._first, self._stop = 0, size
        found = parse_range(wanted, size) if wanted else None
        if found is not None:
            self._first, self._stop = found
            self.status_code = 206 if self._stop > self._first else 416
            described = f"{self._first}-{self._stop - 1}" if self.status_code == 206 else "*"
            self.headers["content-range"] = f"bytes {described}/{size}"
        self.headers["content-length"] = str(self._stop - self._first)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Send the slices as fast as the client takes them, until it has gone."""
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            with self._file as file:
                await self._send(file, send, gone)
        finally:
            gone.cancel()

    async def _send(self, file: BinaryIO, send: Send, gone: asyncio.Future[None]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(self._first, self._stop, _SLICE):
            if gone.done():  # whatever is sent now is dropped at once: nothing would bound the reading
                return
            body = os.pread(file.fileno(), min(_SLICE, self._stop - start), start)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)  # `send` need not let others run
        await send({"type": "http.response.body", "body": b""})


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Give [first, stop) of a single byte range, empty if it cannot be met; None for what is to be ignored.

    Source: RFC 9110, section 14. Several ranges at once are answered with the whole.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    first, last = int(match[1]), int(match[2]) if match[2] else size - 1
    if last < first and match[2]:
        return None
    return (first, min(last + 1, size)) if first < size else (size, size)


class VersionInfo(BaseModel):
    """One version kept: whether it is live, how much of it changed, and the ways to reach it, in bytes."""

    version: str
    live: bool
    changed_fraction: float | None
    state_digest: str
    transfers: dict[str, int]
    running: list[str]


class Versions(BaseModel):
    """The versions kept, oldest first; `held` says that later ones wait for a promotion."""

    live: str | None
    held: bool
    versions: list[VersionInfo]


class _Moves:
    """Wakes the long-polls of one event loop when the publisher's thread moves what is live."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._loop: asyncio.AbstractEventLoop | None = None
        self._moved = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        store.on_move(self._announce)

    def _announce(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _wake_at(self, closing: asyncio.Event) -> None:
        await closing.wait()
        self._wake()

    async def other_than(
        self, have: str | None, client: str | None, wait_s: float, closing: asyncio.Event
    ) -> PolicyVersion | None:
        """The client's target once it is not `have`; None after `wait_s` s or when the server closes."""
        if self._watching is None:
            self._loop = asyncio.get_running_loop()
            self._watching = self._loop.create_task(self._wake_at(closing))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while True:
                    moved, target = self._moved, self._store.target(client)
                    if closing.is_set() or (target is not None and str(target) != have):
                        break
                    await moved.wait()
        target = self._store.target(client)
        return None if target is None or str(target) == have else target


class _Answers:
    """Encodes each plan once, however many clients wait for the same one."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[bytes, bytes]] = {}

    def give(self, plan: Plan, request: Request) -> Response:
        key = (plan.manifest.version, plan.transfers, plan.peers, plan.trial)
        if key not in self._kept:
            while len(self._kept) >= _KEPT_ANSWERS:
                self._kept.pop(next(iter(self._kept)))
            body = plan.encode()
            self._kept[key] = body, gzip.compress(body, 6)
        return _json(*self._kept[key], plan.manifest.version, request)


def blob_routes(blobs: BlobStore) -> APIRouter:
    """Make the route that serves blobs by digest, to actors and to those who hold a ticket for the blob."""
    router = APIRouter(tags=["weights"], dependencies=[require(Scope.BLOB)])

    digest_parameter = {"name": "digest", "in": "path", "required": True, "schema": {"type": "string"}}

    # The digest is read from the request: FastAPI's resolver costs as much as the rest of the route.
    @router.get("/v1/blobs/{digest}", openapi_extra={"parameters": [digest_parameter]})
    async def blob(request: Request) -> Response:
        """The bytes of one blob; honours a single Range, and If-Range."""
        digest, headers = request.path_params["digest"], request.headers
        path = blobs.path(digest)
        if path is None:
            raise ApiError(404, "no_blob", "no such blob", "take a digest from the latest plan")
        current = headers.get("if-range") in (None, f'"{digest}"')
        return BlobResponse(path, digest, headers.get("range") if current else None)

    return router


def weight_routes(store: WeightStore, leases: Leases) -> APIRouter:
    """Make the routes of the weight plane that change nothing."""
    router = APIRouter(tags=["weights"])
    moves, answers = _Moves(store), _Answers()
    actor, reader = [require(Scope.ACTOR)], [require(Scope.READER)]

    @router.get("/v1/weights", dependencies=reader)
    def versions() -> Versions:
        """The versions kept, and who runs them."""
        return _list(store, leases)

    @router.get("/v1/weights/latest", dependencies=actor)
    async def latest(
        request: Request,
        have: Annotated[str | None, Query(max_length=100, description="The version the caller holds")] = None,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for another")] = 0.0,
        client: Annotated[str | None, Query(max_length=128, description="The caller's name")] = None,
        serves: Annotated[str | None, Query(max_length=300, pattern=r"^https?://")] = None,
        role: Annotated[Literal["actor", "relay", "reader"], Query()] = "actor",
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The plan for the version to run, from the one the caller has; 304 while that is the one."""
        known = have or (if_none_match or "").strip('"') or None
        if client is not None:
            leases.renew(client, _parse_or_none(known), serves, role)
        # Who holds nothing has nothing to compare a trial with: it starts from the live version.
        tried_by = client if known else None
        version = await moves.other_than(known, tried_by, wait, request.app.state.closing)
        target = version or store.target(tried_by)
        if target is None:
            raise ApiError(404, "no_version", "no version is published yet", "wait with ?wait=30")
        if version is None:
            return Response(status_code=304, headers={"etag": f'"{target}"'})
        plan = _plan(store, version, have)
        plan = Plan(
            manifest=plan.manifest,
            transfers=plan.transfers,
            peers=leases.peers(version, client) if plan.size >= _PEERS_FROM else (),
            trial=version != store.live(),
        )
        return answers.give(plan, request)

    @router.get("/v1/weights/{version:path}/plan", dependencies=actor)
    def plan(
        request: Request, version: str, have: Annotated[str | None, Query(max_length=100)] = None
    ) -> Response:
        """The plan for one version; 410 once it is collected."""
        return answers.give(_plan(store, _parse(version), have), request)

    @router.get("/v1/weights/{version:path}", dependencies=actor)
    def manifest(request: Request, version: str) -> Response:
        """The manifest of one version; 410 once it is collected."""
        body = _plan(store, _parse(version), None).manifest.encode()
        return _json(body, gzip.compress(body), version, request)

    return router


def _plan(store: WeightStore, version: PolicyVersion, have: str | None) -> Plan:
    plan = store.plan(version, have)
    if plan is not None:
        return plan
    newest = store.newest()
    if newest is not None and version.run == newest.run and version < newest:
        hint = "take the latest, or raise weights.keep"
        raise ApiError(410, "collected", f"version {version} is no longer kept", hint)
    raise ApiError(404, "unknown_version", f"no version {version}", "see /v1/weights for those there are")


def _list(store: WeightStore, leases: Leases) -> Versions:
    clients, live = leases.clients(), store.live()
    found = []
    for version in store.versions():
        manifest = store.manifest(version)
        if manifest is None:
            continue
        found.append(
            VersionInfo(
                version=str(version),
                live=version == live,
                changed_fraction=manifest.changed_fraction,
                state_digest=manifest.state_digest,
                transfers={t.base or "snapshot": t.size for t in store.transfers(version)},
                running=sorted(client for client, running in clients.items() if running == version),
            )
        )
    return Versions(live=str(live) if live else None, held=store.held(), versions=found)


def _json(body: bytes, compressed: bytes, version: str, request: Request) -> Response:
    headers = {"etag": f'"{version}"', "vary": "accept-encoding"}
    if len(body) >= _COMPRESS_FROM and "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"], body = "gzip", compressed
    return Response(body, media_type="application/json", headers=headers)


def _parse(version: str) -> PolicyVersion:
    try:
        return PolicyVersion.parse(version)
    except ValueError as error:
        raise ApiError(400, "bad_version", str(error), "take /v1/weights/latest") from None


def _parse_or_none(version: str | None) -> PolicyVersion | None:
    try:
        return PolicyVersion.parse(version) if version else None
    except ValueError:
        return None
