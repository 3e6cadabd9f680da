"""LoRA adapters as versions, and the weights that they and their base make up.

A version of adapters has peft's tensors, `base_model.model.MODULE.lora_A.weight` [r, in] and `lora_B.weight`
[out, r]. Among its files are peft's adapter_config.json and the base, `base-N.safetensors`, in the type in
which actors run: blobs that stay the same from version to version, so that they are fetched once. What runs
is `MODULE.weight = base + alpha / r * B @ A`, summed in float64 and rounded at the end: there products of
bf16 are exact and their sums all but, so that every machine gets the same bits.

vLLM's own LoRA support is of no use here: it binds an adapter to a request (`LoRARequest`) from its first
token to its last, and these weights change between two tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from aspo.weights.delta import Change
from aspo.weights.manifest import BlobRef, Manifest, WeightsError
from aspo.weights.state import State

T = TypeVar("T")
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE, _A, _B = "base-", ".lora_A.weight", ".lora_B.weight"
_NOT_OF_ADAPTERS = ("config.json", "generation_config.json")
_CODES = {2: torch.int16, 4: torch.int32}
_AT_ONCE = 2**24  # elements that are summed in float64 at a time


class _Config(msgspec.Struct):
    """What of peft's adapter_config.json says how to merge; other kinds of adapter are refused."""

    r: int
    lora_alpha: float
    peft_type: Literal["LORA"]
    use_rslora: Literal[False] = False
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


def base_name(number: int) -> str:
    """The name of a part of the base among a version's files."""
    return f"{_BASE}{number:05}.safetensors"


def base_of(manifest: Manifest) -> tuple[BlobRef, ...]:
    """Of a version of adapters its config and the parts of its base, in order; empty for whole weights."""
    names = sorted(name for name in manifest.files if _is_base(name))
    return tuple(manifest.files[name] for name in (CONFIG, *names)) if names else ()


def exported_files(files: Mapping[str, T], *, adapter: bool) -> dict[str, T]:
    """Those of a version's files that belong into its folder, as a model's or as an adapter's."""
    left_out = _NOT_OF_ADAPTERS if adapter else (CONFIG,)
    return {name: file for name, file in files.items() if name not in left_out and not _is_base(name)}


def scaling_of(config: bytes) -> float:
    """By what `B @ A` is multiplied; raises `WeightsError` for adapters that cannot be merged here."""
    try:
        found = msgspec.json.decode(config, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{CONFIG} is not of plain LoRA: {error}") from None
    if found.r < 1 or found.rank_pattern or found.alpha_pattern:
        raise WeightsError(f"{CONFIG} is not of plain LoRA with one rank")
    return found.lora_alpha / found.r


def pairs(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module; raises `WeightsError` for one without the other."""
    modules = {name.removeprefix(PREFIX).removesuffix(_A).removesuffix(_B) for name in adapters}
    try:
        return {
            module: (adapters[f"{PREFIX}{module}{_A}"], adapters[f"{PREFIX}{module}{_B}"])
            for module in sorted(modules)
        }
    except KeyError as missing:
        raise WeightsError(f"the adapters lack {missing}") from None


def merge(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The weight [out, in] of a module in its base's type, from A [r, in] and B [out, r], on the CPU."""
    merged = torch.empty_like(base)
    factor = a.double() * scaling
    rows = max(1, _AT_ONCE // base.shape[1])
    for start in range(0, len(base), rows):
        part = slice(start, start + rows)
        merged[part] = torch.addmm(base[part].double(), b[part].double(), factor)
    return merged


class Merger:
    """Keeps the weights that a model runs with while adapters change; `weights` are of the last ones'."""

    def __init__(self, config: bytes, base: Sequence[Path]) -> None:
        self._scaling = scaling_of(config)
        self.weights = State.load(base)
        self._base: dict[str, Tensor] = {}  # what adapters have changed, as it was

    def follow(self, adapters: State) -> dict[str, Change]:
        """Merge these adapters; gives what that changed.

        Raises `WeightsError` for adapters that do not fit the base; the weights are then of no version.
        """
        self.weights.version = None
        changes: dict[str, Change] = {}
        for module, (a, b) in pairs(adapters.tensors).items():
            name = f"{module}.weight"
            former = self._fitting(name, a, b)
            merged = merge(self._base.setdefault(name, former), a, b, self._scaling)
            change = _difference(former, merged)
            if change is not None:
                changes[name] = change
            self.weights.tensors[name] = merged
        self.weights.version = adapters.version
        return changes

    def _fitting(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        weight = self.weights.tensors.get(name)
        if weight is None or weight.shape != (b.shape[0], a.shape[-1]) or a.shape[0] != b.shape[-1]:
            raise WeightsError(f"adapters of {name} do not fit their base")
        return weight


def _is_base(name: str) -> bool:
    return name.startswith(_BASE) and name.endswith(".safetensors")


def _difference(old: Tensor, new: Tensor) -> Change | None:
    """What changed, by position where that takes less than all of it; None if nothing did."""
    codes = _CODES[new.element_size()]
    moved = (old.view(codes) != new.view(codes)).reshape(-1).numpy()
    positions = np.flatnonzero(moved)
    if not len(positions):
        return None
    if len(positions) * (4 + new.element_size()) >= new.nbytes:
        return Change(None, new)
    return Change(positions, new.reshape(-1)[torch.from_numpy(positions)])
