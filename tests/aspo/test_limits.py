"""Row 22 of the fault matrix: slow clients, floods, big bodies. The probes still answer."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, SecretStr

from aspo.config import AuthConfig
from aspo.http import Scope, Server, create_app, listen, require, url_of
from aspo.limits import MAX_BODY, Limits
from aspo.weights.blobs import BlobStore
from aspo.weights.server import blob_routes
from flood import flooding

AUTH = AuthConfig(reader_token=SecretStr("reader"), actor_token=SecretStr("actor"))
BRISK = Limits(request_s=0.5, idle_s=0.5, stalled_s=0.5)
PROBES = ("/livez", "/readyz", "/metrics")
HEAD = b"POST /v1/said HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GREETING = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


class Said(BaseModel):
    text: str


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def app(blobs: BlobStore) -> FastAPI:
    app = create_app("test", auth=AUTH, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(blob_routes(blobs))

    @app.post("/v1/said", dependencies=[require(Scope.READER)])
    def said(body: Said) -> int:
        return len(body.text)

    return app


@contextmanager
def served(app: FastAPI, limits: Limits = BRISK) -> Iterator[tuple[int, str]]:
    """Serve the app; gives its port and the URL of its probes' own port."""
    probes = listen("127.0.0.1", 0, AUTH)
    with Server(app, listen("127.0.0.1", 0, AUTH), probes=probes, limits=limits) as server:
        yield int(server.url.rpartition(":")[2]), url_of(probes)


def seconds_to(url: str) -> float:
    """How long a GET takes that is answered with 200."""
    begun = time.monotonic()
    with urllib.request.urlopen(url, timeout=10) as response:
        response.read()
    return time.monotonic() - begun


def say(port: int, head: bytes, body: bytes = b"") -> bytes:
    """Send a request and read the first of its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head + b"\r\n" + body)
        return client.recv(65536)


def works(port: int) -> bool:
    """Whether who has a token is served."""
    head = HEAD + b"Authorization: Bearer reader\r\nContent-Length: 13\r\n"
    return say(port, head, b'{"text": "1"}').startswith(b"HTTP/1.1 200")


def is_cut_off(client: socket.socket) -> bool:
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def drip(client: socket.socket, piece: bytes) -> None:
    """Send a piece every tenth of a second until the other side has had enough."""

    def send() -> None:
        try:
            for _ in range(100):
                client.sendall(piece)
                time.sleep(0.1)
        except OSError:
            return

    threading.Thread(target=send, daemon=True).start()


SLOW: dict[str, tuple[bytes, bytes]] = {
    "says nothing": (b"", b""),
    "half a head": (HEAD, b""),
    "a head in drops": (HEAD, b"X-A: 1\r\n"),
    "half a body": (HEAD + b"Content-Length: 100\r\n\r\n", b""),
    "a body in drops": (HEAD + b"Content-Length: 100000\r\n\r\n", b"1"),
    "a chunked body in drops": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "idles": (GREETING, b""),
    "empty lines after an answer": (GREETING, b"\r\n"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_who_is_slow_is_cut_off(app: FastAPI, kind: str) -> None:
    first, dripped = SLOW[kind]
    with served(app) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(first)
        if dripped:
            drip(client, dripped)
        assert is_cut_off(client)
        assert works(port)


def test_who_does_not_read_is_cut_off(app: FastAPI, blobs: BlobStore) -> None:
    digest = blobs.put(bytes(32 * 2**20)).digest
    request = f"GET /v1/blobs/{digest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer actor\r\n\r\n".encode()
    with served(app) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(request)
        begun = client.recv(100)
        assert begun.startswith(b"HTTP/1.1 200")
        time.sleep(1.5)  # three times what is allowed: what is left is what the kernel had taken
        received = sum(iter(lambda: len(client.recv(2**20)), 0)) if is_open(client) else 0
        assert received < 32 * 2**20


def is_open(client: socket.socket) -> bool:
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except ConnectionError:
        return False


@pytest.mark.parametrize(
    "size", [b"Content-Length: %d\r\n" % (MAX_BODY + 1), b"Transfer-Encoding: chunked\r\n"]
)
def test_a_big_body_is_refused(app: FastAPI, size: bytes) -> None:
    filler = b"x" * (MAX_BODY + 1)
    body = filler if size.startswith(b"Content") else b"%x\r\n%b\r\n0\r\n\r\n" % (len(filler), filler)
    with served(app) as (port, _):
        assert_too_large(port, HEAD + size, body)
        assert works(port)


def test_a_big_body_is_refused_where_none_is_read(app: FastAPI) -> None:
    with served(app) as (port, _):
        assert_too_large(port, GREETING.removesuffix(b"\r\n") + b"Content-Length: %d\r\n" % (MAX_BODY + 1))


def assert_too_large(port: int, head: bytes, body: bytes = b"") -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head + b"\r\n" + body)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert (answer.status, json.load(answer)["error"]["code"]) == (413, "too_large")


def test_no_more_connections_than_allowed(app: FastAPI) -> None:
    with served(app, Limits(connections=20)) as (port, probes), ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.1)) for _ in range(40)
        ]
        assert sum(is_cut_off(client) for client in clients) == 20
        assert max(seconds_to(probes + path) for path in PROBES) < 1.0
        for client in clients:
            client.close()
        deadline = time.monotonic() + 5
        while not works_or_not(port):
            assert time.monotonic() < deadline


def works_or_not(port: int) -> bool:
    try:
        return works(port)
    except ConnectionError:
        return False


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def big_bodies(port: int, stop: threading.Event) -> None:
    """Send bodies of 64 MiB, as far as they are taken."""
    head, piece = HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n" % (2**20, bytes(2**20))
    while not stop.is_set():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(head)
                for _ in range(64):
                    client.sendall(piece)
        except OSError:
            continue


def test_probes_answer_through_slow_clients_a_flood_and_big_bodies(app: FastAPI) -> None:
    with served(app, Limits(request_s=2.0)) as (port, probes), ExitStack() as stack:
        stop = threading.Event()
        sender = threading.Thread(target=big_bodies, args=(port, stop))
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(200)
        ]
        for client in slow:
            client.sendall(HEAD)
        assert works(port)
        before = resident()
        sender.start()
        with flooding(port, "/v1/said", connections=100), flooding(port, "/livez", connections=100):
            worst = 0.0
            for _ in range(3):
                # Those of the API's own port, too: they wait for their turn, and not for long.
                worst = max(
                    worst,
                    *(
                        seconds_to(base + path)
                        for base in (probes, f"http://127.0.0.1:{port}")
                        for path in PROBES
                    ),
                )
        stop.set()
        sender.join()
        assert worst < 1.0
        assert resident() - before < 64 * 2**20
        assert all(is_cut_off(client) for client in slow)
        assert works(port)


def step_seconds(seconds: float) -> list[float]:
    """Times of training steps of a small model, for so many seconds."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(12)])
    optimizer, batch = torch.optim.AdamW(model.parameters()), torch.randn(256, 256)
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.perf_counter()
        for _ in range(2):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        found.append(time.perf_counter() - begun)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("path", ["/v1/said", "/livez", "/nothing"])
def test_a_flood_hardly_slows_training(app: FastAPI, path: str) -> None:
    times: dict[signal.Signals, list[float]] = {signal.SIGSTOP: [], signal.SIGCONT: []}
    with served(app) as (port, _), flooding(port, path, connections=100) as flood:
        step_seconds(1.0)
        for _ in range(8):  # in turns, for the machine has its moods
            for order, found in times.items():
                flood.send_signal(order)
                found += step_seconds(2.0)
    quiet, flooded = (float(np.percentile(found, 95)) for found in times.values())
    # 1.1 is aimed at and measured on a quiet machine; unpaced, the same flood gives 3 and more.
    assert flooded < 1.5 * quiet, (quiet, flooded)
    print(f"{path}: p95 {quiet * 1e3:.1f} ms alone, {flooded * 1e3:.1f} ms in a flood")
