"""What an engine gives back: for a prompt, and of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from aspo.schemas import FloatArray, IntArray, VersionSpan


@dataclass(frozen=True, eq=False, slots=True)
class Completion:
    """One sampled continuation.

    Shapes: token_ids, logprobs [T], the end-of-sequence token included when it was drawn; log-probs in nats.
    `spans` cover the T tokens; `text` leaves special tokens out.

    In a conversation with an environment `runs` are the lengths of what the model and the environment said in
    turn, `turns` the texts and `text` the last of them; `state` is what the environment remembers, and
    `failed` whether it could not go on.
    """

    token_ids: IntArray
    logprobs: FloatArray
    spans: tuple[VersionSpan, ...]
    finish_reason: Literal["stop", "length"]
    text: str
    runs: tuple[int, ...] = ()
    turns: tuple[str, ...] = ()
    state: Any = None
    failed: bool = False

    @property
    def model_tokens(self) -> IntArray:
        """The tokens that the model sampled."""
        if not self.runs:
            return self.token_ids
        parts = np.split(self.token_ids, np.cumsum(self.runs)[:-1])
        return np.concatenate(parts[::2])


def decode(tokenizer: Any, token_ids: Sequence[int] | IntArray) -> str:
    """The text of tokens, special ones left out."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


@dataclass(frozen=True, slots=True)
class UpdateTimings:
    """Seconds of each phase of one weight update; sampling stood still for `pause_s + apply_s`."""

    check_s: float
    pause_s: float
    apply_s: float
    probe_s: float
