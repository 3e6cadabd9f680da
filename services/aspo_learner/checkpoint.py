"""Durable checkpoints: weights, optimizer, random states, ledger and cursor, whole or not at all.

A checkpoint is a folder `step-N-K`, the K-th of its step: safetensors and JSON with their digests, written
beside, synced and renamed. Loading verifies every digest first and falls back to the newest that is intact.
One that cannot be written leaves nothing behind.

Of several ranks each writes its parts of the tensors, in the safetensors that torch.distributed.checkpoint
(DCP) reads and lays out anew for any other number of ranks. Its writer is left out: it holds a second copy of
all it writes, and its ranks talk to each other in pickles.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from aspo.config import ConfigError
from aspo.errors import AspoError
from aspo.failpoints import reach
from aspo_learner.ranks import ALONE, Load, Ranks, Save, Verify

log = logging.getLogger(__name__)
_DIGESTS = "digests.json"


class CheckpointError(AspoError):
    """A checkpoint could not be written; those before it are as they were."""

    exit_code = 1


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int, ranks: Ranks = ALONE) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        if ranks.size > 1:
            self._require_shared()

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
                self._write(Path(partial), step, model, optimizer, state)
                return self._put_in_place(Path(partial), step)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self._folder} ({error}); free some disk"
            ) from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint in place and return its state; None if there is none."""
        for folder in reversed(self._all()):
            fault = self._fault(folder)
            if fault:
                log.error("checkpoint %s is damaged (%s); trying the one before", folder.name, fault)
                # Out of the way, lest it count as one of those to keep.
                folder.rename(folder.with_name(f".damaged-{folder.name}-{time.time_ns()}"))
                continue
            _require_same(folder, model)
            self._ranks.announce(Load(str(folder.absolute())))
            read_part(folder, model, optimizer)
            state: dict[str, Any] = json.loads((folder / "state.json").read_text())
            rng = bytearray(base64.b64decode(state.pop("torch_rng")))
            torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
            return state
        return None

    def _write(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> None:
        """Write a checkpoint's files, and see them on the disk; raises OSError if a rank could not."""
        self._ranks.announce(Save(str(folder.absolute())))
        written = _merge(self._ranks.gather(write_part(folder, model, optimizer, self._ranks)))
        state = state | {
            "step": step,
            "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        (folder / "state.json").write_text(json.dumps(state))
        digests = written | {"state.json": _digest(folder / "state.json")}
        (folder / _DIGESTS).write_text(json.dumps(digests))
        reach("checkpoint.manifest")
        for path in (folder / "state.json", folder / _DIGESTS, folder):
            _sync(path)

    def _fault(self, folder: Path) -> str | None:
        """Say what is wrong with a checkpoint's files, some of them by each rank; None if nothing is."""
        try:
            digests = json.loads((folder / _DIGESTS).read_text())
        except (OSError, ValueError) as error:
            return str(error)
        return self._fault_of(folder, digests)

    def _fault_of(self, folder: Path, digests: dict[str, str]) -> str | None:
        self._ranks.announce(Verify(str(folder.absolute()), digests))
        try:
            _merge(self._ranks.gather(verify_part(folder, digests, self._ranks)))
        except OSError as error:
            return str(error)
        return None

    def _require_shared(self) -> None:
        """Raise ConfigError unless every rank finds in the folder what this one writes there."""
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".partial-") as probe:
            paths = [Path(probe) / f"{rank:05}" for rank in range(self._ranks.size)]
            for path in paths:
                path.write_bytes(os.urandom(16))
            fault = self._fault_of(Path(probe), {path.name: _digest(path) for path in paths})
        if fault:
            raise ConfigError(
                f"{self._folder} is not one folder for all processes of this learner ({fault}); set run.dir "
                "to storage that their machines share"
            )

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


def write_part(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> bytes:
    """Write this rank's parts of all tensors durably; the reply says their digests, or what went wrong."""
    if not ranks.keeps_first_copy:
        return _reply(digests={})
    end = ".safetensors" if ranks.size == 1 else f"-{ranks.rank:05}-of-{ranks.size:05}.safetensors"
    files = [folder / f"{kind}{end}" for kind in ("model", "optimizer")]
    try:
        _save_file(_trained(model), files[0], first=ranks.leads)
        reach("checkpoint.shard")
        _save_file(_flatten(optimizer, model), files[1], first=ranks.leads)
        digests = {file.name: _digest(file) for file in files}
        for file in files:
            _sync(file)
    except (OSError, SafetensorError) as error:
        return _reply(error=_name_rank(error, ranks))
    return _reply(digests=digests)


def verify_part(folder: Path, digests: dict[str, str], ranks: Ranks) -> bytes:
    """Hold this rank's share of a checkpoint's files against their digests; the reply says what is wrong."""
    try:
        for name in sorted(digests)[ranks.rank :: ranks.size]:
            if _digest(folder / name) != digests[name]:
                return _reply(error=f"{name} does not match its digest")
    except OSError as error:
        return _reply(error=_name_rank(error, ranks))
    return _reply()


@torch.no_grad()
def read_part(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read this rank's parts of all tensors in place, however many ranks have written them."""
    reader, planner = HuggingFaceStorageReader(str(folder)), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    parameters = _trained(model)
    targets = parameters.copy()
    optimizer.state.clear()
    for key in metadata.state_dict_metadata:
        name, _, moment = key.rpartition("|")
        if name:
            like = parameters[name]
            targets[key] = torch.empty((), device=like.device) if moment == "step" else torch.empty_like(like)
            optimizer.state[like][moment] = targets[key]
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _require_same(folder: Path, model: nn.Module) -> None:
    """Raise ConfigError unless the checkpoint is of a model, or of adapters, of the same shapes."""
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    trained, held = _trained(model), {name for name in saved if "|" not in name}  # those are the optimizer's
    for name in sorted(trained.keys() | held):
        found = saved.get(name)
        size = found.size if isinstance(found, TensorStorageMetadata) else None
        if name not in trained or size != trained[name].shape:
            raise ConfigError(
                f"{folder} is of another model ({name} differs); choose another run.name, or set "
                "model.path and learner.lora back"
            )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: what is frozen comes from model.path again."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save_file(tensors: Mapping[str, Tensor], path: Path, *, first: bool) -> None:
    """Write this rank's parts and where they begin; what is not in parts is the first rank's."""
    parts: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        offset = [0] * tensor.ndim
        if isinstance(tensor, DTensor):
            [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            tensor, offset = tensor.to_local(), list(chunk.offsets)
        elif not first:
            continue
        if tensor.numel():  # with fewer rows than ranks some have none
            parts[name], offsets[name] = tensor, {"saved_offsets": offset}
    safetensors.torch.save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(offsets, sort_keys=True)})


def _reply(*, digests: dict[str, str] | None = None, error: str | None = None) -> bytes:
    return json.dumps({"digests": digests or {}, "error": error}).encode()


def _name_rank(error: Exception, ranks: Ranks) -> str:
    return str(error) if ranks.size == 1 else f"rank {ranks.rank}: {error}"


def _merge(replies: Sequence[bytes]) -> dict[str, str]:
    """The digests of all ranks; raises OSError with what any of them says went wrong."""
    digests: dict[str, str] = {}
    for reply in map(json.loads, replies):
        if reply["error"]:
            raise OSError(reply["error"])
        digests |= reply["digests"]
    return digests


def _flatten(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
