"""Fetching and verifying versions: what `aspo export`, `aspo weights pull` and `verify` do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from aspo.config import ConfigError
from aspo.weights.client import Mirror, WeightClient, export
from aspo.weights.manifest import Plan, WeightsError
from aspo.weights.store import WeightStore
from aspo_cli.ask import require_url


def pull_version(
    url: str, token: str | None, version: str | None, folder: Path, *, adapter: bool = False
) -> Path:
    """Download and verify a version, then put it at `folder`; raises AspoError for a folder that exists."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} exists; name a folder that does not")

    async def write(client: WeightClient, plan: Plan, scratch: Path) -> Path:
        await export(client, plan, scratch / "model", adapter=adapter)
        # Whole or not at all: the folder appears under its name only when it is complete.
        return (scratch / "model").rename(folder)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(".pull-", folder.parent) as scratch:
            path: Path = asyncio.run(_with_client(url, token, scratch, version, write))
            return path
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; name another folder") from None


def verify_version(url: str, token: str | None, version: str | None) -> str:
    """Download a version and check every digest; raises AspoError for any that does not match."""
    with scratch_folder("aspo-verify-") as scratch:
        manifest = asyncio.run(_with_client(url, token, scratch, version, _follow))
    return f"{manifest.version} is intact: {len(manifest.tensors)} tensors, state {manifest.state_digest}"


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards; SIGTERM, too, ends what goes on in it as Ctrl-C does."""
    former = signal.signal(signal.SIGTERM, _end)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, former)


def _end(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


async def _with_client(url: str, token: str | None, scratch: Path, version: str | None, work: Any) -> Any:
    """Run `work(client, plan, scratch)` on a version's plan, with a progress bar of its bytes."""
    require_url(url)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        async with WeightClient(url, scratch / "blobs", token=token) as client:
            plan = await (client.plan(version) if version else client.latest())
            if plan is None:
                raise WeightsError(f"{url} has published no version yet")
            size = plan.size + sum(ref.size for ref in plan.manifest.files.values())
            task = progress.add_task(f"{plan.manifest.version} ({plan.kind})", total=size)
            client.on_bytes = lambda count: progress.advance(task, count)
            return await work(client, plan, scratch)


async def _follow(client: WeightClient, plan: Plan, scratch: Path) -> Any:
    await client.fetch(list(plan.manifest.files.values()), plan.peers)
    await Mirror(client).follow(plan)
    return plan.manifest


def verify_store(folder: Path) -> str:
    """Check every version of a store on disk, byte by byte; raises AspoError for a damaged one."""
    if not (folder / "manifests").is_dir():
        raise ConfigError(f"{folder} is not a store of weights; it lies at runs/NAME/state/weights")
    store = WeightStore(folder)
    versions = store.versions()
    if store.left_out or not versions:
        raise WeightsError(store.left_out[0] if store.left_out else f"{folder} holds no version")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for version in progress.track(versions, description="verifying"):
            store.verify(version)
    return f"{len(versions)} versions are intact, {store.live()} is live"
