"""Patches: the local file by which an actor hands its engine the changed elements of some tensors.

    write_patch(path, {"model.norm.weight": (positions, values), "lm_head.weight": (None, tensor)})
    changes = read_patch(path, specs, "BF16")

A patch is one safetensors file. A tensor that changed in places has two keys, `NAME|positions` (I32 or I64
[C], ascending positions in the flattened checkpoint tensor) and `NAME|values` ([C], its dtype); one that is
replaced has `NAME|dense` (its shape and dtype). Values are absolute: a patch applied twice does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from aspo_actor.checkpoint import TensorSpec, WeightMismatchError, dtype_name

_POSITIONS, _VALUES, _DENSE = "positions", "values", "dense"


class Change(NamedTuple):
    """What becomes of one tensor: `values` [C] at flat `positions` [C], or all of it where those are None."""

    positions: torch.Tensor | None
    values: torch.Tensor


def write_patch(path: Path, changes: Mapping[str, tuple[np.ndarray | None, torch.Tensor]]) -> None:
    """Write a patch; positions are ascending and flat, None for a tensor whose values replace all of it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (positions, values) in changes.items():
        if positions is None:
            tensors[f"{name}|{_DENSE}"] = values.contiguous()
            continue
        small = len(positions) == 0 or int(positions[-1]) < 2**31
        kept = np.ascontiguousarray(positions, dtype=np.int32 if small else np.int64)
        tensors[f"{name}|{_POSITIONS}"] = torch.from_numpy(kept)
        tensors[f"{name}|{_VALUES}"] = values.contiguous()
    safetensors.torch.save_file(tensors, path)


def read_patch(path: Path, specs: Mapping[str, TensorSpec], engine_dtype: str) -> dict[str, Change]:
    """Read a patch, memory-mapped, and hold it against the model's tensors.

    Values may have the tensor's dtype or the engine's. Raises `WeightMismatchError` for a file that cannot be
    read and for a change that does not fit.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightMismatchError(f"{path} cannot be read as safetensors: {error}") from None
    changes: dict[str, Change] = {}
    for name in {key.rpartition("|")[0] for key in tensors}:
        if name not in specs:
            raise WeightMismatchError(f"{name or next(iter(tensors))} is unknown to the model")
        changes[name] = _change(name, tensors)
        _check(name, changes[name], specs[name], engine_dtype)
    return changes


def _change(name: str, tensors: Mapping[str, torch.Tensor]) -> Change:
    parts = {part for part in (_POSITIONS, _VALUES, _DENSE) if f"{name}|{part}" in tensors}
    if parts == {_DENSE}:
        return Change(None, tensors[f"{name}|{_DENSE}"])
    if parts == {_POSITIONS, _VALUES}:
        return Change(tensors[f"{name}|{_POSITIONS}"], tensors[f"{name}|{_VALUES}"])
    raise WeightMismatchError(f"{name} comes as {sorted(parts)}; it needs positions and values, or dense")


def _check(name: str, change: Change, spec: TensorSpec, engine_dtype: str) -> None:
    positions, values = change
    dtype = dtype_name(values.dtype)
    if dtype not in (spec.dtype, engine_dtype):
        raise WeightMismatchError(f"{name} has dtype {dtype}; the engine runs in {engine_dtype}")
    if positions is None:
        if tuple(values.shape) != spec.shape:
            raise WeightMismatchError(
                f"{name} has shape {list(values.shape)}; the model has {list(spec.shape)}"
            )
        return
    if positions.dtype not in (torch.int32, torch.int64) or positions.ndim != 1:
        raise WeightMismatchError(f"{name} has positions that are not one row of I32 or I64")
    if values.shape != positions.shape:
        raise WeightMismatchError(
            f"{name} has {len(positions)} positions for values of shape {list(values.shape)}"
        )
    if len(positions) == 0:
        return
    if not bool((positions[1:] > positions[:-1]).all()):
        raise WeightMismatchError(f"{name} has positions that do not ascend")
    size = math.prod(spec.shape)
    if int(positions[0]) < 0 or int(positions[-1]) >= size:
        raise WeightMismatchError(f"{name} has positions outside 0 .. {size - 1}")
