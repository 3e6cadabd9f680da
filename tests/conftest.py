"""Fixtures on real parts: a redis-server on a free port, and clean runs in it."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from aspo.queue import connect
from services import redis_server

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# A shell has what it starts in the background ignore it, and so would every process of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real redis-server, shared by the session."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A connection to the session's Redis."""
    connection = connect(redis_url)
    yield connection
    connection.close()


@pytest.fixture
def run() -> str:
    """The name of a run that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The parent folder of runs."""
    return tmp_path / "runs"
