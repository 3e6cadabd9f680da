"""Floods a server from a process of its own: python flood.py HOST PORT PATH CONNECTIONS

Each connection sends its next request when the last is answered; one that is closed is opened again.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def flooding(port: int, path: str, *, connections: int) -> Iterator[subprocess.Popen[bytes]]:
    """Flood a port of this machine; the process is ended with the context."""
    arguments = [sys.executable, __file__, "127.0.0.1", str(port), path, str(connections)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"flooding\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def flood(host: str, port: int, path: str, connections: int) -> None:
    """Send requests until killed."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    selector = selectors.DefaultSelector()

    def begin() -> None:
        client = socket.create_connection((host, port))
        client.sendall(request)
        selector.register(client, selectors.EVENT_READ)

    def go_on(client: socket.socket) -> None:
        with suppress(OSError):
            if client.recv(65536):
                client.sendall(request)
                return
        selector.unregister(client)
        client.close()
        begin()

    for _ in range(connections):
        begin()
    print("flooding", flush=True)
    while True:
        for key, _ in selector.select():
            with suppress(OSError):
                go_on(key.fileobj)  # type: ignore[arg-type]


if __name__ == "__main__":
    flood(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
