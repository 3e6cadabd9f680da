"""What an engine gives back for a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aspo.schemas import FloatArray, IntArray, VersionSpan


@dataclass(frozen=True, eq=False, slots=True)
class Completion:
    """One sampled continuation.

    Shapes: token_ids, logprobs [T], the end-of-sequence token included when it was drawn; log-probs in nats.
    `spans` cover the T tokens; `text` leaves special tokens out.
    """

    token_ids: IntArray
    logprobs: FloatArray
    spans: tuple[VersionSpan, ...]
    finish_reason: Literal["stop", "length"]
    text: str
