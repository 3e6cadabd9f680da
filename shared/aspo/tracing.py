"""Traces by OpenTelemetry: one for each task, from the actor that claims it to the version it has taught.

    traces = Traces(config, "actor", "actor-0")
    traces.answered(uid, claimed=t0, sampled=t1, scored=t2, stored=t3, tokens=512)         # actor
    traces.trained([uid, ...], version, taken=t4, trained=t5)                              # learner
    traces.published(version)

Times are `time.monotonic()`. A trace's id and its root's are digests of the task's uid, so both services
write the same trace, and the same share of all, without anything added to what travels. Spans are exported
by a thread of OpenTelemetry's own, which drops what it cannot get rid of. Switched off, nothing is imported.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from aspo.config import Config, ConfigError
from aspo.schemas import PolicyVersion

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter


class Traces:
    """What one service adds to the traces of a run's tasks."""

    def __init__(
        self, config: Config, service: str, instance: str = "", exporter: SpanExporter | None = None
    ) -> None:
        self._on = exporter is not None or config.trackers.traces != "off"
        self._lock = threading.Lock()
        self._unpublished: list[tuple[str, int, float]] = []  # uid, step, when it was trained
        self._origin = time.time() - time.monotonic()
        if not self._on:
            return
        _require_installed(config)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, TraceIdRatioBased

        names = {"service.name": f"aspo-{service}", "service.instance.id": instance}
        resource = Resource.create({**names, "aspo.run": config.run.name})
        self._ids = _task_ids()
        self._share = TraceIdRatioBased(config.trackers.traces_share)
        provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, id_generator=self._ids)
        provider.add_span_processor(_processor(config, service, instance, exporter))
        self._tracer = provider.get_tracer("aspo")

    def answered(
        self, uid: str, *, claimed: float, sampled: float, scored: float, stored: float, **facts: Any
    ) -> None:
        """The root of a task's trace, and what an actor did for it; `facts` are the root's attributes."""
        if not self._chosen(uid):
            return
        from opentelemetry.context import Context

        with self._lock:
            self._ids.root = (_trace_id(uid), _root_id(uid))
            root = self._tracer.start_span("task", Context(), start_time=self._ns(claimed))
        root.set_attributes({"aspo.uid": uid, **{f"aspo.{name}": value for name, value in facts.items()}})
        self._child(uid, "sample", claimed, sampled)
        self._child(uid, "score", sampled, scored)
        self._child(uid, "store", scored, stored)
        root.end(self._ns(stored))

    def trained(self, uids: Iterable[str], version: PolicyVersion, *, taken: float, trained: float) -> None:
        """What a learner did with the groups of a step; `version` is the one that it came to."""
        chosen = [uid for uid in uids if self._chosen(uid)]
        for uid in chosen:
            self._child(uid, "train", taken, trained, version=str(version))
        with self._lock:
            self._unpublished += [(uid, version.step, trained) for uid in chosen]

    def published(self, version: PolicyVersion) -> None:
        """The tokens trained up to a version are in what actors can fetch."""
        with self._lock:
            here = [one for one in self._unpublished if one[1] <= version.step]
            self._unpublished = [one for one in self._unpublished if one[1] > version.step]
        for uid, _, trained in here:
            self._child(uid, "publish", trained, time.monotonic(), version=str(version))

    def after(self, stored: Callable[[PolicyVersion], None]) -> Callable[[PolicyVersion], None]:
        """What is to be called when a version is stored, with its traces told after it."""

        def call(version: PolicyVersion) -> None:
            stored(version)
            self.published(version)

        return call

    def _chosen(self, uid: str) -> bool:
        if not self._on:
            return False
        from opentelemetry.sdk.trace.sampling import Decision

        return self._share.should_sample(None, _trace_id(uid), "task").decision is not Decision.DROP

    def _child(self, uid: str, name: str, start: float, end: float, **facts: str) -> None:
        attributes = {"aspo.uid": uid} | {f"aspo.{key}": value for key, value in facts.items()}
        span = self._tracer.start_span(name, _under(uid), attributes=attributes, start_time=self._ns(start))
        span.end(self._ns(end))

    def _ns(self, moment: float) -> int:
        return int((self._origin + moment) * 1e9)


def _trace_id(uid: str) -> int:
    return int.from_bytes(blake3(f"trace {uid}".encode()).digest(16))


def _root_id(uid: str) -> int:
    return int.from_bytes(blake3(f"root {uid}".encode()).digest(8))


def _under(uid: str) -> Context:
    """The context of a task's root span, which another process may have written."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    flags = TraceFlags(TraceFlags.SAMPLED)
    root = SpanContext(_trace_id(uid), _root_id(uid), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(root))


def _task_ids() -> Any:
    """A generator of ids that gives a root span those it was told, once."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class TaskIds(RandomIdGenerator):
        root: tuple[int, int] | None = None

        def generate_trace_id(self) -> int:
            return self.root[0] if self.root else super().generate_trace_id()

        def generate_span_id(self) -> int:
            root, self.root = self.root, None
            return root[1] if root else super().generate_span_id()

    return TaskIds()


def _require_installed(config: Config) -> None:
    otlp = "opentelemetry.exporter.otlp.proto.http" if config.trackers.traces == "otlp" else None
    for module in filter(None, ("opentelemetry", "opentelemetry.sdk", otlp)):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                "trackers.traces needs OpenTelemetry, which is not installed; pip install 'aspo[otel]', or "
                "set it to 'off'"
            )


def _processor(config: Config, service: str, instance: str, exporter: SpanExporter | None) -> SpanProcessor:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    if exporter is not None:
        return SimpleSpanProcessor(exporter)
    if config.trackers.traces == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return BatchSpanProcessor(OTLPSpanExporter())  # where to is in OTEL_EXPORTER_OTLP_*
    folder = config.run.path / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{'-'.join(filter(None, (service, instance)))}.jsonl").open("a", buffering=1)
    return BatchSpanProcessor(
        ConsoleSpanExporter(out=file, formatter=lambda s: s.to_json(indent=None) + "\n")
    )
