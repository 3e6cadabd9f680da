"""Runs a reward function in worker processes: one that hangs or dies costs its samples and nothing else."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aspo.codec import MAX_REWARD
from aspo.config import RewardConfig, RewardPart
from aspo.schemas import FloatArray
from aspo_actor.rewards.calls import Answers, load_reward_function, score_all, wants_sandbox
from aspo_actor.rewards.sandbox import Sandbox
from aspo_actor.workers import CallLost, Workers

log = logging.getLogger(__name__)
_MOST_FAULTS = 1000  # that are remembered


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of a group and which of them stand for a failed call, both [G]; and each part's, by name.

    There are parts if the config names some; one that failed counts 0.
    """

    rewards: FloatArray
    failed: NDArray[np.bool_]
    parts: Mapping[str, FloatArray]


class Scorer(Workers):
    """Scores groups off the event loop, with a time limit; use as a context manager."""

    def __init__(self, config: RewardConfig, columns: Sequence[str]) -> None:
        for part in config.terms:
            load_reward_function(part, columns)
        if any(wants_sandbox(part) for part in config.terms):
            Sandbox(config.code).check()
            if config.code.sandbox == "none":
                log.warning(
                    "reward.code.sandbox is 'none': what the model writes can read and send all that I can"
                )
        self._config = config
        self.failures = 0
        self._faults: Counter[tuple[str, str]] = Counter()
        super().__init__(config.concurrency)

    async def score(self, answers: Answers) -> Scores:
        """Score one prompt's completions; a call that raises, hangs or gives no number counts as failed."""
        terms = self._config.terms
        columns = await asyncio.gather(*(self._score_part(part, answers) for part in terms))
        by_part = np.array(columns, dtype=np.float64)
        total = np.array([part.weight for part in terms]) @ by_part
        failed = ~(np.abs(total) <= MAX_REWARD)  # NaN, for a part that failed, is not either
        self.failures += int(failed.sum())
        failed |= np.array(answers.lost or [False] * len(total))
        rewards = np.where(failed, self._config.failed_score, total).astype(np.float32)
        parts = np.nan_to_num(by_part).astype(np.float32)
        named = {part.label: values for part, values in zip(self._config.parts, parts, strict=False)}
        return Scores(rewards, failed, named)

    async def _score_part(self, part: RewardPart, answers: Answers) -> list[float]:
        """What one function gives each completion; NaN where it failed."""
        size = len(answers.completions)
        values = None if wants_sandbox(part) and size > 1 else await self._call(part, answers)
        if values is None and size > 1:
            # Something hung or died: one by one, so that only the culprits fail.
            single = [self._call(part, answers.only(i)) for i in range(size)]
            values = [value[0] if value else math.nan for value in await asyncio.gather(*single)]
        return values or [math.nan] * size

    def _warn(self, function: str, faults: Sequence[str]) -> None:
        """Warn of each fault the first time, and then whenever it has come ten times as often."""
        if len(self._faults) > _MOST_FAULTS:  # they quote what a model wrote
            self._faults.clear()
        for fault in faults:
            self._faults[function, fault] += 1
            times = self._faults[function, fault]
            if times == 10 ** (len(str(times)) - 1):
                often = f" ({times} times now)" if times > 1 else ""
                log.warning("%s failed: %s%s", function, fault, often)

    async def _call(self, part: RewardPart, answers: Answers) -> list[float] | None:
        """One call in a worker; None when it did not come back."""
        results: list[float | str]
        try:
            results = await self.call(
                score_all, part, answers, self._config.code, timeout_s=self._config.timeout_s
            )
        except CallLost as error:
            self._warn(part.function, [str(error)])
            return None
        self._warn(part.function, [result for result in results if isinstance(result, str)])
        return [math.nan if isinstance(result, str) else result for result in results]
