"""From hidden states to the log-probs of given tokens, without ever holding their logits.

The logits exist a tile of tokens x vocabulary at a time. Forward keeps, per token, the running maximum m of
the logits l, s = sum(exp(l - m)) and u = sum(exp(l - m) * (l - m)), rescaled when m grows, so that

    logsumexp = m + log(s)      entropy = log(s) - u / s

(the online softmax of arXiv 1805.02867, with the entropy beside it). Backward makes each tile again: with
p = softmax(l), a log-prob's slope is [j = target] - p and the entropy's is -p * (log(p) + entropy).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Tokens x vocabulary. On a CPU two tiles fit into the last cache; on a GPU one matmul fills the device.
_TILES = {"cpu": (512, 4096), "cuda": (4096, 16384)}


def token_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Give each target's log-prob and its distribution's entropy at a temperature, in nats.

    Shapes: hidden [N, H]; weight [V, H]; targets [N] int64 below V; results [N] fp32 (float64 for float64).
    Products are taken in hidden's type and summed in fp32. Differentiable in hidden and weight through both
    results; beyond the gradients nothing as large as N * V or V * H is held.
    """
    logprobs, entropy = _FusedHead.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, logsumexp = torch.empty(3, len(hidden), 1, dtype=exact, device=hidden.device)
        tile = _tile(hidden.device)
        for rows in _slices(len(hidden), tile[0]):
            target, picked = targets[rows, None], torch.zeros_like(logsumexp[rows])
            high = torch.full_like(picked, -torch.inf)
            total, moment = torch.zeros_like(picked), torch.zeros_like(picked)
            for columns in _slices(len(weight), tile[1]):
                logits = _logits(hidden[rows], weight[columns], temperature)
                here, index = _locate(target, columns)
                picked = torch.where(here, logits.gather(1, index), picked)
                high, total, moment = _accumulate(logits, high, total, moment)
            logsumexp[rows] = high + total.log()
            entropy[rows] = total.log() - moment / total
            logprobs[rows] = (picked - high) - total.log()  # the maximum may be large: it goes first
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs.squeeze(1), entropy.squeeze(1)

    @staticmethod
    def backward(
        ctx: Any, to_logprobs: Tensor | None, to_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        slopes = _Slopes(targets, logsumexp, entropy, to_logprobs, to_entropy, ctx.temperature)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden, dtype=logsumexp.dtype) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        tile = _tile(hidden.device)
        for columns in _slices(len(weight), tile[1]):
            part = weight[columns].to(hidden.dtype)
            for rows in _slices(len(hidden), tile[0]):
                slope = slopes(_logits(hidden[rows], part, ctx.temperature), rows, columns).to(hidden.dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] += _product(slope, part)
                if weight_grad is not None:
                    weight_grad[columns] += _product(slope.T, hidden[rows])
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, None, None


class _Slopes:
    """Turns a tile of logits into the loss's slope in them, in place."""

    def __init__(
        self,
        targets: Tensor,
        logsumexp: Tensor,
        entropy: Tensor,
        to_logprobs: Tensor | None,
        to_entropy: Tensor | None,
        temperature: float,
    ) -> None:
        self._targets, self._logsumexp, self._entropy = targets, logsumexp, entropy
        given = torch.zeros_like(logsumexp) if to_logprobs is None else to_logprobs.unsqueeze(1)
        self._to_logprobs = given / temperature
        self._to_entropy = None if to_entropy is None else to_entropy.unsqueeze(1) / temperature

    def __call__(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        logprobs, to_target = logits.sub_(self._logsumexp[rows]), self._to_logprobs[rows]
        if self._to_entropy is None:
            slope = logprobs.exp_().mul_(-to_target)
        else:
            pull = self._to_entropy[rows] * (logprobs + self._entropy[rows]) + to_target
            slope = logprobs.exp_().mul_(pull).neg_()
        here, index = _locate(self._targets[rows, None], columns)
        return slope.scatter_add_(1, index, torch.where(here, to_target, 0.0))


def _accumulate(logits: Tensor, high: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a tile into the running maximum, sum and moment; the tile is spent."""
    higher = torch.maximum(high, logits.amax(1, keepdim=True))
    # The first tile meets a maximum of -inf and sums of 0, and 0 * inf is no number.
    shift = torch.where(total > 0, high - higher, 0.0)
    shifted = logits.sub_(higher)
    weights = shifted.exp()
    moment = shift.exp() * (moment + shift * total) + torch.linalg.vecdot(weights, shifted).unsqueeze(1)
    total = shift.exp() * total + weights.sum(1, keepdim=True)
    return higher, total, moment


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = _product(hidden, weight.to(hidden.dtype).T)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of one type, with a sum and a result of fp32 or better."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(left, right)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets [n, 1] lie in a tile's columns, and where; elsewhere the index is any valid one."""
    index = targets - columns.start
    width = columns.stop - columns.start
    return (index >= 0) & (index < width), index.clamp(0, width - 1)


def _tile(device: torch.device) -> tuple[int, int]:
    return _TILES.get(device.type, _TILES["cuda"])


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
