"""The HTTP routes that serve a `WeightStore`: latest with long-poll, manifests, and blobs with Range."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, Response

from aspo.http import ApiError, Scope, require
from aspo.schemas import PolicyVersion
from aspo.weights.store import WeightStore

MAX_WAIT_S = 60.0


class BlobResponse(FileResponse):
    """A file in slices large enough to keep the loop out of the way."""

    chunk_size = 2 * 2**20


class _Latest:
    """Wakes the long-polls of one event loop when the publisher's thread moves `latest`."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._loop: asyncio.AbstractEventLoop | None = None
        self._moved = asyncio.Event()
        store.on_publish(self._announce)

    def _announce(self, version: PolicyVersion) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def other_than(
        self, have: str | None, wait_s: float, closing: asyncio.Event
    ) -> PolicyVersion | None:
        """The latest version once it is not `have`; None after `wait_s` seconds or when the server closes."""
        self._loop = asyncio.get_running_loop()
        moved, latest = self._moved, self._store.latest()
        if latest is None or str(latest) == have:
            signals = [asyncio.create_task(event.wait()) for event in (moved, closing)]
            await asyncio.wait(signals, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for signal in signals:
                signal.cancel()
            latest = self._store.latest()
        return None if latest is None or str(latest) == have else latest


def weight_routes(store: WeightStore) -> APIRouter:
    """Make the read-only routes of the weight plane; all need the actor scope."""
    router = APIRouter(tags=["weights"], dependencies=[require(Scope.ACTOR)])
    latest_version = _Latest(store)

    @router.get("/v1/weights/latest")
    async def latest(
        request: Request,
        have: Annotated[str | None, Query(max_length=100, description="The version the caller runs")] = None,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for another")] = 0.0,
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The manifest of the latest version; 304 while it is the one the caller has."""
        known = have or (if_none_match or "").strip('"') or None
        version = await latest_version.other_than(known, wait, request.app.state.closing)
        if version is None and store.latest() is None:
            raise ApiError(404, "no_version", "no version is published yet", "wait with ?wait=30")
        if version is None:
            return Response(status_code=304, headers={"etag": f'"{store.latest()}"'})
        return _manifest(store, version)

    @router.get("/v1/weights/{version:path}")
    async def manifest(version: str) -> Response:
        """The manifest of one version; 410 once it is collected."""
        try:
            return _manifest(store, PolicyVersion.parse(version))
        except ValueError as error:
            raise ApiError(400, "bad_version", str(error), "take /v1/weights/latest") from None

    @router.get("/v1/blobs/{digest}")
    async def blob(digest: str) -> Response:
        """The bytes of one blob; honours Range and If-Range."""
        path = store.blob_path(digest)
        if path is None:
            raise ApiError(404, "no_blob", "no such blob", "take a digest from the latest manifest")
        headers = {"etag": f'"{digest}"', "cache-control": "public, max-age=31536000, immutable"}
        return BlobResponse(
            path, media_type="application/octet-stream", headers=headers, stat_result=path.stat()
        )

    return router


def _manifest(store: WeightStore, version: PolicyVersion) -> Response:
    found = store.manifest(version)
    latest = store.latest()
    if found is not None:
        return Response(found.encode(), media_type="application/json", headers={"etag": f'"{version}"'})
    if latest is not None and version.run == latest.run and version < latest:
        raise ApiError(410, "collected", f"version {version} is no longer kept", "take /v1/weights/latest")
    raise ApiError(404, "no_version", f"no version {version}", "take /v1/weights/latest")
