"""The vLLM side of a weight update: a weight-transfer engine that loads local safetensors files in flight.

It needs no fork of vLLM: named as worker extension, this module registers the backend as a worker imports it.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "aspo"}' \\
        --worker-extension-cls aspo_actor.vllm_plugin.AspoWorkerExtension
    POST /start_weight_update   {}
    POST /update_weights        {"update_info": {"files": ["/path/model.safetensors"]}}
    POST /finish_weight_update  {"weight_version": "demo/1/42"}

An update is complete or refused: names, shapes and dtypes are held against the checkpoint that the engine
started from before the model is touched, and after the load every parameter must have been written. All work
happens in `/update_weights`, so that a refused update leaves the old weights in service. A second kind of
update, such as a sparse delta, would be another field of `AspoUpdateInfo` and a branch of `receive_weights`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "aspo"
EXTENSION = f"{__name__}.AspoWorkerExtension"

_INDEX = "model.safetensors.index.json"
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class WeightMismatchError(ValueError):
    """An update that is not a complete set of this model's tensors; the model was not touched."""


class TensorSpec(NamedTuple):
    """Shape, and dtype as safetensors spells it, of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class AspoInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on: the weights come as local files."""


@dataclass
class AspoUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Paths of the safetensors files that together hold every tensor, under checkpoint names."""

    files: list[str]


class AspoWeightTransferEngine(WeightTransferEngine[AspoInitInfo, AspoUpdateInfo]):  # type: ignore[misc]
    """Loads complete checkpoints from local files into a running model, on CPU and GPU, sharded or not."""

    init_info_cls = AspoInitInfo
    update_info_cls = AspoUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reference = read_specs(checkpoint_files(Path(self.model_config.model)))
        self._written = False

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
            engine_dtype=_SAFETENSORS_DTYPES.get(self.model_config.dtype, str(self.model_config.dtype)),
            optional=optional,
        )

    def receive_weights(self, update_info: AspoUpdateInfo) -> None:
        """Check, then load through vLLM's layerwise reload, which keeps the addresses CUDA graphs captured.

        Raises `WeightMismatchError` with the model untouched, `RuntimeError` when it is no longer whole.
        """
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        self.check(update_info.files)
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(read_tensors(update_info.files))
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_heads(self.model)
        missing = {name for name, _ in self.model.named_parameters()} - set(loaded)
        if missing:
            raise RuntimeError(f"{len(missing)} parameters were not loaded, among them {min(missing)}")
        self._written = True

    def finish_weight_update(self) -> None:
        """Close the update; raises `RuntimeError` when no weights were given, lest a version label lie."""
        if not self._written:
            raise RuntimeError("finish_weight_update came before any weights were loaded")
        self._written = False

    def shutdown(self) -> None:
        """Nothing to release."""


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


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index lists them; raises `ValueError` if none."""
    index = folder / _INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors files, against which weight updates are checked")
    return files


def read_specs(files: Iterable[Path]) -> dict[str, TensorSpec]:
    """Shapes and dtypes by name, from headers; `WeightMismatchError` for a bad file or a name twice."""
    specs: dict[str, TensorSpec] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: _spec(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise WeightMismatchError(f"{file} cannot be read as safetensors: {error}") from None
        twice = specs.keys() & found.keys()
        if twice:
            raise WeightMismatchError(f"tensor {min(twice)} is in two files, {file} among them")
        specs |= found
    return specs


def read_tensors(files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of `files` under its checkpoint name, memory-mapped."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def compare_specs(
    reference: Mapping[str, TensorSpec],
    update: Mapping[str, TensorSpec],
    *,
    engine_dtype: str,
    optional: set[str],
) -> None:
    """Raise `WeightMismatchError` unless `update` has the names and shapes of `reference`.

    A dtype may be the engine's or the reference's; names in `optional` (a tied head, which some checkpoints
    repeat) may be absent from either side.
    """
    missing = reference.keys() - update.keys() - optional
    if missing:
        raise WeightMismatchError(f"{len(missing)} tensors are missing, among them {min(missing)}")
    unknown = update.keys() - reference.keys() - optional
    if unknown:
        raise WeightMismatchError(
            f"{len(unknown)} tensors are unknown to the model, among them {min(unknown)}"
        )
    for name in update.keys() & reference.keys():
        got, want = update[name], reference[name]
        if got.shape != want.shape:
            raise WeightMismatchError(f"{name} has shape {list(got.shape)}; the model has {list(want.shape)}")
        if got.dtype not in (engine_dtype, want.dtype):
            raise WeightMismatchError(f"{name} has dtype {got.dtype}; the engine runs in {engine_dtype}")


def repack_heads(model: torch.nn.Module) -> None:
    """Pack the output head anew: on a CPU it is a packed copy, which a reload of a tied head leaves old."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _spec(view: Any) -> TensorSpec:
    return TensorSpec(tuple(view.get_shape()), view.get_dtype())


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
