"""A model learns to use a tool: the calculator's example, as its first lines say to run it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from aspo_cli.processes import free_port
from project import metrics_of
from services import Service, redis_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "calculator"
pytestmark = [pytest.mark.vllm, pytest.mark.faults, pytest.mark.timeout(600)]


def test_the_model_learns_to_ask_the_calculator(tmp_path: Path) -> None:
    runpy.run_path(str(EXAMPLE / "prepare.py"))["prepare"](tmp_path / "calculator")
    folder = tmp_path / "redis"
    folder.mkdir()
    port = free_port()
    with redis_server(folder) as url:
        up = Service(
            *(tmp_path, "up", "--config", str(EXAMPLE / "calculator.toml"), "--redis", url),
            *("--set", f"learner.port={port}", "--set", f"actor.learner_url=http://127.0.0.1:{port}"),
            *("--set", "actor.port=0"),
        )
        try:
            assert up.wait(500) == 0, up.text
        finally:
            up.kill()
    summary = json.loads((tmp_path / "runs/calculator/summary.json").read_text())
    steps = metrics_of(tmp_path, "calculator")
    assert summary["accuracy_before"] < 0.2
    assert summary["accuracy_after"] > 0.9
    assert steps[0]["turns"] < 1.5, "it answered by itself"
    assert steps[-1]["turns"] > 1.8, "it asks first"
    for m in steps:
        replies = (m["turns"] - 1) * m["tokens"] / m["response_length"]
        assert m["environment_tokens"] >= replies - 0.5
        assert m["ended_quarantined"] == 0
        assert m["reward_failed_fraction"] == 0
    fresh = [m for m in steps if m["staleness_max"] == 0]
    assert fresh
    for m in fresh:  # what was sampled in the second turn is what the learner scores there
        assert m["mismatch_ratio_max"] < 1.02
        assert m["mismatch_ratio_p01"] > 0.98
    evaluation = Service(
        *(tmp_path, "eval", "--config", str(EXAMPLE / "calculator.toml")),
        *("--model", "runs/calculator/model", "--out", "measured"),
    )
    assert evaluation.wait(200) == 0, evaluation.text
    [found] = json.loads((tmp_path / "measured/results.json").read_text())["sets"].values()
    assert found["figures"]["avg@1"]["value"] == summary["accuracy_after"]
    assert found["tokens_mean"] > 12, "a call and an answer"
