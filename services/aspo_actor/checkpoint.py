"""What a model folder holds: the safetensors files of a checkpoint, and the shapes and dtypes in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class WeightMismatchError(ValueError):
    """An update that does not fit this model, which was not touched; its text is one line."""


class TensorSpec(NamedTuple):
    """Shape, and dtype as safetensors spells it, of one tensor."""

    shape: tuple[int, ...]
    dtype: str


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as safetensors spells it, or as torch does where no weight has it."""
    return _DTYPES.get(dtype, str(dtype))


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


def _spec(view: Any) -> TensorSpec:
    return TensorSpec(tuple(view.get_shape()), view.get_dtype())
