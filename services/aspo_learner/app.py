"""The learner's HTTP face: probes, status, the live page, weights, and the operator's verbs."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel

from aspo.config import AuthConfig
from aspo.http import ApiError, Scope, create_app, require
from aspo.presence import ActorStatus
from aspo.schemas import PolicyVersion
from aspo.telemetry import Gauges
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from aspo_learner.live import Live, live_routes, page_routes
from aspo_learner.releases import Releases, TrialReport


class TrialStatus(BaseModel):
    """The version that an actor tries out for the others."""

    version: str
    canary: str


class LearnerStatus(BaseModel):
    """What a learner is doing; metrics are those of the last step, names as in metrics.jsonl.

    `trouble` says why Redis or the disk takes no writes, while it does not; `redis_losses` counts the times
    that Redis was found to have lost data, `trials` what became of the versions that a canary has tried;
    both since the learner's start. `without_actors_seconds` says for how long no actor has been alive, None
    while one is, or while `trouble` keeps them from saying so.
    """

    run: str
    phase: str
    version: str | None
    live: str | None = None
    held: bool = False
    trial: TrialStatus | None = None
    trials: dict[str, int] = {}
    step: int
    steps: int
    accuracy_before: float | None = None
    accuracy: float | None = None
    accuracy_after: float | None = None
    idle_fraction: float = 0.0
    tokens: int = 0
    rollouts: int = 0
    uptime_seconds: float = 0.0
    ended: dict[str, int] = {}
    trouble: str | None = None
    redis_losses: int = 0
    metrics: dict[str, float] = {}
    actors: list[ActorStatus] = []
    without_actors_seconds: float | None = None


class Controls:
    """What an operator asks of the training thread."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.running.set()
        self.checkpoint = threading.Event()
        self.stop = threading.Event()
        self.continue_from: PolicyVersion | None = None


class Acknowledgement(BaseModel):
    """The answer to an operator's verb."""

    state: str


class Observed(Protocol):
    """What the app needs of the learner it speaks for; called from the HTTP thread."""

    controls: Controls
    releases: Releases

    def status(self) -> LearnerStatus: ...

    def not_ready(self) -> str | None: ...

    def unsure(self) -> str | None: ...


class Rollback(BaseModel):
    """Which version to go back to, and whether the learner, too, is to continue from it."""

    version: str
    continue_training: bool = False


def build_app(
    learner: Observed, store: WeightStore, leases: Leases, gauges: Gauges, auth: AuthConfig, live: Live
) -> FastAPI:
    """Make the learner's app."""
    app = create_app("learner", auth=auth, ready=learner.not_ready, registry=gauges.registry)
    app.include_router(_release_routes(learner, store))
    app.include_router(weight_routes(store, leases), dependencies=[Depends(_require_sure(learner))])
    app.include_router(blob_routes(store.blobs))
    app.include_router(live_routes(live, lambda: learner.status()))
    app.include_router(page_routes())
    operator = [require(Scope.OPERATOR)]

    @app.get("/v1/status", dependencies=[require(Scope.READER)], tags=["status"])
    def status() -> LearnerStatus:
        """The learner's phase, last metrics, and the actors alive."""
        return learner.status()

    @app.post("/v1/pause", dependencies=operator, tags=["operator"])
    def pause() -> Acknowledgement:
        """Stop training after the current step; actors idle once their tasks are done."""
        learner.controls.running.clear()
        return Acknowledgement(state="paused")

    @app.post("/v1/resume", dependencies=operator, tags=["operator"])
    def resume() -> Acknowledgement:
        """Go on training."""
        learner.controls.running.set()
        return Acknowledgement(state="running")

    @app.post("/v1/checkpoint", dependencies=operator, tags=["operator"])
    def checkpoint() -> Acknowledgement:
        """Write a durable checkpoint after the current step."""
        learner.controls.checkpoint.set()
        return Acknowledgement(state="requested")

    return app


def _require_sure(learner: Observed) -> Callable[[], Awaitable[None]]:
    """Make the check that keeps a learner which overslept from calling its weights the latest."""

    async def check() -> None:
        if reason := learner.unsure():
            raise ApiError(503, "unsure", reason, "ask again: it finds out, or another learner answers")

    return check


def _release_routes(learner: Observed, store: WeightStore) -> APIRouter:
    """Make the routes that decide what is live."""
    router = APIRouter(tags=["weights"])
    operator = [require(Scope.OPERATOR)]

    @router.post("/v1/weights/rollback", dependencies=operator)
    def roll_back(body: Rollback) -> Acknowledgement:
        """Make an older version live and hold back later ones until one is promoted."""
        version = _kept(store, body.version)
        store.roll_back(version)
        learner.releases.overruled()
        if body.continue_training:
            learner.controls.continue_from = version
            return Acknowledgement(state=f"{version} is live; the learner continues from it after this step")
        return Acknowledgement(state=f"{version} is live; later versions wait for a promotion")

    @router.post("/v1/weights/snapshot", dependencies=operator)
    def snapshot() -> Acknowledgement:
        """Store the newest version whole as well, so that nobody has to come by deltas."""
        transfer = store.snapshot()
        if transfer is None:
            raise ApiError(404, "no_version", "no version is published yet", "wait for the first")
        return Acknowledgement(state=f"{transfer.version} has a snapshot of {transfer.size} bytes")

    @router.post("/v1/weights/{version:path}/promote", dependencies=operator)
    def promote(version: str) -> Acknowledgement:
        """Make a version live, and let later ones follow."""
        store.promote(_kept(store, version))
        learner.releases.overruled()
        return Acknowledgement(state=f"{version} is live; later versions follow")

    @router.post("/v1/weights/{version:path}/report", dependencies=[require(Scope.ACTOR)])
    def report(version: str, body: TrialReport) -> Acknowledgement:
        """Take a canary's report on a version that is on trial with it."""
        return Acknowledgement(state=learner.releases.report(_kept(store, version), body))

    return router


def _kept(store: WeightStore, text: str) -> PolicyVersion:
    try:
        version = PolicyVersion.parse(text)
    except ValueError as error:
        raise ApiError(400, "bad_version", str(error), "see /v1/weights for those there are") from None
    if store.manifest(version) is None:
        raise ApiError(404, "no_version", f"no version {version} is kept", "see /v1/weights")
    return version
