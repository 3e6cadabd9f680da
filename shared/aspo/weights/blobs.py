"""A folder of immutable blobs, each named by the blake3 digest of its bytes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from blake3 import blake3

from aspo.weights.manifest import DIGEST_PATTERN, BlobRef, StorageError

TEMPORARY = ".tmp-"  # how the name of a file begins that is not whole yet


class BlobStore:
    """Blobs on disk; a blob appears under its name only when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes) -> BlobRef:
        """Store a blob durably; raises `StorageError` if it cannot be written."""
        digest = blake3(content, max_threads=blake3.AUTO).hexdigest()
        if self.verify(digest) is None:  # one that was damaged is mended
            write_file(self.folder / digest, content)
        return BlobRef(digest, len(content))

    def path(self, digest: str) -> Path | None:
        """Where a blob lies, None for an unknown or malformed digest."""
        if not DIGEST_PATTERN.fullmatch(digest):
            return None
        path = self.folder / digest
        return path if path.is_file() else None

    def has(self, ref: BlobRef) -> bool:
        """Whether a blob of that size is here; its content is not read."""
        path = self.path(ref.digest)
        return path is not None and path.stat().st_size == ref.size

    def verify(self, digest: str) -> Path | None:
        """Give the blob's path if its bytes match its name."""
        path = self.path(digest)
        return path if path is not None and file_digest(path) == digest else None

    def keep_only(self, digests: Collection[str]) -> None:
        """Delete every other blob, and what is left of broken-off writes and downloads."""
        for path in self.folder.iterdir():
            if path.name not in digests:
                path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """blake3 of a file's bytes, in hex."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, also after a power cut."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror}; free space or mend permissions")
