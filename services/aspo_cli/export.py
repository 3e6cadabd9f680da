"""`aspo export`: any published version as a model folder."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from aspo.config import ConfigError
from aspo.weights.client import WeightClient
from aspo.weights.manifest import WeightsError


def export_version(url: str, token: str | None, version: str | None, folder: Path) -> Path:
    """Download and verify a version, then put it at `folder`; raises AspoError for a folder that exists."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; name a folder that does not")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return asyncio.run(_export(url, token, version, folder))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; name another folder") from None


async def _export(url: str, token: str | None, version: str | None, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        async with WeightClient(url, Path(scratch) / "blobs", token=token) as client:
            manifest = await (client.manifest(version) if version else client.latest())
            if manifest is None:
                raise WeightsError(f"{url} has published no version yet")
            # Whole or not at all: the folder appears under its name only when it is complete.
            return (await client.export(manifest, Path(scratch) / "model")).rename(folder)
