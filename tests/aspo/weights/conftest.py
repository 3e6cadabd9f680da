"""A store, and its routes served over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.weights.client import WeightClient
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore

Serve = Callable[..., str]


@pytest.fixture
def leases() -> Leases:
    return Leases()


@pytest.fixture
def store(tmp_path: Path, leases: Leases) -> WeightStore:
    return WeightStore(tmp_path / "weights", keep=3, snapshot_every=4, leased=leases.versions)


@pytest.fixture
def serve(store: WeightStore, leases: Leases) -> Iterator[Serve]:
    """Serve the store's routes; `spoil` may add middlewares that spoil the answers."""
    servers: list[Server] = []

    def start(auth: AuthConfig | None = None, spoil: Callable[[FastAPI], None] | None = None) -> str:
        auth = auth or AuthConfig()
        app = create_app("test", auth=auth, ready=lambda: None, registry=CollectorRegistry())
        app.include_router(weight_routes(store, leases))
        app.include_router(blob_routes(store.blobs))
        if spoil:
            spoil(app)
        server = Server(app, listen("127.0.0.1", 0, auth))
        servers.append(server)
        return server.__enter__().url

    yield start
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture
async def puller(serve: Serve, tmp_path: Path) -> AsyncIterator[WeightClient]:
    async with WeightClient(serve(), tmp_path / "cache") as client:
        yield client
