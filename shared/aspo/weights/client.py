"""Pulls versions from a learner over HTTP and trusts nothing it has not verified.

async with WeightClient("http://learner:8000", Path("cache"), token=None) as client:
    manifest = await client.latest(have=None, wait_s=30)
    files = await client.pull(manifest)                     # verified safetensors files
    await client.export(manifest, Path("my-model"))         # a folder that from_pretrained loads
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from aspo.weights.manifest import BlobRef, Manifest, WeightsError, decode_manifest
from aspo.weights.store import DTYPE_NAMES, tensor_digest

T = TypeVar("T")
RETRIES = 8
_CHUNK = 2**20


class Refused(WeightsError):
    """The learner answers and will not give it, however often it is asked."""


class VersionGone(Refused):
    """The version is no longer kept by the learner; take the latest."""


class WeightClient:
    """A verified, resuming reader of one learner's versions; `cache` holds blobs by digest."""

    def __init__(self, url: str, cache: Path, *, token: str | None = None) -> None:
        self._url, self._cache = url.rstrip("/"), cache
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None
        cache.mkdir(parents=True, exist_ok=True)

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=90)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def latest(self, have: str | None = None, wait_s: float = 0.0) -> Manifest | None:
        """The latest version's manifest, or None if it still is `have` after `wait_s` seconds.

        Raises `WeightsError` when the learner cannot be reached or answers nonsense.
        """
        query = {"wait": str(wait_s)} | ({"have": have} if have else {})
        data = await self._get_json("/v1/weights/latest", query)
        return None if data is None else decode_manifest(data)

    async def manifest(self, version: str) -> Manifest:
        """The manifest of one version; raises `VersionGone` if it is no longer kept."""
        data = await self._get_json(f"/v1/weights/{version}", {})
        assert data is not None
        manifest = decode_manifest(data)
        if manifest.version != version:
            raise WeightsError(f"asked for version {version}, got {manifest.version}")
        return manifest

    async def pull(self, manifest: Manifest) -> list[Path]:
        """Fetch a version's tensor blobs and verify every digest, of blobs and of tensors."""
        files = [await self._fetch_blob(blob) for blob in manifest.blobs]
        await asyncio.to_thread(_verify_tensors, manifest, files)
        return files

    async def export(self, manifest: Manifest, folder: Path) -> Path:
        """Write a version as a folder that `from_pretrained` loads."""
        files = await self.pull(manifest)
        folder.mkdir(parents=True, exist_ok=True)
        for name, ref in manifest.files.items():
            shutil.copyfile(await self._fetch_blob(ref), folder / name)
        names = _weight_file_names(len(files))
        for source, name in zip(files, names, strict=True):
            shutil.copyfile(source, folder / name)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": manifest.size},
                "weight_map": {t.name: names[t.blob] for t in manifest.tensors},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        return folder

    def forget_all_but(self, manifest: Manifest) -> None:
        """Delete cached blobs that a version does not use."""
        used = {ref.digest for ref in (*manifest.blobs, *manifest.files.values())}
        for path in self._cache.iterdir():
            if path.name not in used:
                path.unlink(missing_ok=True)

    async def _get_json(self, path: str, query: dict[str, str]) -> bytes | None:
        async def attempt() -> bytes | None:
            assert self._session is not None, "use the client as a context manager"
            async with self._session.get(self._url + path, params=query) as response:
                if response.status == 304:
                    return None
                await _check(response)
                return await response.read()

        return await self._retry(attempt, path)

    async def _fetch_blob(self, ref: BlobRef) -> Path:
        """Give the verified blob's path; a cut download goes on where it stopped."""
        path = self._cache / ref.digest
        if path.is_file() and await asyncio.to_thread(_file_digest, path) == ref.digest:
            return path
        partial = path.with_suffix(".part")

        async def attempt() -> None:
            await self._resume(ref, partial)
            digest = await asyncio.to_thread(_file_digest, partial)
            if digest != ref.digest:
                partial.unlink()
                raise WeightsError(f"blob {ref.digest[:12]} arrived corrupted")

        await self._retry(attempt, f"/v1/blobs/{ref.digest[:12]}")
        os.replace(partial, path)
        return path

    async def _resume(self, ref: BlobRef, partial: Path) -> None:
        assert self._session is not None, "use the client as a context manager"
        have = partial.stat().st_size if partial.exists() else 0
        if have == ref.size:
            return
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{ref.digest}"'} if 0 < have < ref.size else {}
        async with self._session.get(f"{self._url}/v1/blobs/{ref.digest}", headers=headers) as response:
            await _check(response)
            with partial.open("ab" if response.status == 206 else "wb") as file:
                async for chunk in response.content.iter_chunked(_CHUNK):
                    file.write(chunk)
                    if file.tell() > ref.size:
                        break
        received = partial.stat().st_size
        if received < ref.size:
            raise WeightsError(f"blob {ref.digest[:12]} was cut off after {received} of {ref.size} bytes")
        if received > ref.size:
            partial.unlink()
            raise WeightsError(f"blob {ref.digest[:12]} is larger than its manifest says")

    async def _retry(self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        last: Exception | None = None
        for count in range(RETRIES):
            try:
                return await attempt()
            except Refused:
                raise
            except (aiohttp.ClientError, TimeoutError, WeightsError) as error:
                last = error
            await asyncio.sleep(min(5.0, 0.1 * 2**count) * random.uniform(0.5, 1.0))
        raise WeightsError(f"{self._url}{what}: {last or 'no answer'} (after {RETRIES} tries)") from last


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status in (200, 206):
        return
    text = (await response.content.read(4096)).decode(errors="replace")
    message = f"{response.url} answered {response.status}: {text[:300]}"
    if response.status == 410 or "no_blob" in text:
        raise VersionGone(message)
    if 400 <= response.status < 500 and "no_version" not in text:
        raise Refused(f"{message}; check the learner's URL and the token")
    raise WeightsError(message)


def _verify_tensors(manifest: Manifest, files: list[Path]) -> None:
    """Check names, types, shapes and contents of all tensors against the manifest."""
    for blob, path in enumerate(files):
        expected = {tensor.name: tensor for tensor in manifest.tensors if tensor.blob == blob}
        try:
            with safe_open(path, framework="pt") as handle:
                if set(handle.keys()) != set(expected):
                    raise WeightsError(
                        f"{manifest.version}: a blob holds other tensors than its manifest lists"
                    )
                for name, info in expected.items():
                    _verify_tensor(handle.get_tensor(name), info, manifest.version)
        except SafetensorError as error:
            raise WeightsError(f"{manifest.version}: a blob is not safetensors: {error}") from None


def _verify_tensor(tensor: Any, info: Any, version: str) -> None:
    found = (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor))
    if found != (info.dtype, info.shape, info.digest):
        raise WeightsError(f"{version}: tensor {info.name} does not match its digest")


def _file_digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _weight_file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
