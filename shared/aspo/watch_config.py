"""The settings of what watches a run; a section of `aspo.config`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from aspo.task_config import Fraction, Section

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrackersConfig(Section):
    """Where metrics go beside metrics.jsonl; each is an extra: `pip install 'aspo[wandb]'` and so on."""

    use: tuple[TrackerName, ...] = Field((), description="Trackers that are told every step.")
    traces: Literal["off", "file", "otlp"] = Field(
        "off",
        description="OpenTelemetry traces of tasks: into the run's `traces`, or by OTLP (OTEL_EXPORTER_*).",
    )
    traces_share: Fraction = Field(0.01, description="Share of the tasks that are traced.")
    project: str = Field("aspo", min_length=1, description="Project, or experiment, of the run there.")
    tensorboard: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of SummaryWriter; log_dir: the run's `tensorboard`."
    )
    wandb: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of wandb.init, such as mode = 'offline' or entity."
    )
    trackio: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of trackio.init, such as space_id."
    )
    mlflow: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of MlflowClient; tracking_uri: MLFLOW_TRACKING_URI, else the run's mlflow.db.",
    )

    @model_validator(mode="after")
    def _once_each(self) -> TrackersConfig:
        if len(set(self.use)) < len(self.use):
            raise ValueError("trackers.use names a tracker twice; name it once")
        return self
