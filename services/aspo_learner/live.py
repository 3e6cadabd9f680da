"""The live page, and what it asks for beyond status and weights.

    live = Live(config.run.name, lambda: history.steps, policy.tokenizer)
    live.samples.keep(step, groups, trainer.token_traces)     # the training thread's only part in it

The page's own files hold no data and are for anybody: a browser that opens a page sends no token. The page
asks for a reader's token and sends it with every request for data.
"""

from __future__ import annotations

import gzip
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel

from aspo.http import ApiError, Scope, require
from aspo.limits import Pace
from aspo.text import MAX_TEXT
from aspo_learner import samples
from aspo_learner.history import History, HistoryPage
from aspo_learner.samples import Listing, Rollout, Samples
from aspo_learner.stream import EventStream, Feed

SET_ASIDE = 50
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# What a rollout says can at worst be shown: nothing but the page's own files is run, loaded or sent to.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time, and mostly hear that nothing has changed
    "vary": "accept-encoding",
}


class SetAside(BaseModel):
    """A rollout that was quarantined: who sent it and why it cannot be used; seconds since the epoch."""

    at: float
    uid: str
    actor: str
    reason: str


class Live:
    """What a page shows of one learner; the training thread adds to it, the HTTP thread reads it."""

    def __init__(self, run: str, steps: Callable[[], Sequence[Mapping[str, float]]], tokenizer: Any) -> None:
        self.run, self.history, self.samples = run, History(steps), Samples(tokenizer)
        self._set_aside: deque[SetAside] = deque(maxlen=SET_ASIDE)

    def set_aside(self, actor: str, uid: str, reason: str) -> None:
        """Note a rollout that was quarantined."""
        entry = SetAside(at=time.time(), uid=uid[:MAX_TEXT], actor=actor[:MAX_TEXT], reason=reason[:MAX_TEXT])
        self._set_aside.append(entry)

    def quarantined(self) -> list[SetAside]:
        """Those noted since the learner's start, the newest first."""
        return list(self._set_aside)[::-1]


class Quarantined(BaseModel):
    """The rollouts set aside since the learner's start, the newest first; of many the last."""

    entries: list[SetAside]


def live_routes(live: Live, status: Callable[[], BaseModel]) -> APIRouter:
    """Make the routes that the page asks for data, all for readers."""
    router = APIRouter(tags=["live"], dependencies=[require(Scope.READER)])
    feed = Feed(live.history, status, live.run)
    stream: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @router.get("/v1/events", response_class=Response, responses=stream)
    async def events(
        request: Request, last_event_id: Annotated[str | None, Header(max_length=64)] = None
    ) -> Response:
        """Server-sent events: `hello`, then `status` about every second and `step` for each step."""
        return EventStream(feed, feed.join(last_event_id, request.app.state.closing))

    @router.get("/v1/history")
    def history(
        request: Request,
        name: Annotated[list[str], Query(max_length=64, description="Metrics; x stands for each x/y")],
        points: Annotated[int, Query(ge=1, le=5000)] = 600,
        first: Annotated[int, Query(ge=0, le=10**9)] = 0,
        last: Annotated[int | None, Query(ge=0, le=10**9)] = None,
    ) -> HistoryPage:
        """Figures by step, a stretch of them in so many points."""
        return live.history.columns(name, points=points, first=first, last=last)

    @router.get("/v1/rollouts")
    def rollouts(query: Annotated[samples.Query, Query()]) -> Listing:
        """Rollouts of the last steps, filtered and in order."""
        return live.samples.find(query)

    @router.get("/v1/rollouts/{number}")
    def rollout(number: int) -> Rollout:
        """One rollout with its tokens, their log-probs and weights."""
        found = live.samples.get(number)
        if found is None:
            raise ApiError(
                404, "no_rollout", "no such rollout is kept", "see /v1/rollouts for those that are"
            )
        return found

    @router.get("/v1/quarantine")
    def quarantine() -> Quarantined:
        """Rollouts that were set aside as unusable, and why."""
        return Quarantined(entries=live.quarantined())

    return router


class _Asset:
    """One file of the page, in memory, compressed once."""

    def __init__(self, name: str, body: bytes) -> None:
        self.media_type = _TYPES[name.rpartition(".")[2]]
        self.body, self.compressed = body, gzip.compress(body, 9)
        self.etag = f'"{blake2b(body, digest_size=12).hexdigest()}"'

    def answer(self, request: Request) -> Response:
        headers = _HEADERS | {"etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.body, media_type=self.media_type, headers=headers)
        headers["content-encoding"] = "gzip"
        return Response(self.compressed, media_type=self.media_type, headers=headers)


def page_routes() -> APIRouter:
    """Make the routes of the page's own files, for anybody and paced."""
    pace = Pace(rate=200, wait_s=0.5)
    assets = {name: _Asset(name, body) for name, body in page_files().items()}
    router = APIRouter(dependencies=[Depends(pace.turn)], include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        """The page."""
        return assets["index.html"].answer(request)

    @router.get("/page/{name:path}")
    async def asset(request: Request, name: str) -> Response:
        """What the page consists of."""
        if name not in assets:
            raise ApiError(404, "not_found", "the page has no such file", "open /")
        return assets[name].answer(request)

    return router


def page_files() -> dict[str, bytes]:
    """The page's files by their path."""
    return dict(_walk(files("aspo_learner") / "page", ""))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.rpartition(".")[2] in _TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found
