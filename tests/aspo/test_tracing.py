"""Traces: both services write into one trace for a task, and the same share of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aspo.config import Config, load_config
from aspo.schemas import PolicyVersion
from aspo.tracing import Traces

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
TIMES = {"claimed": 1.0, "sampled": 3.0, "scored": 4.0, "stored": 4.5}


def version(step: int) -> PolicyVersion:
    return PolicyVersion(epoch=1, step=step, run="r")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "my.toml"
    path.write_text('[model]\npath = "m"\n[data]\npath = "d"\n[trackers]\ntraces_share = 1.0\n')
    return load_config(path)


@pytest.fixture
def service(config: Config) -> Callable[[str], tuple[Traces, Any]]:
    def start(name: str, share: float = 1.0) -> tuple[Traces, Any]:
        exporter = memory.InMemorySpanExporter()
        trackers = config.trackers.model_copy(update={"traces_share": share})
        settings = config.model_copy(update={"trackers": trackers})
        return Traces(settings, name, f"{name}-0", exporter), exporter

    return start


def test_a_task_is_one_trace_from_the_claim_to_the_published_version(service: Callable[..., Any]) -> None:
    (actor, sampled), (learner, trained) = service("actor"), service("learner")
    actor.answered("r:train:7", **TIMES, tokens=512)
    learner.trained(["r:train:7"], version(3), taken=9.0, trained=10.0)
    learner.published(version(2))
    assert [span.name for span in trained.get_finished_spans()] == ["train"]  # 3 is not there yet
    learner.published(version(4))  # every second step is published
    spans = {span.name: span for span in (*sampled.get_finished_spans(), *trained.get_finished_spans())}
    assert set(spans) == {"task", "sample", "score", "store", "train", "publish"}
    root = spans.pop("task")
    assert root.parent is None
    assert root.attributes == {"aspo.uid": "r:train:7", "aspo.tokens": 512}
    assert root.resource.attributes["service.name"] == "aspo-actor"
    for span in spans.values():
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
    assert spans["train"].attributes["aspo.version"] == "r/1/3"
    assert spans["publish"].attributes["aspo.version"] == "r/1/4"
    assert (spans["sample"].end_time - spans["sample"].start_time) / 1e9 == pytest.approx(2.0)
    assert (spans["train"].start_time - root.end_time) / 1e9 == pytest.approx(4.5, abs=0.5)  # clocks' origins


def test_tasks_have_traces_of_their_own_and_another_answer_the_same(service: Callable[..., Any]) -> None:
    (one, first), (two, second) = service("actor"), service("actor")
    one.answered("r:train:1", **TIMES)
    one.answered("r:train:2", **TIMES)
    two.answered("r:train:1", **TIMES)
    ids = [[s.context.trace_id for s in e.get_finished_spans() if s.name == "task"] for e in (first, second)]
    assert len(set(ids[0])) == 2
    assert ids[1] == ids[0][:1]
    spans = [span.context.span_id for span in first.get_finished_spans()]
    assert len(set(spans)) == len(spans)


def test_both_services_trace_the_same_share(service: Callable[..., Any]) -> None:
    (actor, sampled), (learner, trained) = service("actor", share=0.2), service("learner", share=0.2)
    uids = [f"r:train:{i}" for i in range(200)]
    for uid in uids:
        actor.answered(uid, **TIMES)
    learner.trained(uids, version(1), taken=1.0, trained=2.0)
    theirs = {s.context.trace_id for s in sampled.get_finished_spans()}
    assert theirs == {s.context.trace_id for s in trained.get_finished_spans()}
    assert 20 <= len(theirs) <= 60


def test_switched_off_nothing_is_done(config: Config) -> None:
    traces = Traces(config, "actor", "actor-0")
    traces.answered("r:train:1", **TIMES)
    traces.trained(["r:train:1"], version(1), taken=1.0, trained=2.0)
    told: list[PolicyVersion] = []
    traces.after(told.append)(version(1))
    assert told == [version(1)]
    assert not (config.run.path / "traces").exists()
