"""What the page asks a learner for: curves, rollouts, events; over real sockets where it is about those."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from pydantic import BaseModel, SecretStr

from aspo.config import AuthConfig
from aspo_learner import stream
from aspo_learner.history import History
from aspo_learner.live import page_files
from aspo_learner.samples import Query, Samples
from browsing import Learner, Words, figures, group, traces
from services import wait_until

AUTH = AuthConfig(reader_token=SecretStr("reader"))
READER = {"Authorization": "Bearer reader"}


def test_curves_are_means_over_equal_stretches_and_grow() -> None:
    steps = [figures(step) for step in range(1, 1001)]
    del steps[4]["reward"]
    for metrics in steps[:8]:
        metrics["set_reward/a"] = 2.0
    history = History(lambda: steps)
    page = history.columns(["reward", "set_reward"], points=250, first=0, last=None)
    assert (page.steps, page.stride, page.first, page.last) == (1000, 4, 0, 1000)
    assert page.columns.keys() == {"step", "reward", "set_reward/a"}
    assert page.columns["step"] == [float(step) for step in range(4, 1001, 4)]
    rewards = [np.mean([m["reward"] for m in steps[i : i + 4] if "reward" in m]) for i in range(0, 1000, 4)]
    assert page.columns["reward"] == pytest.approx(rewards, rel=1e-5)
    assert page.columns["set_reward/a"][:3] == [2.0, 2.0, None]
    steps += [figures(step) for step in range(1001, 1004)]
    tail = history.columns(["reward"], points=250, first=1000, last=None)
    assert tail.columns["step"] == [1001.0, 1002.0, 1003.0]
    assert history.columns(["reward"], points=2, first=1000, last=5000).columns["step"] == [1002.0, 1003.0]
    assert History(list).columns(["reward"], points=9, first=0, last=None).columns == {"step": []}


def filled(steps: int = 3, **bounds: int) -> Samples:
    samples = Samples(Words(), **bounds)
    for step in range(1, steps + 1):
        trained, other = group(step, 0), group(step, 1)
        samples.keep(step, [other, trained], traces(trained))
    return samples


def test_rollouts_are_found_by_what_they_are_and_say() -> None:
    samples = filled()
    every = samples.find(Query(limit=200)).rollouts
    assert [row.number for row in every] == list(range(47, -1, -1))

    def numbers(**conditions: object) -> set[int]:
        return {row.number for row in samples.find(Query(limit=200, **conditions)).rollouts}

    def those(condition: object) -> set[int]:
        return {row.number for row in every if condition(row)}  # type: ignore[operator]

    assert numbers(step=2) == those(lambda row: row.step == 2)
    assert numbers(advantage="positive") == those(lambda row: row.advantage is not None and row.advantage > 0)
    assert numbers(advantage="none") == those(lambda row: row.advantage is None)
    assert numbers(actor="actor-1") == those(lambda row: row.actor == "actor-1")
    assert numbers(version="sums/1/4") == those(lambda row: row.step == 3)
    assert numbers(min_reward=0.5) == those(lambda row: row.reward == 1)
    assert numbers(max_reward=0.5, step=1) == those(lambda row: row.reward == 0 and row.step == 1)
    said = {n for n in range(48) if "SEVEN IS" in "".join(samples.get(n).pieces).upper()}
    assert numbers(text="Seven Is") == said != set()
    worst = samples.find(Query(order="difference", limit=200)).rollouts
    found = [row.difference for row in worst if row.difference is not None]
    assert found == sorted(found, reverse=True)
    assert worst[-1].difference is None
    first = samples.find(Query(limit=10))
    samples.keep(4, [group(4, 0)], {})
    second = samples.find(Query(limit=10, offset=10, until=first.until))
    assert [row.number for row in second.rollouts] == list(range(37, 27, -1)), "what came since moves nothing"


def test_a_rollout_is_told_token_by_token() -> None:
    samples, source = filled(1), group(1, 0)
    trace = traces(source)[source.uid, 2]
    rollout = samples.get(2)
    assert rollout is not None
    part = slice(source.offsets[2], source.offsets[3])
    words = Words()
    assert rollout.pieces == [words.batch_decode([[t]])[0] for t in source.token_ids[part].tolist()]
    assert rollout.behavior == pytest.approx(source.behavior_logprobs[part].tolist(), abs=1e-4)
    assert rollout.learner == pytest.approx(trace.logprobs.tolist(), abs=1e-4)
    assert rollout.weights == pytest.approx(trace.weights.tolist(), abs=1e-4)
    assert rollout.advantage == trace.advantage
    assert sum(length for _, length in rollout.spans) == rollout.tokens == len(rollout.pieces)
    assert rollout.difference == pytest.approx(
        np.abs(trace.logprobs - source.behavior_logprobs[part]).mean(), abs=1e-4
    )
    untrained = samples.get(9)
    assert untrained is not None
    assert set(untrained.learner) == set(untrained.weights) == {None}


def test_old_rollouts_make_room_by_number_and_by_tokens() -> None:
    by_number, by_tokens = filled(5, kept=20), filled(5, kept_tokens=200)
    assert [row.number for row in by_number.find(Query(limit=200)).rollouts] == list(range(79, 59, -1))
    assert by_number.get(59) is None
    assert by_number.get(60) is not None
    kept = by_tokens.find(Query(limit=200)).rollouts
    assert 100 < sum(row.tokens for row in kept) <= 200
    samples = filled(0, kept_tokens=10)
    samples.keep(1, [group(1, 0, tokens=100)], {})
    assert samples.find(Query()).matched == 1, "the newest stays, however long"
    assert samples.get(-1) is None


@contextmanager
def following(url: str, last_id: str = "") -> Iterator[http.client.HTTPResponse]:
    """Follow the events of a learner."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=15)
    connection.request("GET", "/v1/events", headers=READER | ({"Last-Event-ID": last_id} if last_id else {}))
    try:
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()


def event(answer: http.client.HTTPResponse) -> tuple[str, dict[str, object], str]:
    """Read one event: its name, data and id."""
    fields: dict[str, str] = {}
    while line := answer.readline().decode().rstrip("\n"):
        name, _, value = line.partition(": ")
        fields[name] = value
    if "event" not in fields:
        raise EOFError
    return fields["event"], json.loads(fields["data"]), fields.get("id", "")


def next_of(answer: http.client.HTTPResponse, wanted: str) -> tuple[dict[str, object], str]:
    while True:
        name, data, event_id = event(answer)
        if name == wanted:
            return data, event_id


def is_admitted(url: str) -> bool:
    with following(url) as answer:
        return answer.status == 200


def test_events_tell_every_step_once_and_go_on_where_a_client_was(tmp_path: Path) -> None:
    learner = Learner(tmp_path, steps=2)
    with learner.serve(AUTH) as server:
        with following(server.url) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert event(answer)[:2] == ("hello", {"run": "sums", "resumed": False})
            assert next_of(answer, "status")[0]["step"] == 2
            learner.add()
            step, last_id = next_of(answer, "step")
            assert step == learner.metrics[2]
            assert next_of(answer, "status")[0]["step"] == 3
        for _ in range(2):
            learner.add()
        with following(server.url, last_id) as answer:
            assert event(answer)[:2] == ("hello", {"run": "sums", "resumed": True})
            assert [next_of(answer, "step")[0]["step"] for _ in range(2)] == [4.0, 5.0]
        with following(server.url, "00000000-3") as answer:
            assert not event(answer)[1]["resumed"], "another learner's number"


def test_a_figure_that_is_no_number_is_told_as_json() -> None:
    told = stream.encode("step", {"step": 3.0, "clip_fraction_pos": float("nan"), "grad_norm": float("inf")})
    head, data = told.decode().splitlines()[:2]
    assert head == "event: step"
    strict = json.loads(data.removeprefix("data: "), parse_constant=pytest.fail)
    assert strict == {"step": 3.0, "clip_fraction_pos": None, "grad_norm": None}


async def test_a_look_that_fails_ends_the_streams(caplog: pytest.LogCaptureFixture) -> None:
    def status() -> BaseModel:
        raise OSError("the disk is on fire")

    feed, closing = stream.Feed(History(list), status, "r"), asyncio.Event()
    queue = feed.join(None, closing)
    assert b"event: hello" in await queue.get()
    assert await asyncio.wait_for(queue.get(), 5) == b""


def test_streams_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_STREAMS", 2)
    with Learner(tmp_path).serve(AUTH) as server, following(server.url) as one:
        event(one)
        with following(server.url) as two, following(server.url) as three:
            event(two)
            assert (three.status, json.load(three)["error"]["code"]) == (503, "too_many_streams")
        wait_until(lambda: is_admitted(server.url), 5)  # as soon as it is noticed that one has gone


def test_streams_end_with_the_server(tmp_path: Path) -> None:
    with Learner(tmp_path).serve(AUTH) as server, following(server.url) as last:
        event(last)
        stopping = threading.Thread(target=server.__exit__, args=(None, None, None))
        begun = time.monotonic()
        stopping.start()
        assert last.read().endswith(b"\n\n"), "a whole event, and the end"
        stopping.join()
        assert time.monotonic() - begun < 2.0


async def test_who_takes_nothing_is_dropped_and_the_others_are_not(tmp_path: Path) -> None:
    learner = Learner(tmp_path)
    feed = stream.Feed(learner.live.history, learner.status, "sums")
    closing = stream.asyncio.Event()
    idle, keen = feed.join(None, closing), feed.join(None, closing)
    heard = b""
    for _ in range(stream.BACKLOG + 1):
        heard += keen.get_nowait()
        feed._tell(b"news ")
    assert idle.qsize() == 1
    assert idle.get_nowait() == b"", "what is left is the end"
    assert heard.count(b"news") == stream.BACKLOG
    feed.leave(keen)
    closing.set()
    await feed._watching


def test_the_page_is_small_whole_and_runs_nothing_foreign(tmp_path: Path) -> None:
    files = page_files()
    assert sum(map(len, files.values())) < 300_000
    text = b"".join(body for name, body in files.items() if not name.startswith("vendor/"))
    assert b"http://" not in text.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in text
    for name in ("index.html", "page.css", "main.js"):
        assert b"style=" not in files["index.html"]
        assert name in files
    with Learner(tmp_path).serve(AUTH) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)

        def ask(path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read()

        answer, body = ask("/")
        assert body == files["index.html"]
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        answer, body = ask("/page/vendor/uplot.js", **{"Accept-Encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip"
        assert len(body) < len(files["vendor/uplot.js"]) / 2
        answer, body = ask("/", **{"If-None-Match": answer.headers["etag"]})
        assert answer.status == 200, "another file's tag"
        answer, body = ask("/", **{"If-None-Match": answer.headers["etag"]})
        assert (answer.status, body) == (304, b"")
        for path in (
            "/page/../live.py",
            "/page/vendor",
            "/page/",
            "/page/vendor/LICENSE-uplot.txt",
            "/page/%2e%2e/x",
        ):
            assert ask(path)[0].status == 404, path
        connection.close()
