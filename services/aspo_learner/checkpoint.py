"""Durable checkpoints: weights, optimizer, random states, ledger and cursor, whole or not at all.

A checkpoint is a folder `step-N-K`, the K-th of its step: safetensors and JSON with their digests, written
beside, synced and renamed. Loading verifies every digest first and falls back to the newest that is intact.
One that cannot be written leaves nothing behind.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor, nn

from aspo.config import ConfigError
from aspo.errors import AspoError
from aspo.failpoints import reach

log = logging.getLogger(__name__)
_DIGESTS = "digests.json"


class CheckpointError(AspoError):
    """A checkpoint could not be written; those before it are as they were."""

    exit_code = 1


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> Path:
        """Write a checkpoint durably and drop those beyond the newest `keep`; `state` is JSON data.

        Raises `CheckpointError` when the disk does not take it.
        """
        try:
            with tempfile.TemporaryDirectory(
                dir=self._folder, prefix=".partial-", ignore_cleanup_errors=True
            ) as partial:
                _write(Path(partial), step, model, optimizer, state)
                return self._put_in_place(Path(partial), step)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self._folder} ({error}); free some disk"
            ) from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint in place and return its state; None if there is none."""
        for folder in reversed(self._all()):
            fault = _fault(folder)
            if fault:
                log.error("checkpoint %s is damaged (%s); trying the one before", folder.name, fault)
                # Out of the way, lest it count as one of those to keep.
                folder.rename(folder.with_name(f".damaged-{folder.name}-{time.time_ns()}"))
                continue
            with torch.no_grad():
                saved = safetensors.torch.load_file(folder / "model.safetensors")
                for name, parameter in model.named_parameters():
                    if name not in saved or saved[name].shape != parameter.shape:
                        raise ConfigError(
                            f"{folder} is of another model ({name} differs); choose another run.name, or set "
                            "model.path back"
                        )
                    parameter.copy_(saved[name])
            _unflatten(safetensors.torch.load_file(folder / "optimizer.safetensors"), optimizer, model)
            state: dict[str, Any] = json.loads((folder / "state.json").read_text())
            rng = bytearray(base64.b64decode(state.pop("torch_rng")))
            torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
            return state
        return None

    def _put_in_place(self, partial: Path, step: int) -> Path:
        target = self._new_name(step)
        os.replace(partial, target)
        _sync(self._folder)
        reach("checkpoint.renamed")
        older = [path for path in self._all() if path < target]
        for old in older[: max(0, len(older) - self._keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _new_name(self, step: int) -> Path:
        """A name after all there are of the step: none is removed before its successor is durable."""
        taken = [int(path.name.split("-")[2]) for path in self._folder.glob(f"step-{step:08}-*")]
        return self._folder / f"step-{step:08}-{max(taken, default=-1) + 1:04}"

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))


def _write(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write a checkpoint's files, and see them on the disk."""
    safetensors.torch.save_file(dict(model.named_parameters()), folder / "model.safetensors")
    reach("checkpoint.shard")
    safetensors.torch.save_file(_flatten(optimizer, model), folder / "optimizer.safetensors")
    state = state | {
        "step": step,
        "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    (folder / "state.json").write_text(json.dumps(state))
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / _DIGESTS).write_text(json.dumps(digests))
    reach("checkpoint.manifest")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, None if they are as written."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text())
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                return f"{name} does not match its digest"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _flatten(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _unflatten(saved: dict[str, Tensor], optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        parameter, _, key = name.rpartition("|")
        device = "cpu" if key == "step" else parameters[parameter].device
        optimizer.state[parameters[parameter]][key] = value.to(device)


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
