"""Server-sent events: what happens in a run, told to whoever watches.

A look once a second serves all streams, and there is none while nobody watches. A stream that does not take
what it is sent is ended; the client comes back with the id of the last event that it has seen.

    hello   {"run", "resumed"}: not resumed means that steps may be missing, so ask for the history
    status  as GET /v1/status
    step    the figures of one step, with an id
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from aspo.http import ApiError, disconnected
from aspo_learner.history import History

MAX_STREAMS = 32
BACKLOG = 16  # looks that a stream may be behind
MAX_REPLAYED = 200  # steps
LOOK_EVERY_S, LOOK_AT_LEAST_S = 1.0, 10.0
_SHARE = 0.01  # of one core's time that looking may take
_END = b""


class Feed:
    """The streams of one event loop."""

    def __init__(self, history: History, status: Callable[[], BaseModel], run: str) -> None:
        self._history, self._status, self._run = history, status, run
        self._instance = secrets.token_hex(4)
        self._streams: set[asyncio.Queue[bytes]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._told = 0  # steps
        self._latest = b""  # the last status, for who comes between two looks

    def join(self, last_id: str | None, closing: asyncio.Event) -> asyncio.Queue[bytes]:
        """Open a stream; raises ApiError where there are too many."""
        if len(self._streams) >= MAX_STREAMS:
            hint = "close another page, or ask /v1/status now and then"
            raise ApiError(503, "too_many_streams", f"{MAX_STREAMS} streams are open already", hint)
        if self._watching is None or self._watching.done():
            self._told = self._history.length
            self._watching = asyncio.get_running_loop().create_task(self._watch(closing))
        queue: asyncio.Queue[bytes] = asyncio.Queue(BACKLOG)
        queue.put_nowait(b"".join(self._greeting(last_id)))
        self._streams.add(queue)
        return queue

    def leave(self, queue: asyncio.Queue[bytes]) -> None:
        """Close a stream."""
        self._streams.discard(queue)

    def _greeting(self, last_id: str | None) -> Iterator[bytes]:
        seen = self._seen(last_id)
        yield b"retry: 1000\n"
        yield encode("hello", {"run": self._run, "resumed": seen is not None})
        if seen is not None:
            yield from self._steps(seen, self._told)
        yield self._latest

    def _seen(self, last_id: str | None) -> int | None:
        """How many steps a client has seen that comes back; None if it had better begin anew."""
        found = re.fullmatch(r"([0-9a-f]{8})-(\d{1,9})", last_id or "")
        if found is None or found[1] != self._instance:
            return None
        seen = int(found[2])
        return seen if self._told - MAX_REPLAYED <= seen <= self._told else None

    def _steps(self, first: int, last: int) -> Iterator[bytes]:
        for number, metrics in enumerate(self._history.since(first)[: last - first], start=first + 1):
            yield encode("step", metrics, f"{self._instance}-{number}")

    async def _watch(self, closing: asyncio.Event) -> None:
        """Tell all streams what is new, until the last of them, the server closes, or a look fails."""
        try:
            while self._streams and not closing.is_set():
                steps, told, self._latest, took = await run_in_threadpool(self._look)
                self._told = told  # together with telling: who joins meanwhile misses nothing
                self._tell(steps + self._latest)
                pause = min(max(LOOK_EVERY_S, took / _SHARE), LOOK_AT_LEAST_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(closing.wait(), pause)
        finally:  # nobody is left with a stream that nothing comes by
            self._latest = b""
            for queue in list(self._streams):
                self._end(queue)

    def _look(self) -> tuple[bytes, int, bytes, float]:
        """The steps that are new, up to which, the status, and the seconds of the CPU that it took."""
        begun = time.thread_time()
        length = self._history.length
        steps = b"".join(self._steps(max(self._told, length - MAX_REPLAYED), length))
        status = _frame("status", self._status().model_dump_json().encode())
        return steps, length, status, time.thread_time() - begun

    def _tell(self, news: bytes) -> None:
        for queue in list(self._streams):
            if queue.full():
                self._end(queue)
            else:
                queue.put_nowait(news)

    def _end(self, queue: asyncio.Queue[bytes]) -> None:
        self.leave(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(_END)


class EventStream(Response):
    """The events of a feed from now on, until the client goes or is told to come back."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, queue: asyncio.Queue[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._feed, self._queue = feed, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes as it comes."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._feed.leave(self._queue)
            sending.cancel()
            gone.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while news := await self._queue.get():
            await send({"type": "http.response.body", "body": news, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def encode(event: str, data: Mapping[str, object], event_id: str = "") -> bytes:
    """Encode one event; a figure that is no number, as of no tokens at all, is null: JSON has no NaN."""
    return _frame(event, to_json(data, inf_nan_mode="null"), event_id)


def _frame(event: str, data: bytes, event_id: str = "") -> bytes:
    """Frame JSON, which has no line break, as an event."""
    head = f"id: {event_id}\nevent: {event}\n" if event_id else f"event: {event}\n"
    return head.encode() + b"data: " + data + b"\n\n"
