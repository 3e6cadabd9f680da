"""Both services keep to their OpenAPI documents, asked with generated requests over a real socket."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr

import aspo_actor.app
import aspo_learner.app
from aspo.config import AuthConfig, CanaryConfig
from aspo.http import Server, listen
from aspo.presence import ActorStatus
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges
from aspo.weights.blobs import BlobStore
from aspo.weights.leases import Leases
from aspo.weights.store import WeightStore
from aspo_actor.openai_routes import Asked
from aspo_learner.live import Live
from aspo_learner.releases import Releases
from versions import FILES, tensors, version

AUTH = AuthConfig(actor_token=SecretStr("actor"), operator_token=SecretStr("operator"))
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,ignored_auth,allow_header_conformance"
)


class Learner:
    def __init__(self, store: WeightStore, leases: Leases) -> None:
        self.controls = aspo_learner.app.Controls()
        self.releases = Releases(store, leases, CanaryConfig())

    def status(self) -> aspo_learner.app.LearnerStatus:
        return aspo_learner.app.LearnerStatus(run="r", phase="training", version=None, step=1, steps=2)

    def not_ready(self) -> str | None:
        return None

    def unsure(self) -> str | None:
        return None


class Host:
    version = "r/1/0"

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": []}

    async def answer(self, asked: Asked) -> tuple[str, str]:
        return "{}", self.version

    async def stream(self, asked: Asked) -> AsyncGenerator[str]:
        for _ in range(asked.samples):
            yield "data: {}\n\n"


class Actor:
    def host(self) -> Host:
        return Host()

    def status(self) -> ActorStatus:
        return ActorStatus(id="actor-0", run="r", url="", state="sampling", version="r/1/0")

    def not_ready(self) -> str | None:
        return None

    def sync_now(self) -> str:
        return "r/1/0"

    def start_drain(self) -> None: ...


def learner_app(folder: Path) -> FastAPI:
    store, leases = WeightStore(folder), Leases()
    for step in range(2):
        store.put(version(step), tensors(step), FILES)
    learner = Learner(store, leases)
    return aspo_learner.app.build_app(
        learner, store, leases, Gauges("learner", LEARNER_METRICS), AUTH, Live("r", list, None)
    )


def actor_app(folder: Path) -> FastAPI:
    blobs = BlobStore(folder)
    return aspo_actor.app.build_app(Actor(), blobs, Gauges("actor", ACTOR_METRICS), AUTH)


@pytest.mark.parametrize("make", [learner_app, actor_app])
def test_every_answer_is_as_the_document_says(make: Callable[[Path], FastAPI], tmp_path: Path) -> None:
    with Server(make(tmp_path / "weights"), listen("127.0.0.1", 0, AUTH)) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        command += ["--header", "Authorization: Bearer operator", "--checks", CHECKS, "--seed", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--no-color"]
        command += ["--exclude-path", "/v1/events"]  # it does not end
        command += ["--request-timeout", "70", "--generation-database", "none", "--continue-on-failure"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr
