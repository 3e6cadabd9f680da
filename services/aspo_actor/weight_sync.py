"""Keeps the engine at the learner's latest version: long-poll, pull, verify, apply in flight."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from aspo.schemas import PolicyVersion
from aspo.weights.client import VersionGone, WeightClient
from aspo.weights.manifest import Manifest, WeightsError
from aspo_actor.engine import RolloutEngine

log = logging.getLogger(__name__)
_LONG_POLL_S = 20.0
_RETRY_S = 1.0


@dataclass(slots=True)
class SyncStats:
    """What the last update cost, in seconds, and how many there were."""

    syncs: int = 0
    pull_seconds: float = 0.0
    pause_seconds: float = 0.0


class WeightSync:
    """Follows the learner's versions; a version is applied only after every digest of it is verified."""

    def __init__(self, client: WeightClient, engine: RolloutEngine) -> None:
        self._client, self._engine = client, engine
        self._applied = asyncio.Condition()
        self._lock = asyncio.Lock()
        self.stats = SyncStats()

    async def run(self) -> None:
        """Follow for ever; an unreachable learner is waited for, a failed apply ends the actor."""
        while True:
            try:
                await self.sync_once(wait_s=_LONG_POLL_S)
            except VersionGone:
                await asyncio.sleep(_RETRY_S / 10)  # collected while we pulled it: take the newer one
            except WeightsError as error:
                log.warning("weights: %s; still running %s", error, self._engine.version)
                await asyncio.sleep(_RETRY_S)

    async def sync_once(self, *, wait_s: float = 0.0) -> str:
        """Update to the latest version if the engine runs another; returns the version then running."""
        manifest = await self._client.latest(have=self._engine.version, wait_s=wait_s)
        if manifest is not None:
            async with self._lock:
                await self._apply(manifest)
        return self._engine.version

    async def wait_for(self, version: str) -> None:
        """Wait until the engine runs `version` or a newer one."""
        wanted = PolicyVersion.parse(version)
        async with self._applied:
            await self._applied.wait_for(lambda: PolicyVersion.parse(self._engine.version) >= wanted)

    async def _apply(self, manifest: Manifest) -> None:
        if manifest.policy_version <= PolicyVersion.parse(self._engine.version):
            return  # another sync, asked for meanwhile, was ahead of this one
        started = time.monotonic()
        files = await self._client.pull(manifest)
        self.stats.pull_seconds = time.monotonic() - started
        timings = await self._engine.apply_weights(files, manifest.version)
        self.stats.pause_seconds = timings.pause_s + timings.apply_s
        self.stats.syncs += 1
        self._client.forget_all_but(manifest)
        async with self._applied:
            self._applied.notify_all()
