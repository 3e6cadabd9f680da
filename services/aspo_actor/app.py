"""The actor's HTTP face: probes, status, and the operator's verbs."""

from __future__ import annotations

from typing import Protocol

from fastapi import FastAPI
from pydantic import BaseModel

from aspo.config import AuthConfig
from aspo.http import ApiError, Scope, create_app, require
from aspo.presence import ActorStatus
from aspo.telemetry import Gauges
from aspo.weights.blobs import BlobStore
from aspo.weights.manifest import WeightsError
from aspo.weights.server import blob_routes
from aspo_actor.openai_routes import Host, openai_routes


class Synced(BaseModel):
    """The version that runs after a sync."""

    version: str


class Draining(BaseModel):
    """The answer to a drain: how many groups are still being finished."""

    groups_in_flight: int


class Observed(Protocol):
    """What the app needs of the actor it speaks for; called from the HTTP thread."""

    def status(self) -> ActorStatus: ...

    def not_ready(self) -> str | None: ...

    def host(self) -> Host | None: ...

    def sync_now(self) -> str: ...

    def start_drain(self) -> None: ...


def build_app(actor: Observed, blobs: BlobStore, gauges: Gauges, auth: AuthConfig) -> FastAPI:
    """Make the actor's app; it hands the blobs that it has verified on to its peers."""
    app = create_app("actor", auth=auth, ready=actor.not_ready, registry=gauges.registry)
    app.include_router(blob_routes(blobs))
    app.include_router(openai_routes(lambda: actor.host()))
    operator = [require(Scope.OPERATOR)]

    @app.get("/v1/status", dependencies=[require(Scope.READER)], tags=["status"])
    def status() -> ActorStatus:
        """What the actor runs and how fast."""
        return actor.status()

    @app.post("/v1/weights/sync", dependencies=operator, tags=["operator"])
    def sync() -> Synced:
        """Pull and apply the latest version now."""
        try:
            return Synced(version=actor.sync_now())
        except WeightsError as error:
            raise ApiError(502, "sync_failed", str(error), "see whether the learner answers") from None

    @app.post("/v1/drain", dependencies=operator, tags=["operator"])
    def drain() -> Draining:
        """Take no more tasks, finish those in flight, and exit."""
        actor.start_drain()
        return Draining(groups_in_flight=actor.status().groups_in_flight)

    return app
