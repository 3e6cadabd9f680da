"""What an update made of single tokens: kept for some of a step's completions, for a person to look at.

The log-probs are those of the update's own forward pass, and the weights come from the loss by its gradient,
so every loss is told of without its help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aspo.schemas import FloatArray
from aspo_learner.batching import MicroBatch, TrainingSequence
from aspo_learner.losses import Loss

TRACED_GROUPS = 4  # of a step, all of its first update: every further micro-batch would cost another look


@dataclass(frozen=True, eq=False, slots=True)
class TokenTrace:
    """One completion in the first update that it took part in.

    Shapes [C] float32: logprobs of the policy then, in nats, and weights, by which a token's gradient counted
    beside the advantage (b * k * w of `losses`); NaN for tokens that were not trained on.
    """

    logprobs: FloatArray
    weights: FloatArray
    advantage: float


class Tracer:
    """Collects one step's traces, on the device until they are asked for."""

    def __init__(self, sequences: Sequence[TrainingSequence]) -> None:
        self._sequences = sequences
        self._wanted: set[int] | None = None
        self._found: list[tuple[list[int], Tensor]] = []  # sequences, and [2, B, T] of a row for each

    def choose(self, indices: Sequence[int]) -> None:
        """Trace the first groups of an update, if it is the step's first."""
        if self._wanted is None:
            groups = sorted({self._sequences[i].group for i in indices})[:TRACED_GROUPS]
            self._wanted = {i for i in indices if self._sequences[i].group in groups}

    def add(self, loss: Loss, logprobs: Tensor, old: Tensor, batch: MicroBatch, options: Any) -> None:
        """Take the rows of a micro-batch that are wanted; `options` are those that the loss was given."""
        wanted = self._wanted or set()
        rows = [row for row, index in enumerate(batch.indices) if index in wanted]
        if not rows:
            return
        picked = [tensor[rows] for tensor in (logprobs, old, batch.advantages, batch.mask)]
        chosen = {name: value[rows] for name, value in options.items() if isinstance(value, Tensor)}
        both = torch.stack([picked[0], token_weights(loss, *picked, **chosen)])
        indices = [batch.indices[row] for row in rows]
        self._found.append((indices, both.masked_fill(~picked[3], torch.nan)))
        wanted.difference_update(indices)

    def encoded(self) -> dict[int, bytes]:
        """The traces by sequence, as float32 [2, C]: of one rank, for another to take in."""
        return {index: trace.tobytes() for index, trace in self._by_sequence()}

    def take(self, encoded: Mapping[int, bytes]) -> None:
        """Take in what a rank has found."""
        for index, content in encoded.items():
            trace = torch.frombuffer(bytearray(content), dtype=torch.float32)
            self._found.append(([index], trace.view(2, 1, -1)))

    def traces(self, uids: Sequence[str]) -> dict[tuple[str, int], TokenTrace]:
        """The traces by uid, given in the order of the groups that teach, and number in the group."""
        found = {}
        for index, (logprobs, weights) in self._by_sequence():
            sequence = self._sequences[index]
            found[uids[sequence.group], sequence.sample] = TokenTrace(logprobs, weights, sequence.advantage)
        return found

    def _by_sequence(self) -> Iterator[tuple[int, FloatArray]]:
        """Each trace found, [2, C]; a micro-batch's come from the device together."""
        for indices, traces in self._found:
            on_cpu = traces.float().cpu().numpy().astype(np.float32)
            for row, index in enumerate(indices):
                length = len(self._sequences[index].completion_ids)
                yield index, on_cpu[:, row, :length].copy()  # a view would keep the padding, too


def token_weights(
    loss: Loss, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **options: Tensor
) -> Tensor:
    """The weight b * k * w of each token [B, T]; of a token without advantage, that of a positive one.

    All losses here are sums of -A * b * k * w * log-prob, so the gradient, summed and not averaged, shows it.
    """
    probe = logprobs.detach().requires_grad_()
    advantages = torch.where(advantages == 0, 1.0, advantages)
    with torch.enable_grad():
        total, _ = loss(probe, old, advantages, mask, aggregation="token-mean", normalizer=1.0, **options)
        (gradient,) = torch.autograd.grad(total, probe)
    return -gradient / advantages
