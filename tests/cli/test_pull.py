"""Fetching a version by command: whole or not at all, also when it is ended in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.weights.leases import Leases
from aspo.weights.server import weight_routes
from aspo.weights.store import WeightStore
from services import Service, wait_until
from versions import FILES, tensors, version


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """A learner whose blobs stop after their first byte, and the event that one has begun."""
    store, begun, auth = WeightStore(tmp_path / "weights"), threading.Event(), AuthConfig()
    store.put(version(0), tensors(0), FILES)
    app = create_app("test", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, Leases()))

    @app.get("/v1/blobs/{digest}")
    async def blob(request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"{"
            begun.set()
            await request.app.state.closing.wait()

        return StreamingResponse(pieces())

    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        yield server.url, begun


@pytest.fixture
def in_background() -> Iterator[None]:
    """What is started ignores SIGINT, as a shell has its background do."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_pull_in_the_background_is_ended_too(
    in_background: None, stalled: tuple[str, threading.Event], tmp_path: Path
) -> None:
    end_a_pull(stalled, tmp_path, signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_pull_that_is_ended_leaves_nothing_behind(
    stalled: tuple[str, threading.Event], tmp_path: Path, signum: signal.Signals
) -> None:
    end_a_pull(stalled, tmp_path, signum)


def end_a_pull(stalled: tuple[str, threading.Event], tmp_path: Path, signum: signal.Signals) -> None:
    url, begun = stalled
    folder = tmp_path / "models"
    pull = Service(tmp_path, "weights", "pull", "models/mine", "--learner", url)
    try:
        wait_until(begun.is_set, 60, (pull,))
        assert [path.name[:6] for path in folder.iterdir()] == [".pull-"]
        assert pull.stop(signum, 20) == 130, pull.text
    finally:
        pull.kill()
    assert not list(folder.iterdir())
    assert "Traceback" not in pull.text
