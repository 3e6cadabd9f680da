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
from aspo.config import AuthConfig, CanaryConfig
from aspo.http import ServeError, Server, listen
from aspo.presence import ActorStatus
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges
from aspo.weights.blobs import BlobStore
from aspo.weights.leases import Leases
from aspo.weights.store import WeightStore
from aspo_learner.releases import Releases
from versions import FILES, tensors, version

AUTH = AuthConfig(
    reader_token=SecretStr("reader"), actor_token=SecretStr("actor"), operator_token=SecretStr("operator")
)
PUBLIC = {"/livez", "/readyz", "/metrics"}


class StubLearner:
    def __init__(self) -> None:
        self.controls = aspo_learner.app.Controls()
        self.releases: Releases | None = None

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
        return aspo_actor.app.build_app(
            StubActor(), BlobStore(tmp_path), Gauges("actor", ACTOR_METRICS), AUTH
        )
    return learner_app(StubLearner(), WeightStore(tmp_path))


def learner_app(learner: StubLearner, store: WeightStore) -> FastAPI:
    gauges, leases = Gauges("learner", LEARNER_METRICS), Leases()
    learner.releases = Releases(store, leases, CanaryConfig())
    return aspo_learner.app.build_app(learner, store, leases, gauges, AUTH)


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with Server(app, listen("127.0.0.1", 0, AUTH)) as server:
        yield server.url


def call(url: str, method: str = "GET", token: str | None = None, body: object = None) -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    data = None if body is None else json.dumps(body).encode()
    headers |= {"Content-Type": "application/json"} if data else {}
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
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
            # An actor reports on its trials; all else that changes something is an operator's.
            for token in ("reader",) if route.path.endswith("/report") else ("reader", "actor"):
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
    app = learner_app(learner, WeightStore(tmp_path))
    with Server(app, listen("127.0.0.1", 0, AUTH)) as server:
        assert call(f"{server.url}/v1/pause", "POST", "operator") == (200, '{"state":"paused"}')
        assert not learner.controls.running.is_set()
        assert call(f"{server.url}/v1/resume", "POST", "operator") == (200, '{"state":"running"}')
        assert learner.controls.running.is_set()
        assert call(f"{server.url}/v1/checkpoint", "POST", "operator")[0] == 200
        assert learner.controls.checkpoint.is_set()


def test_the_operator_decides_what_is_live(tmp_path: Path) -> None:
    learner, store = StubLearner(), WeightStore(tmp_path)
    app = learner_app(learner, store)
    with Server(app, listen("127.0.0.1", 0, AUTH)) as server:

        def post(path: str, body: object = None) -> int:
            return call(server.url + path, "POST", "operator", body)[0]

        assert post("/v1/weights/snapshot") == 404
        for step in range(3):
            store.put(version(step), tensors(step), FILES)
        assert post("/v1/weights/rollback", {"version": "r/1/0"}) == 200
        assert (store.live(), store.held(), learner.controls.continue_from) == (version(0), True, None)
        assert post("/v1/weights/rollback", {"version": "r/1/1", "continue_training": True}) == 200
        assert (store.live(), learner.controls.continue_from) == (version(1), version(1))
        assert post("/v1/weights/r/1/2/promote") == 200
        assert (store.live(), store.held()) == (version(2), False)
        assert post("/v1/weights/snapshot") == 200
        assert post("/v1/weights/r/1/9/promote") == 404
        assert post("/v1/weights/rollback", {"version": "../x"}) == 400
        assert post("/v1/weights/rollback", {}) == 422
        report = {"client": "actor-0", "finite": True, "kl": 0.0}
        assert post("/v1/weights/r/1/2/report", report) == 200
        assert post("/v1/weights/r/1/2/report", {**report, "kl": "nan"}) == 422


def test_a_public_address_needs_tokens_and_a_port_must_be_free() -> None:
    with pytest.raises(ServeError, match=r"refusing to serve on 0\.0\.0\.0 without tokens"):
        listen("0.0.0.0", 0, AuthConfig())
    with (
        socket.create_server(("127.0.0.1", 0)) as busy,
        pytest.raises(ServeError, match="choose another port"),
    ):
        listen("127.0.0.1", busy.getsockname()[1], AuthConfig())
