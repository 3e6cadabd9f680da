"""What travels between services: tasks and rollouts on Redis, and the version that names a policy.

A `Task` asks for one group of completions of one prompt; a `RolloutGroup` answers it under the same uid.
Per-sample arrays are stored flat, one after the other, with `lengths` to cut them apart, so a group is a
handful of buffers however many samples it holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

SCHEMA_VERSION = 1

_SCORED_BY = ("data.reward_columns", "reward.", "environment.")  # beginnings of the settings that decide it

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
Purpose = Literal["train", "eval"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, order=True, slots=True)
class PolicyVersion:
    """Names one immutable set of weights: `run/epoch/step`; ordered by epoch, then step."""

    epoch: int
    step: int
    run: str

    _PATTERN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})/(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,8})")

    def __str__(self) -> str:
        return f"{self.run}/{self.epoch}/{self.step}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """Read `run/epoch/step`; raises ValueError for anything else."""
        match = cls._PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text[:100]!r} is not a policy version; it reads run/epoch/step, such as demo/1/42"
            )
        return cls(run=match[1], epoch=int(match[2]), step=int(match[3]))


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="task", forbid_unknown_fields=True):
    """One prompt to sample a group for.

    `index` counts the tasks of a purpose from 0 in dispatch order; `reward_inputs` are the data set's columns
    that the reward function gets; temperature 0 is greedy; an actor older than `min_version` updates itself
    first.
    """

    uid: str
    index: int
    purpose: Purpose
    prompt_ids: list[int]
    group_size: int
    max_tokens: int
    temperature: float
    reward_inputs: dict[str, Any]
    seed: int | None = None
    min_version: str | None = None
    schema: int = SCHEMA_VERSION


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor and its learner must have in common.

    `tokenizer` is the digest of the tokenizer's vocabulary files; `settings` are values of the config by
    their names. Fields of other releases are passed over, so that the schema version can be compared.
    """

    tokenizer: str
    settings: dict[str, Any]
    schema: int = SCHEMA_VERSION

    @property
    def stamp(self) -> str:
        """Short digest of what a rollout's rewards depend on; rollouts carry it."""
        scored_by = {name: value for name, value in self.settings.items() if name.startswith(_SCORED_BY)}
        return blake3(msgspec.json.encode([self.tokenizer, sorted(scored_by.items())])).hexdigest(8)


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """`length` consecutive tokens sampled by one policy version."""

    version: str
    length: int


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class RolloutGroup:
    """A task's scored completions with the log-probs they were sampled with.

    Shapes: prompt_ids [P]; lengths, rewards, failed [G]; token_ids, behavior_logprobs [sum(lengths)]; spans
    holds, per sample, the run-length policy versions of its tokens. Log-probs are in nats, at the task's
    temperature. `reward_parts` are what the rewards were summed from, by name, [G] each, before weighting.

    `turns` holds, per sample, how many tokens the model and an environment said, in turn: the model begins
    and ends. An environment's tokens have log-prob 0 and the policy version of the turn before; they are
    never trained on. Without an environment it is empty.
    """

    uid: str
    actor: str
    purpose: Purpose
    temperature: float
    prompt_ids: IntArray
    lengths: IntArray
    token_ids: IntArray
    behavior_logprobs: FloatArray
    rewards: FloatArray
    failed: NDArray[np.bool_]
    finish_reasons: tuple[FinishReason, ...]
    spans: tuple[tuple[VersionSpan, ...], ...]
    reward_parts: Mapping[str, FloatArray] = field(default_factory=dict)
    turns: tuple[tuple[int, ...], ...] = ()
    schema: int = SCHEMA_VERSION

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> IntArray:
        """[G + 1] int32: sample i's tokens are `token_ids[offsets[i]:offsets[i + 1]]`."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    @property
    def by_model(self) -> NDArray[np.bool_]:
        """[sum(lengths)] bool: whether the model sampled a token; the others are an environment's."""
        if not self.turns:
            return np.ones(len(self.token_ids), dtype=np.bool_)
        runs = [run for sample in self.turns for run in sample]
        model = [place % 2 == 0 for sample in self.turns for place in range(len(sample))]
        return np.repeat(model, runs)

    @property
    def model_lengths(self) -> IntArray:
        """[G] int32: how many tokens of each sample the model sampled."""
        if not self.turns:
            return self.lengths
        return np.array([sum(sample[::2]) for sample in self.turns], dtype=np.int32)
