"""From tasks to stored rollouts: claim, sample, score, store, and only then finish the task."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import redis

from aspo.codec import encode_group
from aspo.config import Config
from aspo.queue import Claim, RolloutWriter, TaskQueue
from aspo.schemas import RolloutGroup, Task
from aspo.tracing import Traces
from aspo_actor.completion import Completion
from aspo_actor.engine import RolloutEngine
from aspo_actor.environments.conversation import Conversations, sample_task
from aspo_actor.errors import EngineError
from aspo_actor.rewards.calls import Answers
from aspo_actor.rewards.scorer import Scorer, Scores
from aspo_actor.weight_sync import WeightSync

log = logging.getLogger(__name__)
_CLAIM_WAIT_MS = 500
_RATE_WINDOW_S = 10.0
_RETRY_S = 1.0


class Worker:
    """Keeps the engine full of groups."""

    def __init__(
        self,
        config: Config,
        actor: str,
        client: redis.Redis,
        engine: RolloutEngine,
        scorer: Scorer,
        sync: WeightSync,
        stamp: str = "",
        conversations: Conversations | None = None,
    ) -> None:
        self._actor, self._engine, self._scorer, self._sync = actor, engine, scorer, sync
        self._conversations = conversations
        self._tasks = TaskQueue(client, config.run.name, lease_s=config.redis.task_lease_s)
        self._writer = RolloutWriter(client, config.run.name, actor, stamp=stamp)
        self._lease_s = config.redis.task_lease_s
        self._traces = Traces(config, "actor", actor)
        self._group_size = config.sampling.group_size
        self._max_samples = config.actor.max_samples or config.actor.engine.max_num_seqs + self._group_size
        self._store_lock = asyncio.Lock()
        self._claiming = asyncio.Lock()
        self._claims: dict[asyncio.Task[None], Claim] = {}
        self._draining = asyncio.Event()
        self._sampled: deque[tuple[float, int]] = deque()
        self.groups = 0
        self.tokens = 0
        self.on_group: Callable[[RolloutGroup], Awaitable[None]] | None = None

    @property
    def in_flight(self) -> int:
        """Groups being sampled or scored."""
        return len(self._claims)

    @property
    def _free_places(self) -> int:
        return self._max_samples - sum(claim.task.group_size for claim in self._claims.values())

    @property
    def tokens_per_second(self) -> float:
        """Sampling rate over the last seconds."""
        now = time.monotonic()
        while self._sampled and self._sampled[0][0] < now - _RATE_WINDOW_S:
            self._sampled.popleft()
        return sum(tokens for _, tokens in self._sampled) / _RATE_WINDOW_S

    async def run(self) -> None:
        """Work until drained; a group that fails ends the actor, for its task goes to another."""
        renewing = asyncio.create_task(self._renew_leases())
        try:
            while not self._draining.is_set():
                await self._fill()
                await self._wait_for_room()
        finally:
            renewing.cancel()

    async def drain(self, grace_s: float) -> None:
        """Take no more tasks, finish those in flight within the grace, hand the others back."""
        self._draining.set()
        async with self._claiming:  # a claim under way may still bring tasks
            jobs = list(self._claims)
        if jobs:
            await asyncio.wait(jobs, timeout=grace_s)
        left = [claim for job, claim in self._claims.items() if not _succeeded(job)]
        for job in jobs:
            job.cancel()
        if left:
            await asyncio.to_thread(self._hand_back, left)

    async def _fill(self) -> None:
        room = math.ceil(self._free_places / self._group_size)
        if room <= 0:
            return
        if not self._engine.healthy:
            await asyncio.sleep(_CLAIM_WAIT_MS / 1000)  # being repaired, or about to end the actor
            return
        async with self._claiming:
            try:
                claims = await asyncio.to_thread(
                    self._tasks.claim, self._actor, count=room, block_ms=_CLAIM_WAIT_MS
                )
            except redis.RedisError as error:
                log.warning("Redis: %s; trying again", error)
                await asyncio.sleep(_RETRY_S)
                return
            for claim in claims:
                self._claims[asyncio.create_task(self._do(claim))] = claim

    async def _wait_for_room(self) -> None:
        """Drop finished jobs; while all places are taken, wait for one to come free."""
        if self._free_places <= 0:
            await asyncio.wait(self._claims, return_when=asyncio.FIRST_COMPLETED)
        for job in [job for job in self._claims if job.done()]:
            if not job.cancelled():  # by a drain, which hands its task back
                job.result()
            del self._claims[job]

    async def _do(self, claim: Claim) -> None:
        task, claimed = claim.task, time.monotonic()
        if task.min_version is not None:
            await self._sync.wait_for(task.min_version)
        try:
            completions = await sample_task(self._engine, self._conversations, task)
        except EngineError:
            if not self._engine.recoverable:
                raise
            await asyncio.to_thread(self._hand_back, [claim])
            return
        sampled = time.monotonic()
        self._count(completions)
        prompt = self._engine.text_of(task.prompt_ids)
        answers = Answers.of(prompt, completions, task.max_tokens, task.reward_inputs)
        scores = await self._scorer.score(answers)
        scored = time.monotonic()
        group = assemble(task, self._actor, completions, scores)
        await self._store(claim, encode_group(group))
        times = {"claimed": claimed, "sampled": sampled, "scored": scored, "stored": time.monotonic()}
        self._traces.answered(task.uid, **times, tokens=len(group.token_ids), purpose=task.purpose)
        self.groups += 1
        if self.on_group is not None:
            await self.on_group(group)

    async def _store(self, claim: Claim, payload: bytes) -> None:
        """Store the rollout, then finish the task; waits for Redis as long as it takes."""
        while True:
            try:
                async with self._store_lock:
                    await asyncio.to_thread(self._writer.put, claim.task.uid, payload)
                await asyncio.to_thread(self._tasks.finish, [claim])
                return
            except redis.RedisError as error:
                log.warning("Redis: %s; keeping %s until it answers", error, claim.task.uid)
                await asyncio.sleep(_RETRY_S)

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await asyncio.to_thread(self._tasks.renew, self._actor, list(self._claims.values()))
            except redis.RedisError as error:
                log.warning("Redis: %s; leases not renewed", error)

    def _hand_back(self, claims: Sequence[Claim]) -> None:
        try:
            self._tasks.hand_back(self._actor, claims)
        except redis.RedisError as error:
            log.warning("Redis: %s; %d tasks go on when their leases run out", error, len(claims))

    def _count(self, completions: Sequence[Completion]) -> None:
        tokens = sum(len(c.model_tokens) for c in completions)
        self.tokens += tokens
        self._sampled.append((time.monotonic(), tokens))


def _succeeded(job: asyncio.Task[None]) -> bool:
    return job.done() and not job.cancelled() and job.exception() is None


def assemble(task: Task, actor: str, completions: Sequence[Completion], scores: Scores) -> RolloutGroup:
    """Put a task's completions and their scores into one group."""
    return RolloutGroup(
        uid=task.uid,
        actor=actor,
        purpose=task.purpose,
        temperature=task.temperature,
        prompt_ids=np.asarray(task.prompt_ids, dtype=np.int32),
        lengths=np.array([len(c.token_ids) for c in completions], dtype=np.int32),
        token_ids=np.concatenate([c.token_ids for c in completions]),
        behavior_logprobs=np.concatenate([c.logprobs for c in completions]),
        rewards=scores.rewards,
        failed=scores.failed,
        reward_parts=dict(scores.parts),
        finish_reasons=tuple(c.finish_reason for c in completions),
        spans=tuple(c.spans for c in completions),
        turns=tuple(c.runs for c in completions) if any(c.runs for c in completions) else (),
    )
