"""Trackers: what is told every step's metrics beside metrics.jsonl.

    trackers = Trackers(config)         # ConfigError for one that is not installed
    trackers.log(metrics)               # never waits, never raises
    trackers.close()

They are told from a thread of their own: one that fails, or hangs, costs the run nothing but its figures.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from aspo.config import Config, ConfigError
from aspo.effective import public_settings
from aspo.watch_config import TrackerName

log = logging.getLogger(__name__)
_BACKLOG = 1000  # steps that may wait for a tracker; more are not told
_CLOSE_S, _EXIT_S = 30.0, 5.0
Metrics = Mapping[str, float]


class Tracker(Protocol):
    """What a tracker can do; `metrics` hold the step under `step`."""

    def log(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, `tensorboard --logdir runs`."""

    module = "tensorboard"

    def __init__(self, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier life of the learner wrote beyond its checkpoint is not shown.
        defaults = {"log_dir": str(config.run.path / "tensorboard"), "purge_step": first_step}
        self._writer = SummaryWriter(**(defaults | config.trackers.tensorboard))
        self._writer.add_text("settings", _as_text(config), first_step)

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A W&B run that a restarted learner continues; `mode = "offline"` keeps it in the run's folder."""

    module = "wandb"

    def __init__(self, config: Config, first_step: int) -> None:
        import wandb

        defaults = {"dir": str(config.run.path), "id": _identity(config), "resume": "allow"}
        self._run = wandb.init(**(_named(config) | defaults | config.trackers.wandb))
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back

    def log(self, metrics: Metrics) -> None:
        self._run.log(dict(metrics))

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run, by default in trackio's own folder of the user."""

    module = "trackio"

    def __init__(self, config: Config, first_step: int) -> None:
        import trackio

        self._run = trackio.init(**(_named(config) | {"resume": "allow"} | config.trackers.trackio))

    def log(self, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; each start of a learner is one, all of them tagged with the run's identity."""

    module = "mlflow"

    def __init__(self, config: Config, first_step: int) -> None:
        from mlflow import MlflowClient

        here = f"sqlite:///{(config.run.path / 'mlflow.db').resolve()}"
        defaults = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI", here)}
        self._client = MlflowClient(**(defaults | config.trackers.mlflow))
        project = config.trackers.project
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        tags = {"aspo.run": _identity(config), "aspo.first_step": str(first_step)}
        self._run = self._client.create_run(experiment, run_name=config.run.name, tags=tags).info.run_id
        for name, value in public_settings(config).items():
            self._client.log_param(self._run, name, value)

    def log(self, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(metrics["step"])
        batch = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=batch)

    def close(self) -> None:
        self._client.set_terminated(self._run)


KINDS: dict[TrackerName, Callable[[Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Trackers:
    """All trackers of a run; `failures` counts the steps that one of them was not told."""

    def __init__(
        self, config: Config, kinds: Mapping[TrackerName, Callable[[Config, int], Tracker]] = KINDS
    ) -> None:
        self.failures = 0
        self._config = config
        self._kinds = {name: kinds[name] for name in config.trackers.use}
        for name, kind in self._kinds.items():
            if importlib.util.find_spec(getattr(kind, "module", "aspo")) is None:
                raise ConfigError(
                    f"trackers.use names {name!r}, which is not installed; pip install 'aspo[{name}]', or "
                    "leave it out"
                )
        self._queue: queue.Queue[Metrics | None] = queue.Queue(_BACKLOG)
        self._opened: dict[str, Tracker] = {}
        self._broken: set[str] = set()
        self._full = False
        self._thread = threading.Thread(target=self._tell_all, name="trackers", daemon=True)
        if self._kinds:
            self._thread.start()
            atexit.register(self.close, _EXIT_S)  # a learner that fails does not get to its run's end

    def log(self, metrics: Metrics) -> None:
        """Have all trackers told of a step; returns at once."""
        if not self._kinds:
            return
        try:
            self._queue.put_nowait(dict(metrics))
        except queue.Full:
            if not self._full:
                self._full = True
                log.warning("a tracker hangs, and holds up the others; training goes on, and metrics.jsonl")
            self.failures += 1

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Have what is left told and the trackers closed, for so long as a run's end may wait."""
        if not self._thread.is_alive():
            return
        atexit.unregister(self.close)
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("a tracker hangs; what it was not told is in metrics.jsonl")

    def _tell_all(self) -> None:
        while (metrics := self._queue.get()) is not None:
            told = [self._tell(name, metrics) for name in self._kinds]
            self.failures += not all(told)
        for name, tracker in self._opened.items():
            self._try(name, tracker.close)

    def _tell(self, name: TrackerName, metrics: Metrics) -> bool:
        """Whether a tracker has taken a step; one that cannot be opened is not tried again."""
        if name in self._broken and name not in self._opened:
            return False
        return self._try(name, lambda: self._open(name, int(metrics["step"])).log(metrics))

    def _open(self, name: TrackerName, step: int) -> Tracker:
        if name not in self._opened:
            self._opened[name] = self._kinds[name](self._config, step)
        return self._opened[name]

    def _try(self, name: str, work: Callable[[], None]) -> bool:
        """Whether it went well; warns of a tracker's first failure."""
        try:
            work()
        except Exception as error:  # a stranger's code, at the edge made for it
            if name not in self._broken:
                log.warning("tracker %s fails (%s: %s); training goes on", name, type(error).__name__, error)
            self._broken.add(name)
            return False
        return True


def _named(config: Config) -> dict[str, Any]:
    return {
        "project": config.trackers.project,
        "name": config.run.name,
        "config": public_settings(config),
    }


def _identity(config: Config) -> str:
    """What tells this run from another of its name."""
    path = config.run.path / "id"
    return path.read_text() if path.exists() else config.run.name


def _as_text(config: Config) -> str:
    return "\n".join(f"    {name} = {value!r}" for name, value in public_settings(config).items())
