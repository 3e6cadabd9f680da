"""An actor's life: fetch the latest version, start the engine, then sample and follow the weights.

    asyncio.run(Actor(config).run())

It needs no model of its own: config, tokenizer and weights come from the learner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import zlib

import redis

from aspo.config import Config
from aspo.hello import HelloError, heard, own_hello, require_equal
from aspo.http import bind, reachable
from aspo.presence import ActorStatus, announce, withdraw
from aspo.queue import connect
from aspo.schemas import Hello
from aspo.telemetry import ACTOR_METRICS, Gauges
from aspo.weights.client import Mirror, WeightClient, export
from aspo.weights.manifest import Manifest, Plan, WeightsError
from aspo_actor.app import build_app
from aspo_actor.engine import RolloutEngine
from aspo_actor.environments.conversation import conversations_with, hosting
from aspo_actor.environments.host import EnvironmentHost
from aspo_actor.guests import Guests
from aspo_actor.rewards.scorer import Scorer
from aspo_actor.trial import Trials
from aspo_actor.weight_sync import WeightSync
from aspo_actor.worker import Worker

log = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
TIME_TO_LIVE_S = 10.0
_CALL_TIMEOUT_S = 300.0


class Actor:
    """One actor process; `run` returns after a drain and raises on a fault it cannot mend."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.id = config.actor.id or f"{socket.gethostname()}-{os.getpid()}"
        self._redis = connect(config.redis.location)
        self._place = bind(config.actor, config.auth)
        self._folder = config.run.path / "actors" / self.id
        self._gauges = Gauges("actor", ACTOR_METRICS)
        self._state = "starting"
        self._engine: RolloutEngine | None = None
        self._worker: Worker | None = None
        self._sync: WeightSync | None = None
        self._mirror: Mirror
        self._hello: Hello
        self._scorer: Scorer | None = None
        self._host: EnvironmentHost | None = None
        self._guests: Guests | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()

    async def run(self) -> None:
        """Serve until drained by SIGTERM, SIGINT or POST /v1/drain."""
        self._loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(signum, self._leave.set)
        token = self._config.auth.actor_token or self._config.auth.operator_token
        client = WeightClient(
            self._config.actor.learner_url,
            self._folder / "blobs",
            token=token.get_secret_value() if token else None,
            name=self.id,
            role="actor",
            tls_ca=self._config.actor.tls_ca,
        )
        app = build_app(self, client.cache, self._gauges, self._config.auth)
        with self._place.serve(app) as server:
            client.serves = self._config.actor.advertise_url or reachable(server.url)
            log.info("actor %s of run %s serves on %s", self.id, self._config.run.name, server.url)
            beating = asyncio.create_task(self._heartbeat(server.url))
            try:
                async with client:
                    await self._serve(client)
            finally:
                beating.cancel()
                with contextlib.suppress(redis.RedisError):
                    await asyncio.to_thread(withdraw, self._redis, self._config.run.name, self.id)
                if self._config.actor.id is None:  # nobody comes back under this name
                    await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def status(self) -> ActorStatus:
        """A snapshot for `/v1/status` and the heartbeat; safe from any thread."""
        status = ActorStatus(id=self.id, run=self._config.run.name, url="", state=self._state, version="")
        if self._engine and self._worker and self._sync and self._scorer:
            status.version = self._engine.version
            status.groups, status.groups_in_flight = self._worker.groups, self._worker.in_flight
            status.tokens, status.tokens_per_second = self._worker.tokens, self._worker.tokens_per_second
            sync, pulled = self._sync.stats, self._sync.pulled
            status.weight_syncs, status.weight_patches = sync.syncs, sync.patches
            status.weight_repairs = sync.repairs
            status.weight_plan, status.weight_versions_behind = pulled.last_kind, pulled.versions_behind
            status.weight_bytes, status.weight_bytes_from_peers = pulled.bytes, pulled.bytes_from_peers
            status.weight_retries = pulled.retries
            status.weight_pull_seconds = sync.pull_seconds
            status.weight_apply_seconds = sync.apply_seconds
            status.weight_pause_seconds = sync.pause_seconds
            status.reward_failures = self._scorer.failures
            status.environment_failures = self._host.failures if self._host else 0
        return status

    def not_ready(self) -> str | None:
        """Why the actor cannot sample now, None if it can."""
        if self._engine is None or self._state != "sampling":
            return f"the actor is {self._state}"
        return None if self._engine.healthy else "the engine is unhealthy"

    def host(self) -> Guests | None:
        """Who answers OpenAI's clients, None while nobody does."""
        return self._guests if self._state == "sampling" else None

    def sync_now(self) -> str:
        """Pull and apply the latest version; called from the HTTP thread."""
        if self._sync is None or self._loop is None:
            raise WeightsError(f"the actor is {self._state}")
        return asyncio.run_coroutine_threadsafe(self._sync.sync_once(), self._loop).result(_CALL_TIMEOUT_S)

    def start_drain(self) -> None:
        """Begin to leave; called from the HTTP thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._leave.set)

    async def _serve(self, client: WeightClient) -> None:
        leaving = asyncio.create_task(self._leave.wait())
        scoring = Scorer(self._config.reward, self._config.data.reward_columns)
        with scoring as scorer, hosting(self._config.environment) as self._host:
            self._scorer = scorer
            starting = asyncio.create_task(self._start_engine(client))
            await asyncio.wait({leaving, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                return
            engine = starting.result()
            try:
                await self._work(client, engine, scorer, leaving)
            finally:
                self._state = "leaving"
                await engine.close()

    async def _work(
        self, client: WeightClient, engine: RolloutEngine, scorer: Scorer, leaving: asyncio.Task[bool]
    ) -> None:
        """Work and follow the weights; whichever of them fails ends the actor with its error."""
        trials = Trials(client, engine, self._config.canary, self.id)
        self._sync = WeightSync(client, engine, self._mirror, self._folder, trials)
        self._worker = Worker(
            self._config,
            self.id,
            self._redis,
            engine,
            scorer,
            self._sync,
            self._hello.stamp,
            await conversations_with(self._host, engine, self._config),
        )
        if self._config.canary.enabled:
            self._worker.on_group = trials.saw
        self._guests = Guests(engine, self._config)
        self._engine, self._state = engine, "sampling"
        working = asyncio.create_task(self._worker.run())
        watching = (
            self._sync.run(),
            self._sync.keep_mended(),
            self._keep_probing(engine),
            self._keep_agreeing(),
        )
        others = {asyncio.create_task(job) for job in watching}
        done, _ = await asyncio.wait({leaving, working, *others}, return_when=asyncio.FIRST_COMPLETED)
        self._state = "draining"
        failed = done - {leaving}
        await self._worker.drain(0.0 if failed else self._config.actor.grace_s)
        for task in (working, *others):
            task.cancel()
        for job in failed:
            job.result()

    async def _start_engine(self, client: WeightClient) -> RolloutEngine:
        plan = await self._first_plan(client)
        await self._greet(plan.manifest)
        version, folder = plan.manifest.version, self._folder / "model"
        self._state = f"loading {version}"
        self._mirror = await export(client, plan, folder)
        engine = await RolloutEngine.start(
            folder,
            self._config.model.dtype,
            self._config.actor.engine,
            version=version,
            # Actors of one run must not all draw alike.
            seed=self._config.run.seed + zlib.crc32(self.id.encode()) % 2**16,
        )
        engine.patience_s = self._config.actor.probe_timeout_s
        log.info("engine runs %s", version)
        return engine

    async def _first_plan(self, client: WeightClient) -> Plan:
        self._state = "waiting for the learner"
        while True:
            try:
                plan = await client.latest(wait_s=5)
                if plan is not None:
                    return plan
            except WeightsError as error:
                log.warning("waiting for the learner: %s", error)
                await asyncio.sleep(HEARTBEAT_S)

    async def _heartbeat(self, url: str) -> None:
        while True:
            status = self.status().model_copy(update={"url": url})
            numbers = status.model_dump(include=set(ACTOR_METRICS) & set(ActorStatus.model_fields))
            step = int(status.version.rpartition("/")[2]) if status.version else -1
            self._gauges.set(numbers | {"weight_step": step})
            try:
                await asyncio.to_thread(announce, self._redis, status, ttl_s=TIME_TO_LIVE_S)
            except redis.RedisError as error:
                log.warning("Redis: %s; not announced", error)
            await asyncio.sleep(HEARTBEAT_S)

    async def _greet(self, manifest: Manifest) -> None:
        """Compare with the learner's hello, once there is one; raises `HelloError`."""
        name, url = self._config.run.name, self._config.actor.learner_url
        if manifest.policy_version.run != name:
            raise HelloError(
                f"{url} serves run {manifest.policy_version.run!r} and this actor is of run {name!r}; "
                "mend run.name or actor.learner_url"
            )
        self._hello = own_hello(self._config, manifest.files)
        while not await self._agrees():
            log.warning("waiting for the learner of run %s to say hello in Redis", name)
            await asyncio.sleep(HEARTBEAT_S)

    async def _keep_agreeing(self) -> None:
        """End the actor when a learner with other terms takes over."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._agrees()

    async def _agrees(self) -> bool:
        """Whether the learner's hello is there and ours; raises `HelloError` if it is there and another."""
        try:
            learners = await asyncio.to_thread(heard, self._redis, self._config.run.name)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            log.warning("Redis: %s; trying again", error)
            return False
        if learners is not None:
            require_equal(self._hello, learners)
        return learners is not None

    async def _keep_probing(self, engine: RolloutEngine) -> None:
        """Generate a token every so often: vLLM's own health check does not see a hung engine."""
        while True:
            await asyncio.sleep(self._config.actor.probe_every_s)
            if not engine.recoverable:
                await engine.probe(self._config.actor.probe_timeout_s)
