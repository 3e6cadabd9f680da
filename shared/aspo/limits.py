"""What strangers may take of a server: connections, time, bytes, and turns.

A learner trains in the process that serves, so a flood costs its steps, and file descriptors its checkpoints.
uvicorn bounds none of this but by answering 503 to all, the probes included.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_BODY = 2**16  # bytes; every body that is asked for is a small JSON object


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one server: open connections, and seconds that a client may take.

    `request_s` is for a request to come whole, `idle_s` between two of them, `stalled_s` for what was sent to
    be read. Half of the process's file descriptors are never used, whatever `connections` says.
    """

    connections: int = 4096
    request_s: float = 10.0
    idle_s: float = 30.0
    stalled_s: float = 60.0

    @property
    def open(self) -> int:
        """Connections that may be open at once."""
        return min(self.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which cuts off whoever exceeds the `Limits`."""

    def __init__(self, *, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._asking: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asked_something()
        if len(self.connections) > self._limits.open:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._asked_something()  # also for what begins no request, such as empty lines
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._asked_something()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # resumes writing
        if self._asking is not None:
            self._asking.cancel()

    def _asked_something(self) -> None:
        if self._asking is None:
            self._asking = self.loop.call_later(self._limits.request_s, self.transport.abort)


class Pace:
    """Lets callers through one after another, `rate` a second, and none waits longer than `wait_s` seconds.

    For answers that anybody may ask for. Beyond `rate * wait_s` callers at once, each waits `wait_s`.
    """

    def __init__(self, rate: float, wait_s: float) -> None:
        self._gap_s, self._wait_s = 1 / rate, wait_s
        self._last = 0.0

    async def turn(self) -> None:
        """Wait for one's turn; call it from one event loop."""
        now = asyncio.get_running_loop().time()
        self._last = min(max(now, self._last + self._gap_s), now + self._wait_s)
        await asyncio.sleep(self._last - now)
