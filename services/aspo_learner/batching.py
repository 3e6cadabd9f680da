"""From rollout groups to padded tensors: a sequence per completion, micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aspo.schemas import FloatArray, IntArray, RolloutGroup


@dataclass(frozen=True, eq=False, slots=True)
class TrainingSequence:
    """One completion with what the loss needs.

    Shapes: prompt_ids [P]; completion_ids, behavior_logprobs, weights [C]. A token of weight 0 is context and
    no more: it is neither scored nor counted.
    """

    prompt_ids: IntArray
    completion_ids: IntArray
    behavior_logprobs: FloatArray
    weights: FloatArray
    advantage: float
    group: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """Right-padded sequences of one forward pass.

    Shapes: input_ids [B, L]; mask, behavior_logprobs, weights, advantages [B, T] with completions
    left-aligned; rows, columns, targets [N], the hidden states that predict the N tokens under the mask, and
    those tokens; indices [B] into the batch.
    """

    input_ids: Tensor
    mask: Tensor
    behavior_logprobs: Tensor
    weights: Tensor
    advantages: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    indices: tuple[int, ...]

    def scatter(self, values: Tensor) -> Tensor:
        """Lay [N] values out as [B, T], zero elsewhere."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
            self.mask, values
        )


def sequences_of(
    group: RolloutGroup, advantages: Sequence[float], number: int, weights: FloatArray | None = None
) -> Iterator[TrainingSequence]:
    """Cut a group into its sequences, each with its advantage; one without a token to train on is left out.

    `weights` [sum(lengths)] are the tokens' weights in the loss; None is 1 for all.
    """
    offsets = group.offsets
    weights = np.ones_like(group.behavior_logprobs) if weights is None else weights
    for i, advantage in enumerate(advantages):
        part = slice(offsets[i], offsets[i + 1])
        if weights[part].any():
            yield TrainingSequence(
                group.prompt_ids,
                group.token_ids[part],
                group.behavior_logprobs[part],
                weights[part],
                float(advantage),
                number,
            )


def micro_batches(
    sequences: Sequence[TrainingSequence],
    indices: Sequence[int],
    *,
    max_tokens: int,
    pad_id: int,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Split the chosen sequences, longest first, into padded batches of at most `max_tokens` tokens."""
    chosen: list[int] = []
    width = 0
    for index in sorted(indices, key=lambda i: len(sequences[i]), reverse=True):
        width = max(width, len(sequences[index]))
        if chosen and width * (len(chosen) + 1) > max_tokens:
            yield collate([sequences[i] for i in chosen], chosen, pad_id, device)
            chosen, width = [], len(sequences[index])
        chosen.append(index)
    if chosen:
        yield collate([sequences[i] for i in chosen], chosen, pad_id, device)


def collate(
    sequences: Sequence[TrainingSequence], indices: Sequence[int], pad_id: int, device: torch.device
) -> MicroBatch:
    """Pad sequences into one micro-batch on a device."""
    width = max(len(s) for s in sequences)
    longest = max(len(s.completion_ids) for s in sequences)
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=bool)
    behavior, weights = np.zeros((2, len(sequences), longest), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        prompt, length = len(sequence.prompt_ids), len(sequence.completion_ids)
        input_ids[row, :prompt] = sequence.prompt_ids
        input_ids[row, prompt : prompt + length] = sequence.completion_ids
        mask[row, :length] = sequence.weights > 0
        behavior[row, :length] = sequence.behavior_logprobs
        weights[row, :length] = sequence.weights
    rows, steps = np.nonzero(mask)
    columns = steps + np.array([len(s.prompt_ids) for s in sequences])[rows]
    advantages = np.array([[s.advantage] for s in sequences], dtype=np.float32).repeat(longest, axis=1)
    arrays = (input_ids, mask, behavior, weights, advantages, rows, columns - 1, input_ids[rows, columns])
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return MicroBatch(*tensors, tuple(indices))  # type: ignore[arg-type, call-arg]


def repetition(tokens: IntArray, n: int = 4) -> float:
    """Share of a completion's n-grams that it has said before; 0 for one shorter than n."""
    if len(tokens) <= n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
