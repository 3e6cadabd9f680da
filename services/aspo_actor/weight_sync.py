"""Keeps the engine at the version it should run: long-poll, pull, verify, stage, apply in flight.

The actor holds a verified copy of the weights in memory, the mirror. A delta moves the mirror on, and only
what it changed is written into the engine. When an update fails half-way, the engine stands still until
the mirror's weights, verified anew, have been loaded whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aspo.schemas import PolicyVersion
from aspo.weights.client import Mirror, PullStats, Update, VersionGone, WeightClient
from aspo.weights.manifest import WeightsError
from aspo.weights.state import tensor_digest
from aspo_actor.completion import UpdateTimings
from aspo_actor.engine import RolloutEngine
from aspo_actor.errors import EngineError, WeightsRefusedError
from aspo_actor.patch import write_patch
from aspo_actor.trial import Trials

log = logging.getLogger(__name__)
_LONG_POLL_S = 20.0
_RETRY_S = 1.0
_WATCH_S = 0.5
_REPAIRS = 3
AUDIT_BYTES = 4 * 2**20


@dataclass(slots=True)
class SyncStats:
    """How many updates there were and of which kind, and what the last one cost in seconds.

    `live_at` is the monotonic time at which it had given its first token.
    """

    syncs: int = 0
    patches: int = 0
    repairs: int = 0
    audited: int = 0
    pull_seconds: float = 0.0
    apply_seconds: float = 0.0
    pause_seconds: float = 0.0
    live_at: float = 0.0
    timings: UpdateTimings | None = None


class WeightSync:
    """Follows the learner's versions; a version is applied only after every digest of it is verified."""

    def __init__(
        self,
        client: WeightClient,
        engine: RolloutEngine,
        mirror: Mirror,
        folder: Path,
        trials: Trials | None = None,
    ) -> None:
        self._client, self._engine, self._mirror, self._folder = client, engine, mirror, folder
        self._trials = trials
        self._reporting: set[asyncio.Task[None]] = set()
        self._applied = asyncio.Condition()
        self._lock = asyncio.Lock()
        self._audits = _rounds(mirror)
        self.stats = SyncStats()

    @property
    def pulled(self) -> PullStats:
        """What pulling has cost."""
        return self._client.stats

    async def run(self) -> None:
        """Follow for ever; an unreachable learner is waited for, an engine beyond repair ends the actor."""
        while True:
            try:
                await self.sync_once(wait_s=_LONG_POLL_S)
            except VersionGone:
                await asyncio.sleep(_RETRY_S / 10)  # collected while we pulled it: take the newer one
            except WeightsError as error:
                log.warning("weights: %s; still running %s", error, self._engine.version)
                await asyncio.sleep(_RETRY_S)

    async def keep_mended(self) -> None:
        """Bring the engine back whenever something damages it between updates; for ever."""
        while True:
            await asyncio.sleep(_WATCH_S)
            async with self._lock:
                if not self._engine.recoverable:
                    continue
                try:
                    await self._repair()
                except WeightsError as error:
                    log.error("the engine waits for weights to be mended with: %s", error)

    async def sync_once(self, *, wait_s: float = 0.0) -> str:
        """Move to the version to run if the engine runs another; returns the version then running."""
        have = self._mirror.version
        plan = await self._client.latest(have=have, wait_s=wait_s)
        async with self._lock:
            if plan is not None and self._mirror.version == have:
                began = time.monotonic()
                update = await self._mirror.follow(plan)
                self.stats.pull_seconds = time.monotonic() - began
                await self._try_out(update) if plan.trial and self._trials else await self._apply(update)
        return self._engine.version

    async def _try_out(self, update: Update) -> None:
        """Apply a version that the other actors wait for, and report on it meanwhile."""
        assert self._trials is not None
        parent, before = self._engine.version, await self._trials.score()
        await self._apply(update)
        task = asyncio.create_task(self._trials.report(update.version, parent, before))
        self._reporting.add(task)
        task.add_done_callback(self._reporting.discard)

    async def wait_for(self, version: str) -> None:
        """Wait until the engine runs `version` or a newer one."""
        wanted = PolicyVersion.parse(version)
        async with self._applied:
            await self._applied.wait_for(lambda: PolicyVersion.parse(self._engine.version) >= wanted)

    async def _apply(self, update: Update) -> None:
        began = time.monotonic()
        try:
            timings = await self._write(update)
            self.stats.live_at = time.monotonic()
            self.stats.apply_seconds = self.stats.live_at - began
            self.stats.pause_seconds = timings.pause_s + timings.apply_s
            self.stats.timings = timings
            await self._audit()
        except EngineError as error:
            if not self._engine.recoverable:
                raise
            log.error("engine: %s; loading %s whole", error, update.version)
            await self._repair()
        self.stats.syncs += 1
        async with self._applied:
            self._applied.notify_all()

    async def _write(self, update: Update) -> UpdateTimings:
        """Write what changed, or everything where the engine's weights are not those that it changed from."""
        if update.base is None or update.base != self._engine.version:
            return await self._load(update.files)
        path = self._folder / "patch.safetensors"
        await asyncio.to_thread(write_patch, path, update.changes)
        try:
            timings = await self._engine.apply_patch(path, update.base, update.version)
        except WeightsRefusedError as error:
            log.info("%s; loading it whole", error)
            return await self._load(())
        self.stats.patches += 1
        return timings

    async def _load(self, files: Sequence[Path]) -> UpdateTimings:
        """Load the mirror's weights whole, from `files` if they hold them already."""
        version = self._mirror.version
        assert version is not None
        if not files:
            folder = self._folder / "whole"
            folder.mkdir(parents=True, exist_ok=True)
            files = await asyncio.to_thread(self._mirror.weights.save, folder)
        try:
            return await self._engine.apply_weights(files, version)
        except WeightsRefusedError as error:
            raise EngineError(f"{error}; the model has changed: restart the actor") from error

    async def _repair(self) -> UpdateTimings:
        """Bring a damaged engine back: load verified weights whole, fetched anew if the mirror's are not."""
        for attempt in range(1, _REPAIRS + 1):
            try:
                await self._restore_mirror()
                timings = await self._load(())
            except EngineError as error:
                if not self._engine.recoverable or attempt == _REPAIRS:
                    raise
                log.error("engine: repair %d failed: %s", attempt, error)
                continue
            self.stats.repairs += 1
            log.warning("engine repaired: runs %s", self._engine.version)
            return timings
        raise AssertionError("unreachable")

    async def _restore_mirror(self) -> None:
        manifest = self._mirror.manifest
        assert manifest is not None
        try:
            await self._mirror.restore()
        except WeightsError as error:
            log.error("the actor's own copy is damaged (%s); fetching a snapshot", error)
            plan = await self._client.latest()
            assert plan is not None  # without `have` there always is one
            await self._mirror.follow(plan)

    async def _audit(self) -> None:
        """Prove that the update landed: digests of some tensors, read back from the engine, in turn."""
        manifest = self._mirror.manifest
        assert manifest is not None
        names = next(self._audits)
        found = await self._engine.digests(names)
        expected = {info.name: info.digest for info in manifest.tensors}
        for name in found.keys() - expected.keys():  # adapters are published, not what they are merged into
            expected[name] = tensor_digest(self._mirror.weights.tensors[name])
        wrong = [name for name, digest in found.items() if digest != expected[name]]
        if wrong:
            await self._engine.condemn(f"{manifest.version}: {wrong[0]} in the engine is not as published")
            raise EngineError(f"{manifest.version}: {wrong[0]} in the engine is not as published")
        self.stats.audited += len(found)


def _rounds(mirror: Mirror) -> Iterator[list[str]]:
    """Names of tensors, round after round, as many at a time as fit into `AUDIT_BYTES`."""
    while True:
        part: list[str] = []
        size = 0
        for name, tensor in list(mirror.weights.tensors.items()):
            if part and size + tensor.nbytes > AUDIT_BYTES:
                yield part
                part, size = [], 0
            part.append(name)
            size += tensor.nbytes
        yield part
