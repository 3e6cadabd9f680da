"""All services' routes over real sockets: nothing but probes without a token, errors of one shape."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import SecretStr

import aspo_actor.app
import aspo_learner.app
from aspo.config import AuthConfig, CanaryConfig, HttpConfig
from aspo.http import Scope, ServeError, Server, listen
from aspo.presence import ActorStatus
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges
from aspo.weights.blobs import BlobStore
from aspo.weights.leases import Leases
from aspo.weights.relay import Relay
from aspo.weights.store import WeightStore
from aspo_learner.live import Live
from aspo_learner.releases import Releases
from versions import FILES, tensors, version

AUTH = AuthConfig(
    reader_token=SecretStr("reader"), actor_token=SecretStr("actor"), operator_token=SecretStr("operator")
)
PROBES = {"/livez", "/readyz", "/metrics"}
# The page itself: a browser sends no token with what is typed into its address bar, and it holds no data.
PAGE = {"/", "/page/{name:path}"}


class StubLearner:
    def __init__(self) -> None:
        self.controls = aspo_learner.app.Controls()
        self.releases: Releases | None = None

    def status(self) -> aspo_learner.app.LearnerStatus:
        return aspo_learner.app.LearnerStatus(run="r", phase="training", version=None, step=1, steps=2)

    def not_ready(self) -> str | None:
        return "no version is published yet"

    def unsure(self) -> str | None:
        return None


class StubActor:
    def status(self) -> ActorStatus:
        raise RuntimeError("secret detail")

    def not_ready(self) -> str | None:
        return None

    def host(self) -> None:
        return None

    def sync_now(self) -> str:
        return "r/1/1"

    def start_drain(self) -> None: ...


def learner_app(learner: StubLearner, store: WeightStore) -> FastAPI:
    gauges, leases = Gauges("learner", LEARNER_METRICS), Leases()
    learner.releases = Releases(store, leases, CanaryConfig())
    return aspo_learner.app.build_app(learner, store, leases, gauges, AUTH, Live("r", list, None))


def relay_app(folder: Path) -> FastAPI:
    relay = Relay("http://127.0.0.1:1", folder, AUTH, HttpConfig())
    relay.place.listener.close()
    return relay.app


APPS: dict[str, Callable[[Path], FastAPI]] = {
    "learner": lambda folder: learner_app(StubLearner(), WeightStore(folder)),
    "actor": lambda folder: aspo_actor.app.build_app(
        StubActor(), BlobStore(folder), Gauges("actor", ACTOR_METRICS), AUTH
    ),
    "relay": relay_app,
}


@pytest.fixture(params=["learner", "actor"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> FastAPI:
    return APPS[request.param](tmp_path)


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
            stream = response.headers["content-type"].startswith("text/event-stream")  # it has no end
            return response.status, (response.readline() if stream else response.read()).decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every (method, path) that the app answers, in its document or not."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes)  # no mount and no page that FastAPI adds by itself
    return [(method, route.path) for route in routes for method in route.methods]


def least_scope(method: str, path: str) -> Scope:
    """The least of the scopes that may call a route; what is not listed is for operators alone."""
    readers = ["/v1/status", "/v1/weights", "/docs", "/openapi.json", "/v1/models"]
    readers += ["/v1/events", "/v1/history", "/v1/rollouts", "/v1/rollouts/{number}", "/v1/quarantine"]
    if path in (*readers, "/v1/completions", "/v1/chat/completions"):
        return Scope.READER
    if path.endswith("/report") or (method == "GET" and path.startswith(("/v1/weights/", "/v1/blobs/"))):
        return Scope.ACTOR
    return Scope.OPERATOR


@pytest.mark.parametrize("service", ["learner", "actor", "relay"])
def test_every_route_but_the_probes_and_the_page_wants_a_token_of_its_scope(
    service: str, tmp_path: Path
) -> None:
    app = APPS[service](tmp_path)
    ranks = {"reader": 0, "actor": 1, "operator": 2}
    with Server(app, listen("127.0.0.1", 0, AUTH)) as server:
        routes = routes_of(app)
        open_ones = PROBES | (PAGE if service == "learner" else set())
        assert {path for _, path in routes} > open_ones
        for method, path in routes:
            if path in open_ones:
                assert call(server.url + path.replace("{name:path}", "page.css"), method)[0] in (200, 503)
                continue
            scope = least_scope(method, path)
            refused = {None: 401, "": 401, "wrong": 403}
            refused |= {name: 403 for name, rank in ranks.items() if rank < ranks[scope.value]}
            for token, expected in refused.items():
                status, body = call(server.url + path, method, token)
                assert status == expected, (method, path, token)
                assert json.loads(body)["error"]["hint"]
            for name in ranks.keys() - refused.keys():  # what follows the check may fail, the check not
                assert call(server.url + path, method, name)[0] not in (401, 403), (method, path, name)


def test_an_unauthorised_answer_says_how_to_ask_and_another_method_which(app: FastAPI, url: str) -> None:
    for method, status, header, value in (
        ("GET", 401, "www-authenticate", "Bearer"),
        ("DELETE", 405, "allow", "GET"),
    ):
        request = urllib.request.Request(f"{url}/v1/status", method=method)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        with caught.value as answer:
            assert (answer.code, answer.headers[header]) == (status, value)


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


def test_without_tokens_foreign_pages_are_not_answered(tmp_path: Path) -> None:
    learner = StubLearner()
    app = learner_app(learner, WeightStore(tmp_path))
    app.state.auth = AuthConfig()
    with Server(app, listen("127.0.0.1", 0, AuthConfig())) as server:
        here = server.url.removeprefix("http://")

        def pause(**headers: str) -> tuple[bool, str]:
            learner.controls.running.set()
            request = urllib.request.Request(f"{server.url}/v1/pause", method="POST", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=10) as response:
                    said = response.read().decode()
            except urllib.error.HTTPError as error:
                said = error.read().decode()
            return not learner.controls.running.is_set(), said

        own = [{}, {"Host": "localhost:1"}, {"Host": "[::1]"}, {"Origin": server.url}]
        assert [pause(**headers)[0] for headers in own] == [True] * len(own)
        hosts = [f"rebound.example:{here.rpartition(':')[2]}", "127.0.0.1.example", "0.0.0.0", "["]
        origins = ["http://elsewhere.example", "http://127.0.0.1:1", "null"]
        foreign = [{"Host": host} for host in hosts] + [{"Origin": origin} for origin in origins]
        for headers in foreign:
            paused, said = pause(**headers)
            assert (paused, json.loads(said)["error"]["code"]) == (False, "not_local"), headers


def test_a_public_address_needs_tokens_and_a_port_must_be_free() -> None:
    with pytest.raises(ServeError, match=r"refusing to serve on 0\.0\.0\.0 without tokens"):
        listen("0.0.0.0", 0, AuthConfig())
    with (
        socket.create_server(("127.0.0.1", 0)) as busy,
        pytest.raises(ServeError, match="choose another port"),
    ):
        listen("127.0.0.1", busy.getsockname()[1], AuthConfig())
