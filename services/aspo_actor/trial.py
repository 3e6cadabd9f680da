"""A canary's part: try a version out before the other actors get it, and report what it does.

    trials = Trials(client, engine, config.canary, "actor-0")
    before = await trials.score()                   # under the weights that run
    ...                                             # the new ones are applied
    await trials.report(version, parent, before)    # waits for some groups' rewards, then tells the learner

Which actor is the canary, and what becomes of the version, the learner decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aspo.config import CanaryConfig, ConfigError
from aspo.schemas import FloatArray, RolloutGroup
from aspo.weights.client import WeightClient
from aspo.weights.manifest import WeightsError
from aspo_actor.engine import RolloutEngine
from aspo_actor.errors import EngineError

log = logging.getLogger(__name__)
_SEQUENCES = 8
_REMEMBERED = 256


class Scored(NamedTuple):
    """A prompt with its completion, and the completion's log-probs [T] in nats."""

    token_ids: Sequence[int]
    logprobs: FloatArray


class Trials:
    """Remembers recent completions and rewards, to hold a new version against the one before it."""

    def __init__(self, client: WeightClient, engine: RolloutEngine, config: CanaryConfig, actor: str) -> None:
        self._client, self._engine, self._config, self._actor = client, engine, config, actor
        self._sequences: deque[tuple[list[int], int]] = deque(maxlen=_SEQUENCES)
        self._rewards: deque[tuple[str, float]] = deque(maxlen=_REMEMBERED)
        self._seen = asyncio.Condition()

    async def saw(self, group: RolloutGroup) -> None:
        """Remember a training group: its first completion, its mean reward and who sampled it."""
        versions = {span.version for spans in group.spans for span in spans}
        if group.purpose != "train" or not group.lengths[0]:
            return
        first = group.turns[0][0] if group.turns else group.lengths[0]  # what the model said by itself
        prompt, completion = group.prompt_ids.tolist(), group.token_ids[:first].tolist()
        self._sequences.append((prompt + completion, len(completion)))
        if len(versions) == 1:
            self._rewards.append((versions.pop(), float(group.rewards.mean())))
        async with self._seen:
            self._seen.notify_all()

    async def score(self) -> list[Scored]:
        """Score the remembered completions under the weights that run now, those that can be scored.

        Who remembers none yet waits a while for the first: a trial that compares nothing passes anything.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.timeout_s / 4), self._seen:
                await self._seen.wait_for(lambda: self._sequences)
        scored = []
        for tokens, length in list(self._sequences):
            # One that fills the context leaves no room for scoring; a damaged engine is mended by the update.
            with contextlib.suppress(ConfigError, EngineError):
                scored.append(await self._score(tokens, length))
        return scored

    async def report(self, version: str, parent: str, before: Sequence[Scored]) -> None:
        """Score the same completions again, wait for rewards under `version`, and tell the learner."""
        finite, kl = True, 0.0
        if not before:
            log.warning("trial of %s: no completion to compare; only that it samples is proven", version)
        try:
            after = [await self._score(old.token_ids, len(old.logprobs)) for old in before]
            kl = k3([old.logprobs for old in before], [new.logprobs for new in after])
            finite = bool(np.isfinite(kl))
        except EngineError as error:
            log.error("trial of %s: %s", version, error)
            finite = False
        body: dict[str, object] = {"client": self._actor, "finite": finite, "kl": kl if finite else 0.0}
        if finite and self._config.groups:
            body |= await self._rewards_of(version, parent)
        try:
            await self._client.post(f"/v1/weights/{version}/report", body)
        except WeightsError as error:
            log.warning("trial of %s: the report was lost: %s", version, error)

    async def _score(self, token_ids: Sequence[int], length: int) -> Scored:
        return Scored(token_ids, (await self._engine.score(token_ids))[-length:])

    async def _rewards_of(self, version: str, parent: str) -> dict[str, float]:
        """Mean rewards under either version, once enough groups are in or time is up."""

        def under(name: str) -> list[float]:
            return [reward for sampler, reward in self._rewards if sampler == name]

        try:
            async with asyncio.timeout(self._config.timeout_s / 2), self._seen:
                await self._seen.wait_for(lambda: len(under(version)) >= self._config.groups)
        except TimeoutError:
            log.warning("trial of %s: too few groups to compare rewards", version)
        new, old = under(version), under(parent)
        if len(new) < self._config.groups or not old:
            return {}
        return {"reward": float(np.mean(new)), "reward_before": float(np.mean(old))}


def k3(before: Sequence[FloatArray], after: Sequence[FloatArray]) -> float:
    """The k3 estimate of KL(before || after) on tokens that `before` sampled, in nats per token.

    Source: Schulman, "Approximating KL divergence" (2020). 0 without any tokens.
    """
    if not before:
        return 0.0
    log_ratio = np.concatenate(after).astype(np.float64) - np.concatenate(before).astype(np.float64)
    return float(np.mean(np.expm1(log_ratio) - log_ratio))
