"""A manifest names everything that makes up one policy version, each part by its digest.

Blobs are immutable and named by the blake3 digest of their bytes, so a manifest never changes meaning.
`kind` is "snapshot" (all tensors, in safetensors blobs); a delta would name its `base`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3

from aspo.errors import AspoError
from aspo.schemas import PolicyVersion

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**50)]

DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 64 * 2**20


class WeightsError(AspoError, RuntimeError):
    """Weights cannot be stored, fetched or trusted; the text says which and why."""


class BlobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One content-addressed blob; size in bytes."""

    digest: Digest
    size: Size


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: safetensors dtype name, shape, digest of its raw bytes, index of its blob."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: tuple[Size, ...]
    digest: Digest
    blob: Annotated[int, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One version: tensors in safetensors blobs, and the config and tokenizer files to load them with."""

    version: str
    kind: Literal["snapshot"] = "snapshot"
    base: str | None = None
    state_digest: Digest
    tensors: tuple[TensorInfo, ...]
    blobs: tuple[BlobRef, ...]
    files: dict[FileName, BlobRef]
    schema: Literal[1] = 1

    @property
    def policy_version(self) -> PolicyVersion:
        """The parsed version."""
        return PolicyVersion.parse(self.version)

    @property
    def size(self) -> int:
        """Bytes of all its tensor blobs."""
        return sum(blob.size for blob in self.blobs)

    def encode(self) -> bytes:
        """Give the manifest as JSON."""
        return msgspec.json.encode(self)


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest and check that it is whole; raises `WeightsError`."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise WeightsError(f"manifest of {len(data)} bytes exceeds {MAX_MANIFEST_BYTES}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        PolicyVersion.parse(manifest.version)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise WeightsError(f"not a weights manifest: {error}") from None
    if any(tensor.blob >= len(manifest.blobs) for tensor in manifest.tensors):
        raise WeightsError(f"manifest of {manifest.version} names a blob that it does not list")
    if state_digest(manifest.tensors) != manifest.state_digest:
        raise WeightsError(f"manifest of {manifest.version}: its tensors do not match its state digest")
    return manifest


def state_digest(tensors: Iterable[TensorInfo]) -> str:
    """Digest of a whole state: names, types, shapes and contents, in the order of the names."""
    rows: list[Any] = sorted((t.name, t.dtype, list(t.shape), t.digest) for t in tensors)
    return blake3(msgspec.json.encode(rows)).hexdigest()
