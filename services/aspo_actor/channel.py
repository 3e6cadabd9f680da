"""Calls to vLLM's workers that are answered beside the sampling, not between two steps of it.

vLLM runs a worker's calls in the loop that steps the model, so that asking and answering take a step each.
A worker listens on a Unix socket of its own instead, in a thread: one JSON object a line each way, `{"id",
"call", "argument"}` answered by `{"id", "answer"}` or `{"id", "error"}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

_LINE_BYTES = 2**26


class ChannelError(RuntimeError):
    """A worker did not do what it was asked beside the sampling; the text is its own."""


def answer_calls(calls: Mapping[str, Callable[[Any], Any]]) -> str:
    """Answer `calls`, from a thread, to the one client that will connect; returns the socket's path.

    Only this user may enter the socket's folder, which is gone once the client has come.
    """
    folder = Path(tempfile.mkdtemp(prefix="aspo-"))
    listener = socket.socket(socket.AF_UNIX)
    path = folder / "calls"
    listener.bind(str(path))
    listener.listen(1)
    threading.Thread(target=_serve, args=(listener, folder, calls), name="aspo-calls", daemon=True).start()
    return str(path)


def _serve(listener: socket.socket, folder: Path, calls: Mapping[str, Callable[[Any], Any]]) -> None:
    with listener:
        connection, _ = listener.accept()
    shutil.rmtree(folder, ignore_errors=True)
    # The client may leave, or be killed, before its answer; there is nobody left to tell then.
    with contextlib.suppress(ConnectionError), connection, connection.makefile("rb") as lines:
        for line in lines:
            asked = json.loads(line)
            answer = {"id": asked["id"]}
            try:
                answer["answer"] = calls[asked["call"]](asked["argument"])
            except Exception as error:
                answer["error"] = f"{type(error).__name__}: {error}"
            connection.sendall(json.dumps(answer).encode() + b"\n")


class Channel:
    """The client's end, to all workers of an engine; one call at a time."""

    def __init__(self, ends: Sequence[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self._ends = ends
        self._asked = 0

    @classmethod
    async def connect(cls, paths: Sequence[str]) -> Self:
        """Connect to the sockets of `answer_calls`; raises `OSError` where there is none."""
        return cls([await asyncio.open_unix_connection(path, limit=_LINE_BYTES) for path in paths])

    async def call(self, name: str, argument: Any) -> list[Any]:
        """Have every worker do a call, and return their answers; raises `ChannelError` if one fails."""
        self._asked += 1
        line = json.dumps({"id": self._asked, "call": name, "argument": argument}).encode() + b"\n"
        for _, writer in self._ends:
            writer.write(line)
        return [await self._answer(reader) for reader, _ in self._ends]

    async def _answer(self, reader: asyncio.StreamReader) -> Any:
        while True:
            line = await reader.readline()
            if not line.endswith(b"\n"):
                raise ChannelError("the worker is gone")
            answer = json.loads(line)
            if answer["id"] != self._asked:
                continue  # to a call that was given up
            if "error" in answer:
                raise ChannelError(answer["error"])
            return answer["answer"]

    def close(self) -> None:
        """End the connections, and with them the workers' threads."""
        for _, writer in self._ends:
            writer.close()
