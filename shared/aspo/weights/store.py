"""The learner's folder of versions: blobs by digest, a manifest per version, and which one is latest.

    store = WeightStore(Path("runs/demo/weights"))
    store.put(PolicyVersion(1, 0, "demo"), model_tensors, files={"config.json": b"{...}"})
    store.latest(), store.manifest(version), store.blob_path(digest)

Blobs are written first, then the manifest, then `latest` moves; each by rename, so a reader never sees half
a version.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from blake3 import blake3

from aspo.schemas import PolicyVersion
from aspo.weights.manifest import (
    DIGEST_PATTERN,
    BlobRef,
    Manifest,
    TensorInfo,
    WeightsError,
    decode_manifest,
    state_digest,
)

MAX_BLOB_BYTES = 2**30
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightStore:
    """Versions on disk; one writer, any number of reading threads."""

    def __init__(self, root: Path, *, keep: int = 8) -> None:
        self._root, self._keep = root, keep
        self._lock = threading.Lock()
        self._listeners: list[Callable[[PolicyVersion], None]] = []
        for folder in (root / "blobs", root / "manifests"):
            folder.mkdir(parents=True, exist_ok=True)
        self._manifests = self._load()
        latest = root / "latest"
        self._latest = PolicyVersion.parse(latest.read_text()) if latest.exists() else None

    def latest(self) -> PolicyVersion | None:
        """The version that actors should run, None before the first."""
        return self._latest

    def versions(self) -> list[PolicyVersion]:
        """All versions kept, oldest first."""
        with self._lock:
            return sorted(self._manifests)

    def manifest(self, version: PolicyVersion) -> Manifest | None:
        """The manifest of a version that is kept, else None."""
        with self._lock:
            return self._manifests.get(version)

    def blob_path(self, digest: str) -> Path | None:
        """Where a blob lies, None for an unknown or malformed digest."""
        if not DIGEST_PATTERN.fullmatch(digest):
            return None
        path = self._blob(digest)
        return path if path.is_file() else None

    def on_publish(self, listener: Callable[[PolicyVersion], None]) -> None:
        """Have `listener` called, in the publisher's thread, after `latest` moved."""
        self._listeners.append(listener)

    def put(
        self, version: PolicyVersion, tensors: Mapping[str, torch.Tensor], files: Mapping[str, bytes]
    ) -> Manifest:
        """Store a snapshot and make it latest; raises `WeightsError` if its name has other content."""
        if self._latest is not None and version < self._latest:
            raise WeightsError(f"version {version} is older than the latest, {self._latest}")
        infos: list[TensorInfo] = []
        blobs: list[BlobRef] = []
        for shard in _shards(tensors):
            infos += [_describe(name, tensor, len(blobs)) for name, tensor in shard.items()]
            blobs.append(self._put_blob(safetensors.torch.save(shard, metadata={"format": "pt"})))
        manifest = Manifest(
            version=str(version),
            state_digest=state_digest(infos),
            tensors=tuple(infos),
            blobs=tuple(blobs),
            files={name: self._put_blob(content) for name, content in files.items()},
        )
        self._publish(version, manifest)
        return manifest

    def _publish(self, version: PolicyVersion, manifest: Manifest) -> None:
        existing = self.manifest(version)
        if existing is not None and existing != manifest:
            raise WeightsError(f"version {version} exists with other content; versions never change")
        _write(self._manifest_path(version), manifest.encode())
        _write(self._root / "latest", str(version).encode())
        with self._lock:
            self._manifests[version] = manifest
        self._latest = version
        self._collect()
        for listener in self._listeners:
            listener(version)

    def _collect(self) -> None:
        """Forget all but the newest versions, manifests before blobs."""
        with self._lock:
            for version in sorted(self._manifests)[: -self._keep]:
                del self._manifests[version]
                self._manifest_path(version).unlink(missing_ok=True)
            used = {ref.digest for m in self._manifests.values() for ref in (*m.blobs, *m.files.values())}
        for path in (self._root / "blobs").iterdir():
            if path.name not in used:
                path.unlink(missing_ok=True)

    def _load(self) -> dict[PolicyVersion, Manifest]:
        manifests = (decode_manifest(path.read_bytes()) for path in (self._root / "manifests").glob("*.json"))
        return {manifest.policy_version: manifest for manifest in manifests}

    def _put_blob(self, content: bytes) -> BlobRef:
        digest = blake3(content, max_threads=blake3.AUTO).hexdigest()
        if not self._blob(digest).is_file():
            _write(self._blob(digest), content)
        return BlobRef(digest, len(content))

    def _blob(self, digest: str) -> Path:
        return self._root / "blobs" / digest

    def _manifest_path(self, version: PolicyVersion) -> Path:
        return self._root / "manifests" / f"{version.run}-{version.epoch}-{version.step}.json"


def tensor_digest(tensor: torch.Tensor) -> str:
    """blake3 of a tensor's raw bytes, in hex."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(raw.data, max_threads=blake3.AUTO).hexdigest()


def _describe(name: str, tensor: torch.Tensor, blob: int) -> TensorInfo:
    return TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor_digest(tensor), blob)


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > MAX_BLOB_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, also after a power cut."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise WeightsError(
            f"cannot write {path}: {error.strerror}; free space or mend permissions"
        ) from error
