"""Before a model is loaded: will Redis keep the queue, and is there room for the run?

    require("learner", config)                  # logs warnings, raises PreflightError for what would fail
    for finding in preflight("actor", config):  # the same, to be shown
        print(finding.severity, finding.text)

Redis is asked by INFO alone, which an ACL rarely denies.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redis.exceptions import NoPermissionError
from safetensors import SafetensorError, safe_open

from aspo.config import Config
from aspo.errors import AspoError
from aspo.queue import connect

log = logging.getLogger(__name__)
Role = Literal["learner", "actor"]
OLDEST_REDIS = (6, 2)
ROOM_FLOOR = 2**30  # bytes to ask for where the model's size is not known
_CHECKPOINT_BYTES = 12  # per weight: the fp32 master and AdamW's two moments
_PUBLISHED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_COPIES = 3  # published by the learner: two snapshots, and the model at the run's end
_FETCHED_COPIES = 2  # kept by an actor: a snapshot's blobs, and the folder that the engine loads


class PreflightError(AspoError):
    """The service would fail or lose data as things are; the text says what to set."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to mend, in a sentence; an error keeps a service from starting."""

    severity: Literal["error", "warning"]
    text: str


def require(role: Role, config: Config) -> None:
    """Log the warnings; raises `PreflightError` with all errors, and `QueueError` if there is no Redis."""
    findings = preflight(role, config)
    for finding in findings:
        if finding.severity == "warning":
            log.warning("%s", finding.text)
    errors = [finding.text for finding in findings if finding.severity == "error"]
    if errors:
        raise PreflightError("; ".join(errors))


def preflight(role: Role, config: Config) -> list[Finding]:
    """Look at all that a role needs; raises `QueueError` if there is no Redis."""
    with connect(config.redis.location) as client:
        try:
            found = redis_findings(client.info())
        except NoPermissionError:
            found = [
                Finding("warning", "Redis denies INFO, so its settings are unchecked; grant its user +info")
            ]
    return found + folder_findings(config.run.path, room_needed(role, config))


def redis_findings(info: Mapping[str, Any]) -> list[Finding]:
    """What is wrong with a Redis for a queue, by its answer to INFO."""
    found = []
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST_REDIS:
        found.append(
            Finding("error", f"Redis {version} is too old; run redis-server 6.2 or newer, as redis.url says")
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", 0) and policy != "noeviction":
        found.append(
            Finding(
                "error",
                f"Redis evicts whole queues when its memory is full (maxmemory-policy {policy}); "
                "set maxmemory-policy to noeviction",
            )
        )
    if not info.get("aof_enabled", 0):
        found.append(
            Finding(
                "warning",
                "Redis keeps no append-only file, so the queue is lost if it crashes; set appendonly to yes",
            )
        )
    return found


def folder_findings(folder: Path, needed: int) -> list[Finding]:
    """Why `needed` more bytes could not be written to a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [
            Finding(
                "error", f"cannot write to {existing}, so not to {folder}; set run.dir to where it can be"
            )
        ]
    free = shutil.disk_usage(existing).free
    if free < needed:
        text = (
            f"{folder} needs {_megabytes(needed)} of disk and {_megabytes(free)} are free; "
            "free some, or set run.dir to a larger disk"
        )
        return [Finding("error", text)]
    return []


def room_needed(role: Role, config: Config) -> int:
    """Bytes that a run has yet to write; a floor where the model is not a folder on this machine."""
    weights = count_weights(Path(config.model.path))
    if weights is None:
        return ROOM_FLOOR
    published = weights * _PUBLISHED_BYTES[config.model.dtype]
    if role == "actor":
        written = [config.run.path / "actors" / config.actor.id] if config.actor.id else []
        return max(0, _FETCHED_COPIES * published - _size_of(written))
    # A new checkpoint is written before the oldest is dropped.
    checkpoints = (config.learner.keep_checkpoints + 1) * _CHECKPOINT_BYTES * weights
    written = [config.run.path / name for name in ("state/checkpoints", "state/weights", "model")]
    return max(0, checkpoints + _STORED_COPIES * published - _size_of(written))


def count_weights(model: Path) -> int | None:
    """Count a model folder's weights by its safetensors headers; None if it has none that can be read."""
    total = 0
    for path in model.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                names = file.keys()
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (OSError, SafetensorError):
            return None
    return total or None


def _size_of(folders: list[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
