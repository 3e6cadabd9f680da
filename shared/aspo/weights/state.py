"""A version's tensors in memory: loaded from snapshots, moved on by deltas, saved as a model folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aspo.weights.delta import Change, apply_delta, describe_delta
from aspo.weights.manifest import Manifest, TensorInfo, Transfer, WeightsError

MAX_BLOB_BYTES = 2**30
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class State:
    """The tensors of one version, contiguous and on the CPU; `version` is None while they are of none.

    state = State.load(files)                         # verified safetensors files
    state.verify(manifest)                            # every digest
    changes = state.advance(transfer, delta_blobs)    # in place
    """

    def __init__(self, tensors: Mapping[str, Tensor], version: str | None = None) -> None:
        self.tensors = dict(tensors)
        self.version = version
        self.checks: dict[str, str] = {}  # of each shard as `delta` has them, by its first tensor's name

    @classmethod
    def load(cls, files: Iterable[Path]) -> Self:
        """Read safetensors files into memory; raises `WeightsError` for one that is none."""
        tensors: dict[str, Tensor] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        if name in tensors:
                            raise WeightsError(f"tensor {name} is in two blobs")
                        tensors[name] = opened.get_tensor(name).clone()
            except SafetensorError as error:
                raise WeightsError(f"a blob is not safetensors: {error}") from None
        return cls(tensors)

    def verify(self, manifest: Manifest) -> None:
        """Hold every tensor against the manifest and take its version; raises `WeightsError`."""
        self.version = None
        expected = {info.name: info for info in manifest.tensors}
        if expected.keys() != self.tensors.keys():
            raise WeightsError(f"{manifest.version}: the blobs hold other tensors than the manifest lists")
        for found in describe(self.tensors):
            if found != expected[found.name]:
                raise WeightsError(f"{manifest.version}: tensor {found.name} does not match its digest")
        self.version = manifest.version

    def advance(self, transfer: Transfer, blobs: Iterable[bytes], *, last: bool = True) -> dict[str, Change]:
        """Apply a delta in place; returns the positions and new values of each tensor that changed.

        The result is verified if it is the `last` of several in a row. Raises `WeightsError` for a delta of
        another base or a damaged one; the state is then of no version, unless it was the wrong one, which
        is noticed first.
        """
        if self.version is None or transfer.base != self.version:
            raise WeightsError(f"a delta from {transfer.base} cannot be applied to {self.version}")
        self.version = None
        changed: dict[str, Change] = {}
        for blob in blobs:
            info = describe_delta(blob)
            names = sorted(info.tensors)
            missing = [name for name in names if name not in self.tensors]
            if missing or not names:
                raise WeightsError(f"a delta to {transfer.version} is of other tensors: {missing[:1]}")
            part = {name: self.tensors[name] for name in names}
            found = apply_delta(part, blob, checked_base=self.checks.get(names[0]), verify=last)
            self.tensors |= part
            self.checks[names[0]] = info.new_check
            changed |= found
        self.version = transfer.version
        return changed

    def save(self, folder: Path) -> list[Path]:
        """Write the tensors as `from_pretrained` expects them, with an index if there are several files."""
        parts = list(shards(self.tensors))
        names = _file_names(len(parts))
        try:
            for name, part in zip(names, parts, strict=True):
                safetensors.torch.save_file(part, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise WeightsError(f"cannot write to {folder}: {error}; free space or mend permissions") from None
        if len(parts) > 1:
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        return [folder / name for name in names]


def describe(tensors: Mapping[str, Tensor]) -> tuple[TensorInfo, ...]:
    """Give every tensor's type, shape and digest; raises `WeightsError` for a type that has no name."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise WeightsError(f"tensor {name} is {tensor.dtype}, which cannot be published")
    return tuple(
        TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor_digest(tensor))
        for name, tensor in tensors.items()
    )


def tensor_digest(tensor: Tensor) -> str:
    """blake3 of a tensor's raw bytes, in hex."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(raw.data, max_threads=blake3.AUTO).hexdigest()


def shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Cut a state into parts of at most `MAX_BLOB_BYTES`, or one tensor if that is larger."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > MAX_BLOB_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
