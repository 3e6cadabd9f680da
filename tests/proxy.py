"""A TCP proxy for tests that spoils answers on request: cuts, flips, delays, throttles or swallows them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK = 2**16
_SLICES_PER_S = 50


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls one answer; offsets count its bytes from its first, headers included.

    `cut_at`: so many bytes pass, then the connection closes; 0 loses a reply whose request was carried out.
    `flip_at`: the bits of `mask` are inverted in that byte. An offset beyond the answer's end does nothing.
    `delay_s` passes before the first byte, `bytes_per_s` bounds the rate, `swallow` is silence.
    """

    cut_at: int | None = None
    flip_at: int | None = None
    mask: int = 1
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    swallow: bool = False


@dataclass(slots=True)
class _Exchange:
    """The request that a connection is at, and how much of its answer has passed."""

    fault: Fault = field(default_factory=Fault)
    answered: bool = True
    sent: int = 0


class Proxy:
    """Forwards connections to `target`, which may change while it runs; faults come in the order given.

        with Proxy("127.0.0.1", port) as proxy:                 # on a thread; `async with` in the test's loop
            proxy.inject([Fault(cut_at=100)])                   # the next answer
            proxy.inject(repeat(Fault(delay_s=1)), b"GET /v1")  # every answer to such a request
            proxy.heal()

    An answer is what comes between two requests of a connection. `requests` holds the first line of each.
    """

    def __init__(self, host: str, port: int) -> None:
        self.target = host, port
        self.requests: list[bytes] = []
        self.spoilt = 0  # answers that met a fault
        self.port = 0
        self._faults: Iterator[Fault] = iter(())
        self._only = b""
        self._links: set[asyncio.Task[None]] = set()

    def inject(self, faults: Iterable[Fault], requests: bytes = b"") -> None:
        """Spoil the next answers to requests that contain `requests`, one fault each."""
        self._faults, self._only = iter(faults), requests

    def heal(self) -> None:
        """Spoil no further answer."""
        self._faults = iter(())

    @property
    def url(self) -> str:
        """Where the proxy answers, for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next round

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="proxy")
        self._thread.start()
        started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self:
            started.set()
            await self._stop.wait()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def ended(link: asyncio.Task[None]) -> None:
            self._links.discard(link)
            writer.close()

        link = asyncio.create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(ended)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target)
        except OSError:
            return
        exchange = _Exchange()
        pumps = [
            asyncio.create_task(self._pass_requests(exchange, reader, up_writer)),
            asyncio.create_task(self._pass_answers(exchange, up_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            up_writer.close()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pass_requests(
        self, exchange: _Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(_CHUNK):
            if exchange.answered:
                self.requests.append(data.split(b"\r\n", 1)[0])
                exchange.fault, exchange.answered, exchange.sent = self._draw(data), False, 0
            writer.write(data)
            await writer.drain()

    def _draw(self, request: bytes) -> Fault:
        fault = next(self._faults, None) if self._only in request else None
        self.spoilt += fault is not None
        return fault or Fault()

    async def _pass_answers(
        self, exchange: _Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(_CHUNK):
            fault, start = exchange.fault, exchange.sent
            exchange.answered, exchange.sent = True, start + len(data)
            if start == 0:
                await asyncio.sleep(fault.delay_s)
            if fault.swallow:
                continue
            cut = None if fault.cut_at is None else fault.cut_at - start
            await _write(writer, _flipped(data, fault, start)[:cut], fault.bytes_per_s)
            if cut is not None and cut <= len(data):
                return


def _flipped(data: bytes, fault: Fault, start: int) -> bytes:
    spoilt = bytearray(data)
    if fault.flip_at is not None and start <= fault.flip_at < start + len(data):
        spoilt[fault.flip_at - start] ^= fault.mask
    return bytes(spoilt)


async def _write(writer: asyncio.StreamWriter, data: bytes, bytes_per_s: float | None) -> None:
    step = max(1, int(bytes_per_s / _SLICES_PER_S)) if bytes_per_s else _CHUNK
    for at in range(0, len(data), step):
        writer.write(data[at : at + step])
        await writer.drain()
        if bytes_per_s:
            await asyncio.sleep(1 / _SLICES_PER_S)
