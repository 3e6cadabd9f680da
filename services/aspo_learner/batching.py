"""From rollout groups to packed tensors: a sequence per completion, micro-batches under a token budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aspo.schemas import FloatArray, IntArray, RolloutGroup
from aspo_learner.attention import Packing


@dataclass(frozen=True, eq=False, slots=True)
class TrainingSequence:
    """One completion with what the loss needs.

    Shapes: prompt_ids [P]; completion_ids, behavior_logprobs, weights, lags [C]. A token of weight 0, as all
    of an environment's are, is context and no more: it is neither scored nor counted. A lag is how many
    versions old a token's policy is. `group` and `sample` are its place in the batch.
    """

    prompt_ids: IntArray
    completion_ids: IntArray
    behavior_logprobs: FloatArray
    weights: FloatArray
    lags: IntArray
    advantage: float
    group: int
    sample: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """Sequences of one forward pass, packed one after the other.

    Shapes: input_ids, position_ids [1, L]; mask, behavior_logprobs, weights, lags, advantages [B, T] with a
    completion a row, left-aligned; positions, targets [N], where in the pack the N tokens under the mask are
    predicted, and those tokens; indices [B] into the batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    behavior_logprobs: Tensor
    weights: Tensor
    lags: Tensor
    advantages: Tensor
    positions: Tensor
    targets: Tensor
    packing: Packing
    indices: tuple[int, ...]

    def scatter(self, values: Tensor) -> Tensor:
        """Lay [N] values out as [B, T], zero elsewhere."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
            self.mask, values
        )


def sequences_of(
    group: RolloutGroup,
    advantages: Sequence[float],
    number: int,
    weights: FloatArray | None = None,
    lags: IntArray | None = None,
) -> Iterator[TrainingSequence]:
    """Cut a group into its sequences, each with its advantage; one without a token to train on is left out.

    `weights` [sum(lengths)] are the weights in the loss of the model's tokens, None is 1 for all; those of an
    environment have 0 in any case. `lags` [sum(lengths)] is how many versions late they are, None is 0.
    """
    offsets = group.offsets
    weights = np.where(group.by_model, 1 if weights is None else weights, 0).astype(np.float32)
    lags = np.zeros_like(group.token_ids) if lags is None else lags
    for i, advantage in enumerate(advantages):
        part = slice(offsets[i], offsets[i + 1])
        if weights[part].any():
            yield TrainingSequence(
                group.prompt_ids,
                group.token_ids[part],
                group.behavior_logprobs[part],
                weights[part],
                lags[part],
                float(advantage),
                number,
                i,
            )


def micro_batches(
    sequences: Sequence[TrainingSequence],
    indices: Sequence[int],
    *,
    max_tokens: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[MicroBatch]:
    """Pack the chosen sequences, longest first, into batches of about equal size under `max_tokens`.

    Of several ranks each gets its share, as many as any other, if need be with nothing to train on.
    """
    parts = equal_parts([len(sequences[i]) for i in indices], max_tokens, ranks)
    parts += [[]] * (-len(parts) % ranks)
    for part in parts[rank::ranks]:
        chosen = [indices[i] for i in part]
        yield collate([sequences[i] for i in chosen] or [_nothing()], chosen, device)


def _nothing() -> TrainingSequence:
    """A sequence without a token to train on, for a rank that must take part in a pass all the same."""
    token, weight = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32)
    return TrainingSequence(token, token, weight, weight, token, 0.0, -1, 0)


def equal_parts(lengths: Sequence[int], max_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Part sequences into as few runs of about equally many tokens as `max_tokens` allows, longest first.

    A sequence longer than `max_tokens` is a part of its own. Where sequences are many and short the number of
    parts is a multiple of `multiple`.
    """
    count = max(1, math.ceil(sum(lengths) / max_tokens / multiple)) * multiple
    share, parts, taken = sum(lengths) / count, [list[int]()], 0
    room = max_tokens
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if parts[-1] and (lengths[index] > room or taken >= share * len(parts)):
            parts.append([])
            room = max_tokens
        parts[-1].append(index)
        taken, room = taken + lengths[index], room - lengths[index]
    return [part for part in parts if part]


def collate(
    sequences: Sequence[TrainingSequence], indices: Sequence[int], device: torch.device
) -> MicroBatch:
    """Pack sequences into one micro-batch on a device."""
    lengths = np.array([len(s) for s in sequences])
    starts = np.cumsum(lengths) - lengths
    longest = max(len(s.completion_ids) for s in sequences)
    mask = np.zeros((len(sequences), longest), dtype=bool)
    behavior, weights = np.zeros((2, len(sequences), longest), dtype=np.float32)
    lags = np.zeros((len(sequences), longest), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        length = len(sequence.completion_ids)
        mask[row, :length] = sequence.weights > 0
        behavior[row, :length] = sequence.behavior_logprobs
        weights[row, :length] = sequence.weights
        lags[row, :length] = sequence.lags
    rows, steps = np.nonzero(mask)
    tokens = [ids for s in sequences for ids in (s.prompt_ids, s.completion_ids)]
    input_ids = np.concatenate(tokens).astype(np.int64)
    positions = starts[rows] + np.array([len(s.prompt_ids) for s in sequences])[rows] + steps
    advantages = np.array([[s.advantage] for s in sequences], dtype=np.float32).repeat(longest, axis=1)
    position_ids = np.arange(len(input_ids)) - starts.repeat(lengths)
    arrays = (input_ids[None], position_ids[None], mask, behavior, weights, lags, advantages)
    predicted = (positions - 1, input_ids[positions])
    tensors = [torch.from_numpy(array).to(device) for array in (*arrays, *predicted)]
    packing = Packing.of(lengths.tolist(), device)
    return MicroBatch(*tensors, packing, tuple(indices))  # type: ignore[arg-type, call-arg]


def repetition(tokens: IntArray, n: int = 4) -> float:
    """Share of a completion's n-grams that it has said before; 0 for one shorter than n."""
    if len(tokens) <= n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
