"""`aspo top` over a real socket: JSON lines, a learner that goes away, and what fits 80 columns."""

from __future__ import annotations

import json

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.presence import ActorStatus
from aspo_cli.top import Series, looks, sparkline, view, watch
from aspo_learner.app import LearnerStatus

METRICS = {"reward": 0.5, "entropy": 1.25, "wait_seconds": 1.0, "train_seconds": 2.0, "publish_seconds": 1.0}


def status(step: int = 12, reward: float = 0.5, **fields: object) -> dict[str, object]:
    actors = [
        ActorStatus(id=name, run="r", url="", state="sampling", version=version, tokens_per_second=1000.0)
        for name, version in (("a", "r/1/10"), ("b", "r/1/12"), ("old", "r/0/99"), ("new", ""))
    ]
    told = LearnerStatus(
        run="r",
        phase="training",
        version="r/1/12",
        step=step,
        steps=50,
        metrics=METRICS | {"reward": reward},
        actors=actors,
    )
    return told.model_dump() | fields


def shown(what: object, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█"
    assert sparkline([5, 5], 10) == "▁▁"
    assert sparkline(list(range(100)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([], 8) == ""


def test_the_screen_fits_80_columns_and_says_lags_times_and_trouble() -> None:
    series = Series()
    for step in range(1, 13):
        series.add(status(step, reward=step / 12))
    text = shown(view(status(), series, RuntimeError("no learner answers")))
    assert max(map(len, text.splitlines())) <= 80
    assert "no learner answers" in text
    assert "wait 1.00 s  train 2.00 s  publish 1.00 s" in text
    assert "▁▂▂▃▄▄▅▅▆▇▇█" in text
    lags = {line.split()[0]: line.split()[3] for line in text.splitlines() if "sampling" in line}
    assert lags == {"a": "2", "b": "0", "old": "-", "new": "-"}


def test_a_learner_that_goes_back_takes_its_steps_with_it() -> None:
    series = Series()
    for step, reward in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        series.add(status(step, reward))
    assert series["reward"] == [0.1, 0.25]


def test_as_json_it_is_a_line_for_each_look_also_when_the_learner_is_gone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = create_app("learner", auth=AuthConfig(), ready=lambda: None, registry=CollectorRegistry())
    asked: list[int] = []

    @app.get("/v1/status")
    def answer() -> dict[str, object]:
        asked.append(1)
        return status(step=len(asked))

    with Server(app, listen("127.0.0.1", 0, AuthConfig())) as server:
        statuses = looks(server.url, None, every_s=0.0, count=3)
        seen = [next(statuses), next(statuses)]
        watch(server.url, None, every_s=0.0, count=2, as_json=True)
    status_now, trouble = next(statuses)
    assert [one["step"] for one, _ in seen] == [1, 2]
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [3, 4]
    assert status_now["step"] == 2
    assert "no learner answers" in str(trouble)
    assert next(statuses, None) is None
