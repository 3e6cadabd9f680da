"""Both services' routes over real sockets: nothing but probes without a token, errors of one shape."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import SecretStr

import aspo_actor.app
import aspo_learner.app
from aspo.config import AuthConfig
from aspo.http import ServeError, Server, listen
from aspo.presence import ActorStatus
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges
from aspo.weights.store import WeightStore

AUTH = AuthConfig(
    reader_token=SecretStr("reader"), actor_token=SecretStr("actor"), operator_token=SecretStr("operator")
)
PUBLIC = {"/livez", "/readyz", "/metrics"}


class StubLearner:
    def __init__(self) -> None:
        self.controls = aspo_learner.app.Controls()

    def status(self) -> aspo_learner.app.LearnerStatus:
        return aspo_learner.app.LearnerStatus(run="r", phase="training", version=None, step=1, steps=2)

    def not_ready(self) -> str | None:
        return "no version is published yet"


class StubActor:
    def status(self) -> ActorStatus:
        raise RuntimeError("secret detail")

    def not_ready(self) -> str | None:
        return None

    def sync_now(self) -> str:
        return "r/1/1"

    def start_drain(self) -> None: ...


@pytest.fixture(params=["learner", "actor"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> FastAPI:
    if request.param == "actor":
        return aspo_actor.app.build_app(StubActor(), Gauges("actor", ACTOR_METRICS), AUTH)
    gauges = Gauges("learner", LEARNER_METRICS)
    return aspo_learner.app.build_app(StubLearner(), WeightStore(tmp_path), gauges, AUTH)


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with Server(app, listen("127.0.0.1", 0, AUTH)) as server:
        yield server.url


def call(url: str, method: str = "GET", token: str | None = None) -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=headers), timeout=10
        ) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_every_route_but_the_probes_wants_a_token(app: FastAPI, url: str) -> None:
    paths: dict[str, Any] = app.openapi()["paths"]
    routes = [(path, method.upper()) for path, methods in paths.items() for method in methods]
    assert len(routes) > 4
    for path, method in routes:
        for token in (None, "", "wrong"):
            status, body = call(url + path, method, token)
            if path in PUBLIC:
                assert status in (200, 503)
            else:
                assert status in (401, 403), path
                assert json.loads(body)["error"]["hint"]


def test_changing_routes_want_the_operator(app: FastAPI, url: str) -> None:
    for route in app.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods:
            for token in ("reader", "actor"):
                assert call(url + route.path, "POST", token)[0] == 403


def test_probes_and_errors_mean_what_they_say(app: FastAPI, url: str) -> None:
    status, body = call(f"{url}/readyz")
    assert (status, body) == (
        (503, "no version is published yet") if app.title == "ASPO learner" else (200, "ok")
    )
    status, body = call(f"{url}/v1/status", token="reader")
    if app.title == "ASPO learner":
        assert (status, json.loads(body)["phase"]) == (200, "training")
    else:
        assert status == 500
        assert "secret detail" not in body
        assert json.loads(body)["error"]["code"] == "internal"
    for path, status in (("/nothing", 404), ("/v1/weights/latest?wait=never", 422)):
        if app.title == "ASPO learner" or status == 404:
            found, body = call(url + path, token="actor")
            assert found == status
            assert json.loads(body)["error"]["message"]


def test_the_operator_pauses_and_resumes(tmp_path: Path) -> None:
    learner = StubLearner()
    app = aspo_learner.app.build_app(learner, WeightStore(tmp_path), Gauges("learner", LEARNER_METRICS), AUTH)
    with Server(app, listen("127.0.0.1", 0, AUTH)) as server:
        assert call(f"{server.url}/v1/pause", "POST", "operator") == (200, '{"state":"paused"}')
        assert not learner.controls.running.is_set()
        assert call(f"{server.url}/v1/resume", "POST", "operator") == (200, '{"state":"running"}')
        assert learner.controls.running.is_set()
        assert call(f"{server.url}/v1/checkpoint", "POST", "operator")[0] == 200
        assert learner.controls.checkpoint.is_set()


def test_a_public_address_needs_tokens_and_a_port_must_be_free() -> None:
    with pytest.raises(ServeError, match=r"refusing to serve on 0\.0\.0\.0 without tokens"):
        listen("0.0.0.0", 0, AuthConfig())
    with (
        socket.create_server(("127.0.0.1", 0)) as busy,
        pytest.raises(ServeError, match="choose another port"),
    ):
        listen("127.0.0.1", busy.getsockname()[1], AuthConfig())
