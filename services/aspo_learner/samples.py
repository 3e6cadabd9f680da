"""Rollouts of the last steps, kept in memory for a person to read.

    samples = Samples(policy.tokenizer)
    samples.keep(step, groups, trainer.token_traces)    # by the training thread; nothing is decoded
    samples.find(Query(text="carry"))                   # by others

Text is decoded when it is first asked for.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from aspo.schemas import FloatArray, IntArray, RolloutGroup, VersionSpan
from aspo_learner.token_traces import TRACED_GROUPS, TokenTrace

KEPT = 5000  # rollouts
KEPT_TOKENS = 2**21  # about 40 MB
EXCERPT = 160  # characters
MAX_TOKENS = 2**14  # shown of one rollout
MAX_PIECE = 200  # characters of one token
MAX_PROMPT = 20_000  # characters
_DECODED_AT_ONCE = 256


@dataclass(eq=False, slots=True)
class Sample:
    """One completion; arrays are [C]. `behavior` is NaN at tokens that an environment said.

    Without a trace, it was not trained on, or not looked at then.
    """

    number: int
    step: int
    uid: str
    actor: str
    prompt_ids: IntArray
    token_ids: IntArray
    behavior: FloatArray
    spans: tuple[VersionSpan, ...]
    reward: float
    finish: str
    trace: TokenTrace | None
    text: str | None = None

    @property
    def difference(self) -> float | None:
        """Mean absolute difference of the learner's log-prob from the sampler's, in nats; None if unknown."""
        if self.trace is None:
            return None
        found = np.abs(self.trace.logprobs - self.behavior)
        found = found[~np.isnan(found)]
        return float(found.mean()) if len(found) else None


class Summary(BaseModel):
    """A rollout in a list; `difference` is the mean |learner - sampler| of its log-probs, in nats."""

    number: int
    step: int
    uid: str
    actor: str
    reward: float
    advantage: float | None
    tokens: int
    finish: str
    versions: list[str]
    difference: float | None
    excerpt: str


class Listing(BaseModel):
    """A page of a list: of `kept` rollouts `matched` are of the kind asked for, the newest up to `until`."""

    kept: int
    matched: int
    until: int
    rollouts: list[Summary]


class Rollout(Summary):
    """A rollout with its text and tokens; per token lists, None where it was not trained on.

    `behavior` is None too where an environment spoke. `spans` are (policy version, tokens) in order. Of very
    long ones the first tokens are shown.
    """

    prompt: str
    pieces: list[str]
    behavior: list[float | None]
    learner: list[float | None]
    weights: list[float | None]
    spans: list[tuple[str, int]]


class Query(BaseModel):
    """Which rollouts are asked for, and in which order; all conditions hold."""

    text: str = Field("", max_length=200, description="In the completion, whatever the case")
    actor: str = Field("", max_length=128)
    version: str = Field("", max_length=100, description="Sampled at least one token")
    step: int | None = Field(None, ge=0, le=10**9)
    advantage: Literal["any", "positive", "negative", "none"] = "any"
    min_reward: float | None = Field(None, allow_inf_nan=False)
    max_reward: float | None = Field(None, allow_inf_nan=False)
    order: Literal["newest", "difference", "reward", "longest"] = "newest"
    until: int | None = Field(None, ge=0, le=2**53, description="As the first page says, for later ones")
    offset: int = Field(0, ge=0, le=KEPT)
    limit: int = Field(100, ge=1, le=200)

    def admits(self, sample: Sample) -> bool:
        """Whether a rollout is of the kind asked for, its text aside."""
        signs = {"any": True, "none": sample.trace is None}
        if sample.trace is not None:
            signs |= {"positive": sample.trace.advantage > 0, "negative": sample.trace.advantage < 0}
        return (
            signs.get(self.advantage, False)
            and self.actor in ("", sample.actor)
            and self.step in (None, sample.step)
            and (self.min_reward is None or sample.reward >= self.min_reward)
            and (self.max_reward is None or sample.reward <= self.max_reward)
            and (self.until is None or sample.number <= self.until)
            and (not self.version or any(span.version == self.version for span in sample.spans))
        )


class Samples:
    """A ring of rollouts, bounded in number and tokens; safe from any thread."""

    def __init__(self, tokenizer: Any, *, kept: int = KEPT, kept_tokens: int = KEPT_TOKENS) -> None:
        # A copy: a fast tokenizer that the training thread is encoding with lends itself to nobody else.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._kept, self._kept_tokens = kept, kept_tokens
        self._ring: deque[Sample] = deque()
        self._tokens = self._next = 0
        self._lock, self._decoding = threading.Lock(), threading.Lock()

    def keep(
        self, step: int, groups: Sequence[RolloutGroup], traces: Mapping[tuple[str, int], TokenTrace]
    ) -> None:
        """Keep some groups of a batch: those with traces, and where there are fewer, others."""
        traced = {uid for uid, _ in traces}
        chosen = sorted(groups, key=lambda group: group.uid not in traced)[:TRACED_GROUPS]
        with self._lock:
            for group in chosen:
                for sample in _samples_of(step, group, traces):
                    self._add(sample)

    def find(self, query: Query) -> Listing:
        """The rollouts of a kind, a page of them."""
        with self._lock:
            kept = list(self._ring)
        found = [sample for sample in kept if query.admits(sample)]
        if query.text:
            self._decode(found)
            wanted = query.text.casefold()
            found = [sample for sample in found if wanted in (sample.text or "").casefold()]
        found.sort(key=lambda sample: _rank(sample, query.order), reverse=True)
        page = found[query.offset : query.offset + query.limit]
        self._decode(page)
        newest = kept[-1].number if kept else 0
        return Listing(
            kept=len(kept),
            matched=len(found),
            until=newest if query.until is None else query.until,
            rollouts=[Summary(**_summary(sample)) for sample in page],
        )

    def get(self, number: int) -> Rollout | None:
        """One rollout with all its tokens, None if it is no longer kept."""
        with self._lock:
            first = self._ring[0].number if self._ring else 0
            if not self._ring or not first <= number <= self._ring[-1].number:
                return None
            sample = self._ring[number - first]
        self._decode([sample])
        shown = sample.token_ids[:MAX_TOKENS]
        pieces = self._text([[token] for token in shown.tolist()])
        nothing = np.full(len(shown), np.nan, dtype=np.float32)
        trace = sample.trace
        return Rollout(
            **_summary(sample),
            prompt=self._text([sample.prompt_ids.tolist()])[0][:MAX_PROMPT],
            pieces=[piece if len(piece) <= MAX_PIECE else f"{piece[:MAX_PIECE]}…" for piece in pieces],
            behavior=_numbers(sample.behavior[:MAX_TOKENS]),
            learner=_numbers(trace.logprobs[:MAX_TOKENS] if trace else nothing),
            weights=_numbers(trace.weights[:MAX_TOKENS] if trace else nothing),
            spans=[(span.version, span.length) for span in sample.spans],
        )

    def _add(self, sample: Sample) -> None:
        sample.number, self._next = self._next, self._next + 1
        self._ring.append(sample)
        self._tokens += len(sample.token_ids)
        while len(self._ring) > self._kept or (self._tokens > self._kept_tokens and len(self._ring) > 1):
            self._tokens -= len(self._ring.popleft().token_ids)

    def _decode(self, samples: Sequence[Sample]) -> None:
        """Fill in the texts that are missing, some at a time, so that others get their turn."""
        missing = [sample for sample in samples if sample.text is None]
        for start in range(0, len(missing), _DECODED_AT_ONCE):
            part = missing[start : start + _DECODED_AT_ONCE]
            for sample, text in zip(part, self._text([s.token_ids.tolist() for s in part]), strict=True):
                sample.text = text

    def _text(self, ids: list[list[int]]) -> list[str]:
        with self._decoding:
            found: list[str] = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return found


def _samples_of(
    step: int, group: RolloutGroup, traces: Mapping[tuple[str, int], TokenTrace]
) -> Iterator[Sample]:
    behavior = np.where(group.by_model, group.behavior_logprobs, np.float32(np.nan))
    for i, (start, stop) in enumerate(pairwise(group.offsets.tolist())):
        yield Sample(
            number=0,
            step=step,
            uid=group.uid,
            actor=group.actor,
            prompt_ids=group.prompt_ids,
            token_ids=group.token_ids[start:stop],
            behavior=behavior[start:stop],
            spans=group.spans[i],
            reward=float(group.rewards[i]),
            finish=group.finish_reasons[i],
            trace=traces.get((group.uid, i)),
        )


def _summary(sample: Sample) -> dict[str, Any]:
    text, difference = sample.text or "", sample.difference
    return {
        "number": sample.number,
        "step": sample.step,
        "uid": sample.uid,
        "actor": sample.actor,
        "reward": sample.reward,
        "advantage": sample.trace.advantage if sample.trace else None,
        "tokens": len(sample.token_ids),
        "finish": sample.finish,
        "versions": list(dict.fromkeys(span.version for span in sample.spans)),
        "difference": None if difference is None else round(difference, 5),
        "excerpt": text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…",
    }


def _rank(sample: Sample, order: str) -> tuple[float, int]:
    """What to sort by, the newest first among equals."""
    values = {"reward": sample.reward, "longest": float(len(sample.token_ids)), "newest": 0.0}
    if order == "difference":
        found = sample.difference
        return -1.0 if found is None else found, sample.number
    return values[order], sample.number


def _numbers(values: FloatArray) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]
