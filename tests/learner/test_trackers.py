"""Trackers: each is told every step offline, and none that fails or hangs stops training."""

from __future__ import annotations

import json
import logging
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aspo.config import Config, ConfigError, load_config
from aspo_learner.report import RunHistory
from aspo_learner.trackers import Trackers

STEPS = [{"step": float(i), "reward": i / 4, "reward_part/right": 0.5, "tokens": 8.0} for i in (1, 2, 3)]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    def configured(*overrides: str) -> Config:
        path = tmp_path / "my.toml"
        path.write_text('[model]\npath = "m"\n[data]\npath = "d"\n[auth]\nactor_token = "hunter2"\n')
        (tmp_path / "runs/sums").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/sums/id").write_text("0123456789abcdef")
        return load_config(path, [f"run.dir={tmp_path / 'runs'}", "run.name=sums", *overrides])

    return configured


def tell(config: Config) -> Trackers:
    """Tell the run's trackers of all steps, as a learner does."""
    history = RunHistory(config)
    for metrics in STEPS:
        history.add(metrics, rollouts=1)
    history.trackers.close()
    return history.trackers


def test_metrics_jsonl_is_written_whatever_the_trackers(configure: Callable[..., Config]) -> None:
    config = configure()
    assert tell(config).failures == 0
    lines = (config.run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [0.25, 0.5, 0.75]


def test_tensorboard_is_told(configure: Callable[..., Config]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure('trackers.use=["tensorboard"]')
    for _ in range(2):  # a learner that is started again, from no checkpoint
        (config.run.path / "metrics.jsonl").unlink(missing_ok=True)
        assert tell(config).failures == 0
    read = EventAccumulator(str(config.run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("reward")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert "reward_part/right" in read.Tags()["scalars"]
    text = b"".join(path.read_bytes() for path in (config.run.path / "tensorboard").iterdir())
    assert b"hunter2" not in text
    assert b"learner.steps = 1000" in text


def test_wandb_is_told_offline(configure: Callable[..., Config]) -> None:
    config = configure('trackers.use=["wandb"]', 'trackers.wandb={mode = "offline"}')
    assert tell(config).failures == 0
    (kept,) = (config.run.path / "wandb").glob("offline-run-*-0123456789abcdef/*.wandb")
    content = kept.read_bytes()
    assert b"reward_part/right" in content
    assert b"hunter2" not in content


def test_trackio_is_told(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure('trackers.use=["trackio"]')
    monkeypatch.setenv("TRACKIO_DIR", str(config.run.path / "trackio"))
    assert tell(config).failures == 0
    with sqlite3.connect(config.run.path / "trackio/aspo.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)["reward"]) for step, metrics in rows] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]


@pytest.mark.filterwarnings("ignore")  # of MLflow's own parts
def test_mlflow_is_told(configure: Callable[..., Config]) -> None:
    from mlflow import MlflowClient

    config = configure('trackers.use=["mlflow"]')
    assert tell(config).failures == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{config.run.path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("aspo").experiment_id])
    assert run.data.params["learner.steps"] == "1000"
    told = client.get_metric_history(run.info.run_id, "reward")
    assert [(one.step, one.value) for one in told] == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_one_that_is_not_installed_is_said_at_the_start(configure: Callable[..., Config]) -> None:
    class Missing:
        module = "no_such_module"

        def __init__(self, config: Config, first_step: int) -> None: ...

    with pytest.raises(ConfigError, match=r"'wandb', which is not installed; pip install 'aspo\[wandb\]'"):
        Trackers(configure('trackers.use=["wandb"]'), {"wandb": Missing})  # type: ignore[dict-item]


class Recorder:
    """A tracker that does as it is told."""

    def __init__(self, fail: Callable[[str], Any]) -> None:
        self.fail, self.told, self.opened, self.closed = fail, [], 0, False

    def __call__(self, config: Config, first_step: int) -> Recorder:
        self.opened += 1
        self.fail("open")
        return self

    def log(self, metrics: dict[str, float]) -> None:
        self.fail("log")
        self.told.append(metrics["step"])

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("where", ["open", "log"])
def test_one_that_fails_is_warned_of_once_and_counted_and_the_others_are_told(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def fail(at: str) -> None:
        if at == where:
            raise ConnectionError("no route")

    bad, good = Recorder(fail), Recorder(lambda at: None)
    config = configure('trackers.use=["wandb", "mlflow"]')
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(config, {"wandb": bad, "mlflow": good})
        for metrics in STEPS:
            trackers.log(metrics)
        trackers.close()
    assert good.told == [1, 2, 3]
    assert good.closed
    assert trackers.failures == 3
    assert bad.opened == 1
    assert [r.getMessage() for r in caplog.records] == [
        "tracker wandb fails (ConnectionError: no route); training goes on"
    ]


def test_one_that_hangs_holds_up_nothing(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang(at: str) -> None:
        hanging.set()
        release.wait()

    stuck = Recorder(hang)
    trackers = Trackers(configure('trackers.use=["wandb"]'), {"wandb": stuck})
    trackers.log(STEPS[0])
    hanging.wait(10)
    for _ in range(1005):
        trackers.log(STEPS[1])
    assert trackers.failures == 5  # what its backlog did not take
    trackers.close(timeout_s=0.01)
    few = Trackers(configure('trackers.use=["wandb"]'), {"wandb": stuck})
    few.log(STEPS[0])
    few.close(timeout_s=0.01)
    said = [r.getMessage().partition(";")[0] for r in caplog.records]
    assert said == ["a tracker hangs, and holds up the others", "a tracker hangs", "a tracker hangs"]
    release.set()


FAILING = """
import sys
from pathlib import Path
from aspo.config import load_config
from aspo_learner.trackers import Trackers

class Late:
    told = []
    def log(self, metrics):
        self.told.append(int(metrics["step"]))
    def close(self):
        Path(sys.argv[2]).write_text(str(self.told))

trackers = Trackers(load_config(Path(sys.argv[1]), ['trackers.use=["wandb"]']), {"wandb": lambda *_: Late()})
for step in (1, 2):
    trackers.log({"step": step})
raise SystemExit("the loss diverged")
"""


def test_a_run_that_fails_has_its_last_steps_told(configure: Callable[..., Config], tmp_path: Path) -> None:
    configure()
    told = tmp_path / "told"
    failed = subprocess.run([sys.executable, "-c", FAILING, tmp_path / "my.toml", told], check=False)
    assert failed.returncode == 1
    assert told.read_text() == "[1, 2]"
