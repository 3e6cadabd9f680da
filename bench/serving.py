"""Serving a snapshot: the learner's blob route against aiohttp's sendfile, over loopback, one client each.

Both servers are processes of their own and serve the same file from the page cache; one client process reads
with `recv_into`, from each in turn.

    aspo bench serving --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

SIZE = 512 * 2**20


def serve_learner(folder: Path, port: Connection) -> None:
    from prometheus_client import CollectorRegistry

    from aspo.config import AuthConfig
    from aspo.http import Server, create_app, listen
    from aspo.weights.blobs import BlobStore
    from aspo.weights.server import blob_routes

    auth = AuthConfig()
    app = create_app("bench", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(blob_routes(BlobStore(folder)))
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        port.send(server.url)
        time.sleep(3600)


def serve_aiohttp(folder: Path, port: Connection) -> None:
    from aiohttp import web

    async def blob(request: web.Request) -> web.FileResponse:
        return web.FileResponse(folder / request.match_info["digest"])

    listener = socket.create_server(("127.0.0.1", 0))
    port.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
    app = web.Application()
    app.router.add_get("/v1/blobs/{digest}", blob)
    web.run_app(app, sock=listener, print=None)


def read(url: str, digest: str) -> float:
    """Fetch a blob; gives the seconds from the request to its last byte."""
    buffer = memoryview(bytearray(2**20))
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        began = time.perf_counter()
        connection.sendall(
            f"GET /v1/blobs/{digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        received, head = 0, b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        received = len(head) - head.index(b"\r\n\r\n") - 4
        while received < SIZE:
            received += connection.recv_into(buffer)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        from aspo.weights.blobs import BlobStore

        digest = BlobStore(Path(scratch)).put(os.urandom(SIZE)).digest
        servers, urls = [], {}
        for name, target in {"learner": serve_learner, "aiohttp_sendfile": serve_aiohttp}.items():
            mine, theirs = multiprocessing.Pipe()
            servers.append(multiprocessing.Process(target=target, args=(Path(scratch), theirs), daemon=True))
            servers[-1].start()
            urls[name] = mine.recv()
        time.sleep(1)
        seconds: dict[str, list[float]] = {name: [] for name in urls}
        for _ in range(rounds):
            for name, url in urls.items():
                seconds[name].append(read(url, digest))
        for server in servers:
            server.kill()
    rates = {name: SIZE / statistics.median(values) / 1e9 for name, values in seconds.items()}
    figures: dict[str, float] = {f"{name}_gb_per_second": rate for name, rate in rates.items()}
    figures |= {"learner_to_sendfile": rates["learner"] / rates["aiohttp_sendfile"], "rounds": rounds}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
