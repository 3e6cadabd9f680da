"""Rollouts in process, from exactly the weights of so many versions ago.

    sampler = StaleSampler(model.config, tokenizer, task, staleness=4, seed=0)
    sampler.publish(policy)                         # version 0, and after every step the next one
    groups = sampler.sample(prompts=8, group_size=8)

Samples are late by `staleness` versions as soon as there are so many. All is fp32, so that where nothing is
late the behaviour log-probs are the learner's to rounding; the same seed draws the same problems and noise.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aspo.schemas import RolloutGroup, VersionSpan
from aspo_learner.policy import Policy
from aspo_study.decoder import Choose, Decoder
from aspo_study.tasks import Problem, Task

RUN = "study"


class StaleSampler:
    """Keeps the last `staleness + 1` versions and samples from the oldest of them."""

    def __init__(self, config: Any, tokenizer: Any, task: Task, *, staleness: int, seed: int) -> None:
        self._decoder = Decoder(config)
        self._tokenizer, self._task = tokenizer, task
        self._versions: deque[dict[str, Tensor]] = deque(maxlen=staleness + 1)
        self.current = -1
        self._random, self._noise = random.Random(seed), torch.Generator().manual_seed(seed)

    @property
    def lag(self) -> int:
        """How many versions late the next sample will be."""
        return len(self._versions) - 1

    def publish(self, policy: Policy) -> None:
        """Take the next version's weights."""
        weights: dict[str, Tensor] = {}
        policy.copy_published(weights)
        self._versions.append(weights)
        self.current += 1

    def sample(self, prompts: int, group_size: int) -> list[RolloutGroup]:
        """The oldest version's groups for fresh problems, at temperature 1."""
        problems = [self._task.problem(self._random, held_out=False) for _ in range(prompts)]
        return self._groups(problems, group_size, self._versions[0], self.current - self.lag)

    def examine(self, problems: Sequence[Problem], group_size: int) -> list[RolloutGroup]:
        """The newest version's groups for given problems, at temperature 1."""
        return self._groups(problems, group_size, self._versions[-1], self.current)

    def accuracy(self, problems: Sequence[Problem]) -> float:
        """The share of problems that the newest version's greedy answers get right."""
        tokens, _ = self._generate(self._versions[-1], problems, 1, _most_likely)
        return float(self._score(tokens, problems).mean())

    def _generate(
        self, weights: Mapping[str, Tensor], problems: Sequence[Problem], samples: int, choose: Choose
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Each completion's tokens, its end included, and their log-probs at temperature 1."""
        texts = [problem["prompt"] for problem in problems]
        prompts = self._tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        ids, logprobs = self._decoder.complete(
            weights,
            prompts["input_ids"],
            prompts["attention_mask"],
            samples=samples,
            max_tokens=self._task.max_tokens,
            choose=choose,
        )
        return self._cut(ids.tolist(), logprobs.tolist())

    def _draw(self, scores: Tensor) -> Tensor:
        return torch.multinomial(scores.exp(), 1, generator=self._noise)[:, 0]

    def _cut(
        self, ids: list[list[int]], logprobs: list[list[float]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        end = self._tokenizer.eos_token_id
        lengths = [row.index(end) + 1 if end in row else len(row) for row in ids]
        return (
            [row[:n] for row, n in zip(ids, lengths, strict=True)],
            [row[:n] for row, n in zip(logprobs, lengths, strict=True)],
        )

    def _score(self, tokens: Sequence[Sequence[int]], problems: Sequence[Problem]) -> Any:
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rewards = [self._task.reward(t, answer=p["answer"]) for t, p in zip(texts, problems, strict=True)]
        return np.array(rewards, dtype=np.float32)

    def _groups(
        self, problems: Sequence[Problem], size: int, weights: Mapping[str, Tensor], step: int
    ) -> list[RolloutGroup]:
        tokens, logprobs = self._generate(weights, problems, size, self._draw)
        parts = [slice(i * size, (i + 1) * size) for i in range(len(problems))]
        return [
            self._group(f"{RUN}:train:{self.current}-{i}", step, problem, tokens[part], logprobs[part])
            for i, (problem, part) in enumerate(zip(problems, parts, strict=True))
        ]

    def _group(
        self, uid: str, step: int, problem: Problem, tokens: list[list[int]], logprobs: list[list[float]]
    ) -> RolloutGroup:
        end = self._tokenizer.eos_token_id
        return RolloutGroup(
            uid=uid,
            actor=RUN,
            purpose="train",
            temperature=1.0,
            prompt_ids=np.array(self._tokenizer(problem["prompt"])["input_ids"], dtype=np.int32),
            lengths=np.array([len(row) for row in tokens], dtype=np.int32),
            token_ids=np.concatenate(tokens).astype(np.int32),
            behavior_logprobs=np.concatenate(logprobs).astype(np.float32),
            rewards=self._score(tokens, [problem] * len(tokens)),
            failed=np.zeros(len(tokens), dtype=bool),
            finish_reasons=tuple("stop" if row[-1] == end else "length" for row in tokens),
            spans=tuple((VersionSpan(f"{RUN}/1/{step}", len(row)),) for row in tokens),
        )


def _most_likely(scores: Tensor) -> Tensor:
    return scores.argmax(-1)
