"""What the weight plane says on the wire: the manifest of a version, and the plan by which to reach it.

A manifest names everything that makes up one policy version, each part by its digest. A transfer is one way
to reach a version: all of its tensors (a snapshot), or the changes from a base (a delta). A plan is the
cheapest chain of transfers from what the caller has to what it should run. Blobs are immutable and named by
the blake3 digest of their bytes, so none of these ever changes meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3

from aspo.errors import AspoError
from aspo.schemas import PolicyVersion

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
VersionName = Annotated[str, msgspec.Meta(min_length=5, max_length=100)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**50)]

DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 64 * 2**20


class WeightsError(AspoError, RuntimeError):
    """Weights cannot be stored, fetched or trusted; the text says which and why."""


class StorageError(WeightsError):
    """The disk does not take what is to be kept."""

    exit_code = 1


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A message that is encoded as JSON."""

    def encode(self) -> bytes:
        """Give the message as JSON."""
        return msgspec.json.encode(self)


class BlobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One content-addressed blob; size in bytes."""

    digest: Digest
    size: Size


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: safetensors dtype name, shape, digest of its raw bytes."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: tuple[Size, ...]
    digest: Digest


class Manifest(_Wire, frozen=True, kw_only=True):
    """One version: its tensors, and the config and tokenizer files to load them with.

    `parent` is the version published before it; `changed_fraction` is the share of elements that differ from
    the parent's, None where they were not compared; `config_digest` covers `files`.
    """

    version: VersionName
    parent: VersionName | None = None
    state_digest: Digest
    config_digest: Digest
    changed_fraction: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    tensors: tuple[TensorInfo, ...]
    files: dict[FileName, BlobRef]
    schema: Literal[2] = 2

    @property
    def policy_version(self) -> PolicyVersion:
        """The parsed version."""
        return PolicyVersion.parse(self.version)


class Transfer(_Wire, frozen=True, kw_only=True):
    """The blobs that lead to a version: delta blobs from `base`, or safetensors blobs if there is none."""

    version: VersionName
    base: VersionName | None = None
    blobs: tuple[BlobRef, ...]

    @property
    def kind(self) -> Literal["snapshot", "delta"]:
        """Whether it holds all tensors or changes."""
        return "snapshot" if self.base is None else "delta"

    @property
    def size(self) -> int:
        """Bytes of its blobs."""
        return sum(blob.size for blob in self.blobs)


class Plan(_Wire, frozen=True, kw_only=True):
    """How to get from what the caller has to `manifest.version`: transfers in order, and who else has them.

    `trial` says that no one else runs the version yet, and that the learner waits for the caller's report.
    """

    manifest: Manifest
    trial: bool = False
    transfers: tuple[Transfer, ...]
    peers: tuple[Annotated[str, msgspec.Meta(max_length=300)], ...] = ()
    schema: Literal[2] = 2

    @property
    def base(self) -> str | None:
        """The version it starts from, None if it needs none."""
        return self.transfers[0].base if self.transfers else self.manifest.version

    @property
    def steps(self) -> int:
        """Steps from the version it starts from to its own; 0 from nothing or from another epoch."""
        target = self.manifest.policy_version
        base = PolicyVersion.parse(self.base) if self.base else target
        return target.step - base.step if base.epoch == target.epoch else 0

    @property
    def kind(self) -> str:
        """`snapshot`, `delta`, or `snapshot+deltas`."""
        first = self.transfers[0].kind if self.transfers else "delta"
        return "snapshot+deltas" if first == "snapshot" and len(self.transfers) > 1 else first

    @property
    def size(self) -> int:
        """Bytes of all its transfers."""
        return sum(transfer.size for transfer in self.transfers)


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest and check that it is whole; raises `WeightsError`."""
    return check_manifest(_decode(data, Manifest, "a weights manifest"))


def decode_transfer(data: bytes) -> Transfer:
    """Read a transfer; raises `WeightsError`."""
    transfer: Transfer = _decode(data, Transfer, "a weights transfer")
    _parse(transfer.version, *([transfer.base] if transfer.base else []))
    return transfer


def decode_plan(data: bytes) -> Plan:
    """Read a plan and check that its transfers form a chain to its version; raises `WeightsError`."""
    plan: Plan = _decode(data, Plan, "a weights plan")
    check_manifest(plan.manifest)
    _parse(*(name for t in plan.transfers for name in (t.version, t.base) if name))
    for before, after in zip(plan.transfers, plan.transfers[1:], strict=False):
        if after.base != before.version:
            raise WeightsError(f"the plan for {plan.manifest.version} breaks off at {before.version}")
    if plan.transfers and plan.transfers[-1].version != plan.manifest.version:
        raise WeightsError(f"the plan for {plan.manifest.version} leads to {plan.transfers[-1].version}")
    return plan


def check_manifest(manifest: Manifest) -> Manifest:
    """Check that a manifest's digests cover what it lists; raises `WeightsError`."""
    _parse(manifest.version, *([manifest.parent] if manifest.parent else []))
    if state_digest(manifest.tensors) != manifest.state_digest:
        raise WeightsError(f"manifest of {manifest.version}: its tensors do not match its state digest")
    if config_digest(manifest.files) != manifest.config_digest:
        raise WeightsError(f"manifest of {manifest.version}: its files do not match its config digest")
    return manifest


def state_digest(tensors: Iterable[TensorInfo]) -> str:
    """Digest of a whole state: names, types, shapes and contents, in the order of the names."""
    rows: list[Any] = sorted((t.name, t.dtype, list(t.shape), t.digest) for t in tensors)
    return blake3(msgspec.json.encode(rows)).hexdigest()


def config_digest(files: Mapping[str, BlobRef]) -> str:
    """Digest of the config and tokenizer files, in the order of their names."""
    rows: list[Any] = sorted((name, ref.digest) for name, ref in files.items())
    return blake3(msgspec.json.encode(rows)).hexdigest()


def _decode(data: bytes, kind: Any, what: str) -> Any:
    if len(data) > MAX_MANIFEST_BYTES:
        raise WeightsError(f"{what} of {len(data)} bytes exceeds {MAX_MANIFEST_BYTES}")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"not {what}: {error}") from None


def _parse(*versions: str) -> None:
    try:
        for version in versions:
            PolicyVersion.parse(version)
    except ValueError as error:
        raise WeightsError(f"not a weights manifest: {error}") from None
