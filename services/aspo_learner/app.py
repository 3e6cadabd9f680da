"""The learner's HTTP face: probes, status, weights, and the operator's verbs."""

from __future__ import annotations

import threading
from typing import Protocol

from fastapi import FastAPI
from pydantic import BaseModel

from aspo.config import AuthConfig
from aspo.http import Scope, create_app, require
from aspo.presence import ActorStatus
from aspo.telemetry import Gauges
from aspo.weights.server import weight_routes
from aspo.weights.store import WeightStore


class LearnerStatus(BaseModel):
    """What a learner is doing; metrics are those of the last step, names as in metrics.jsonl."""

    run: str
    phase: str
    version: str | None
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
    metrics: dict[str, float] = {}
    actors: list[ActorStatus] = []


class Controls:
    """What an operator asks of the training thread."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.running.set()
        self.checkpoint = threading.Event()
        self.stop = threading.Event()


class Acknowledgement(BaseModel):
    """The answer to an operator's verb."""

    state: str


class Observed(Protocol):
    """What the app needs of the learner it speaks for; called from the HTTP thread."""

    controls: Controls

    def status(self) -> LearnerStatus: ...

    def not_ready(self) -> str | None: ...


def build_app(learner: Observed, store: WeightStore, gauges: Gauges, auth: AuthConfig) -> FastAPI:
    """Make the learner's app."""
    app = create_app("learner", auth=auth, ready=learner.not_ready, registry=gauges.registry)
    app.include_router(weight_routes(store))
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
