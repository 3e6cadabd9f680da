"""Policy losses: ASPO (arXiv 2510.06062), its ablations, and the losses it is compared with.

Notation: `l` the log-prob under the policy being optimised, `r = exp(l - old)` the importance ratio, `A` the
advantage, `b` an optional correction for the behaviour policy, `k` the hard mask (0 or 1), `w` the weight,
`sg` a stop-gradient. Every loss here is the same expression,

    loss = aggregate(-A * sg(b * k * w) * l)   so that   d(loss)/d(l) = -A * b * k * w,

and differs only in `k` and `w`. The value is a handle for autograd, not an objective: read `surrogate`
instead.

ASPO, from the paper and its reference code (github.com/wizard-III/Archer2.0, `compute_policy_loss_archer`):

    A <  0:  k = [r >= 1 - eps_low]    w = min(r, dual_clip_neg)
    A >= 0:  k = [r <= 1 + eps_high]   w = min(1 / r, dual_clip_pos)

Deviations from the paper and its code (the gradients equal the code's, to rounding):

1. The loss is written with a stop-gradient instead of pi_old * pi_theta / sg(pi_theta^2): same gradient, but
   the value is not the reference's, which jumps at the dual clip and slopes against its own gradient.
2. Means are taken over the whole batch, whatever the micro-batches (`normalizer`). The reference runs
   "token-mean" on micro-batches of one sequence, which is in effect "seq-mean-token-mean".
3. A sequence without a token counts as no sequence, and an empty batch has loss 0; the reference gives NaN
   for both.
4. The entropy split of the clip range (0.2 / 0.4 in the code, absent from the paper) is off unless a mask is
   given.
5. `correction` is not in the paper, where the behaviour policy and the old policy are the same.
6. `positive_weight="one"` (the loss `no-is`) drops the weight of positive tokens only. The authors describe
   their run without importance sampling as setting it to 1 on both signs.
7. `positive_weight="response_mean"` is read as: the arithmetic mean of the unclipped r over the tokens of the
   same row that are unmasked and have A >= 0, put in the place of 1/r; each token keeps its own `k`, and the
   mean is saturated at `dual_clip_pos`. The reference code does not contain this ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # exp(20) = 4.9e8 is finite in fp32; log-ratios beyond it are clamped
KL_BOUND = 10.0  # the largest K3 value a token can contribute

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
PositiveWeight = Literal["reciprocal", "one", "response_mean", "ratio"]


@dataclass(frozen=True)
class Mean:
    """A mean kept as numerator and denominator, so that `a + b` over micro-batches is the mean of the whole.

    Both are 0-dim tensors (no device synchronisation until read) or floats. `float(mean)` is the value, and
    NaN where the denominator is 0: the clip fraction of no tokens is not 0.
    """

    numerator: Tensor | float
    denominator: Tensor | float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.numerator + other.numerator, self.denominator + other.denominator)

    def __float__(self) -> float:
        denominator = float(self.denominator)
        return float(self.numerator) / denominator if denominator else float("nan")


Metrics = dict[str, Mean]
Loss = Callable[..., tuple[Tensor, Metrics]]


def merge_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Add the metrics of micro-batches up into the whole batch's; a name missing from a part adds 0/0."""
    merged: Metrics = {}
    for part in parts:
        for name, mean in part.items():
            merged[name] = merged[name] + mean if name in merged else mean
    return merged


def aspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip_pos: float = 3.0,
    dual_clip_neg: float = 3.0,
    aggregation: Aggregation = "token-mean",
    clip_low_entropy_mask: Tensor | None = None,
    eps_high_entropy: float = 0.4,
    positive_weight: PositiveWeight = "reciprocal",
    correction: Tensor | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, Metrics]:
    """ASPO: flip the importance ratio of positive tokens, and saturate weights without killing gradients.

    All tensors are [B, T], one sequence a row. `mask` (bool or int) is nonzero at the tokens that count; what
    the other tensors hold elsewhere, NaN included, never matters. `clip_low_entropy_mask` True keeps
    eps_low/eps_high, False uses eps_high_entropy on both sides. `correction` is b. `normalizer` is the number
    of tokens (token-mean) or of sequences with a token (seq-mean-*) in the WHOLE batch, so that
    micro-batches' losses add up to its loss; None counts this call's. Raises ValueError for shapes that
    differ and for unknown names. Source: arXiv 2510.06062; deviations in the module's docstring.
    """
    tokens = _prepare(logprobs, old_logprobs, advantages, mask, correction)
    ratio, positive = tokens.log_ratio.exp(), tokens.advantages >= 0
    clipped = _outside_clip(ratio, positive, eps_low, eps_high, clip_low_entropy_mask, eps_high_entropy)
    if positive_weight == "reciprocal":
        flipped = (-tokens.log_ratio).exp()
    elif positive_weight == "one":
        flipped = torch.ones_like(ratio)
    elif positive_weight == "response_mean":
        flipped = _row_mean(ratio, positive & tokens.mask).expand_as(ratio)
    elif positive_weight == "ratio":
        flipped = ratio
    else:
        raise ValueError(f"positive_weight {positive_weight!r}: use reciprocal, one, response_mean or ratio")
    unbounded = torch.where(positive, flipped, ratio)
    bounded = torch.where(positive, flipped.clamp(max=dual_clip_pos), ratio.clamp(max=dual_clip_neg))
    weight = torch.where(clipped, 0.0, bounded)
    loss = _policy_gradient(tokens, weight, aggregation, normalizer)
    return loss, _metrics(tokens, ratio, weight, clipped, ~clipped & (unbounded > bounded))


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip_neg: float = 3.0,
    aggregation: Aggregation = "seq-mean-token-mean",
    clip_low_entropy_mask: Tensor | None = None,
    eps_high_entropy: float = 0.4,
    correction: Tensor | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, Metrics]:
    """GRPO: the PPO clip with r as the weight of both signs, and the hard dual clip on negative tokens.

    Shapes, masking, errors and `normalizer` as in `aspo_loss`. A negative token with r > dual_clip_neg has no
    gradient and counts in `dual_clip_fraction_neg`, not in `clip_fraction_neg`. Source: arXiv 2402.03300
    (GRPO, aggregation), 1912.09729 (dual clip).
    """
    tokens = _prepare(logprobs, old_logprobs, advantages, mask, correction)
    ratio, positive = tokens.log_ratio.exp(), tokens.advantages >= 0
    clipped = _outside_clip(ratio, positive, eps_low, eps_high, clip_low_entropy_mask, eps_high_entropy)
    dual_clipped = ~positive & (ratio > dual_clip_neg)
    weight = torch.where(clipped | dual_clipped, 0.0, ratio)
    loss = _policy_gradient(tokens, weight, aggregation, normalizer)
    return loss, _metrics(tokens, ratio, weight, clipped, dual_clipped)


# DAPO (arXiv 2503.14476): the same with a higher upper clip and a mean over all tokens.
dapo_loss = partial(grpo_loss, eps_high=0.28, aggregation="token-mean")


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float = 1.0,
    eps_high: float = 4.0,
    aggregation: Aggregation = "token-mean",
    correction: Tensor | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO: no token is dropped, its weight is r clipped into [1 - eps_low, 1 + eps_high].

    Shapes, masking, errors and `normalizer` as in `aspo_loss`. Clip fractions are 0; the dual-clip fractions
    count the tokens whose weight was clipped, on either side. The default range is [0, 5]. Source: arXiv
    2506.13585; the range of 2510.13786, as the first disables the lower bound and names no upper one.
    """
    tokens = _prepare(logprobs, old_logprobs, advantages, mask, correction)
    ratio = tokens.log_ratio.exp()
    weight = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = _policy_gradient(tokens, weight, aggregation, normalizer)
    return loss, _metrics(tokens, ratio, weight, torch.zeros_like(tokens.mask), weight != ratio)


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    aggregation: Aggregation = "seq-mean-token-mean",
    correction: Tensor | None = None,
    normalizer: float | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO: one ratio a sequence, the geometric mean of its tokens' ratios, clipped as a whole.

    Shapes, masking, errors and `normalizer` as in `aspo_loss`; one row is one sequence. The ratio and weight
    metrics are of the sequence ratio, over tokens; the KL metrics stay per token. There is no dual clip.
    Source: arXiv 2507.18071 (its eps are two orders smaller than a token ratio's).
    """
    tokens = _prepare(logprobs, old_logprobs, advantages, mask, correction)
    ratio = _row_mean(tokens.log_ratio, tokens.mask).exp().expand_as(tokens.log_ratio)
    clipped = _outside_clip(ratio, tokens.advantages >= 0, eps_low, eps_high)
    weight = torch.where(clipped, 0.0, ratio)
    loss = _policy_gradient(tokens, weight, aggregation, normalizer)
    return loss, _metrics(tokens, ratio, weight, clipped, torch.zeros_like(clipped))


LOSSES: dict[str, Loss] = {
    "aspo": aspo_loss,
    "grpo": grpo_loss,
    "dapo": dapo_loss,
    "cispo": cispo_loss,
    "gspo": gspo_loss,
    "no-is": partial(aspo_loss, positive_weight="one"),
    "response-mean": partial(aspo_loss, positive_weight="response_mean"),
    "ratio": partial(aspo_loss, positive_weight="ratio"),
}


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """K3 estimate of KL(policy || reference) for each token, differentiable in `logprobs`; see `aggregate`.

    All tensors [B, T]; nats; 0 where masked. The log-ratio is clamped to +-20 and the value to 10, beyond
    which a token has no gradient. Raises ValueError for shapes that differ. Source:
    http://joschu.net/blog/kl-approx.html.
    """
    _check_shapes(logprobs, ref_logprobs=ref_logprobs, mask=mask)
    mask = mask.bool()
    log_ratio = _blank(ref_logprobs, mask).detach() - _blank(logprobs, mask)
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (log_ratio.expm1() - log_ratio).clamp(max=KL_BOUND)


@torch.no_grad()
def entropy_split_mask(entropy: Tensor, mask: Tensor, low_fraction: float = 0.8) -> Tensor:
    """The `clip_low_entropy_mask` of the reference code: True at each row's lowest-entropy tokens.

    `entropy` and `mask` [B, T], result bool [B, T], False where masked. The threshold is the `low_fraction`
    quantile of the row's tokens (interpolated), and a tie with it is True. Raises ValueError for shapes that
    differ.
    """
    _check_shapes(entropy, mask=mask)
    mask = mask.bool()
    entropy = _blank(entropy, mask).masked_fill(~mask, float("nan"))
    return entropy <= entropy.nanquantile(low_fraction, dim=-1, keepdim=True)


def behavior_correction(
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: Literal["truncate", "mask", "none"] = "truncate",
    level: Literal["token", "sequence"] = "token",
    cap: float = 2.0,
    floor: float = 0.5,
) -> Tensor:
    """The weight b for samples of the inference engine, from s = proximal / behaviour, never flipped.

    All tensors [B, T], result too, 0 where masked. `truncate` gives min(s, cap); `mask` gives s inside
    [floor, cap] and 0 outside (such tokens still count in the loss's denominator); `none` gives 1. `level`
    sequence makes s the product over the row's tokens, whose spread grows with their number. Log-ratios are
    clamped to +-20, the product's too. Raises ValueError for shapes that differ and for unknown names.
    Source: truncated importance sampling (TIS, Yao et al. 2025) and IcePop's mask.
    """
    _check_shapes(proximal_logprobs, behavior_logprobs=behavior_logprobs, mask=mask)
    if level not in ("token", "sequence"):
        raise ValueError(f"unknown level {level!r}: use token or sequence")
    mask = mask.bool()
    log_ratio = _log_ratio(proximal_logprobs, behavior_logprobs, mask)
    if level == "sequence":
        total = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
        log_ratio = total.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    if mode == "truncate":
        weight = ratio.clamp(max=cap)
    elif mode == "mask":
        weight = torch.where((ratio < floor) | (ratio > cap), 0.0, ratio)
    elif mode == "none":
        weight = torch.ones_like(ratio)
    else:
        raise ValueError(f"unknown mode {mode!r}: use truncate, mask or none")
    return torch.where(mask, weight, 0.0)


@torch.no_grad()
def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Kish's effective sample size (sum w)^2 / sum w^2 of the unmasked weights, in tokens; 0 if all are 0.

    `weights` and `mask` [B, T], result 0-dim: for the whole batch, since it does not add up over
    micro-batches. For b * k * w, whose two sums do, divide the squared metric `corrected_weight_mean` by
    `corrected_weight_square_mean`: that is ESS / tokens.
    """
    _check_shapes(weights, mask=mask)
    weights = _blank(weights, mask.bool())
    total, squares = weights.sum(), weights.square().sum()
    return torch.where(squares > 0, total.square() / squares, 0.0)


def aggregate(
    values: Tensor, mask: Tensor, aggregation: Aggregation = "token-mean", normalizer: float | None = None
) -> Tensor:
    """Reduce per-token values [B, T] to a scalar; through it a KL term is normalised as the loss is.

    `normalizer` as in `aspo_loss`; it may be 0 only where there is no token in the whole batch, and the
    result is 0. Raises ValueError for an unknown aggregation or an impossible normalizer.
    """
    if normalizer is not None and not (normalizer == 0 or normalizer >= 1):
        raise ValueError(f"normalizer is {normalizer}: pass the whole batch's count of tokens or sequences")
    _check_shapes(values, mask=mask)
    mask = mask.bool()
    values, lengths = torch.where(mask, values, 0.0), mask.sum(-1)
    if aggregation == "token-mean":
        total, count = values.sum(), lengths.sum()
    elif aggregation == "seq-mean-token-mean":
        total, count = (values.sum(-1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    elif aggregation == "seq-mean-token-sum":
        total, count = values.sum(), (lengths > 0).sum()
    else:
        names = "token-mean, seq-mean-token-mean or seq-mean-token-sum"
        raise ValueError(f"unknown aggregation {aggregation!r}: use {names}")
    return total / (count.clamp(min=1) if normalizer is None else max(normalizer, 1))


class _Tokens(NamedTuple):
    """One call's inputs, harmless where masked."""

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    correction: Tensor | None
    mask: Tensor


def _prepare(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, correction: Tensor | None
) -> _Tokens:
    tensors = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": mask, "correction": correction}
    _check_shapes(logprobs, **tensors)
    mask = mask.bool()
    return _Tokens(
        logprobs=_blank(logprobs, mask),
        log_ratio=_log_ratio(logprobs, old_logprobs, mask),
        advantages=_blank(advantages, mask),
        correction=None if correction is None else _blank(correction, mask),
        mask=mask,
    )


def _check_shapes(logprobs: Tensor, **others: Tensor | None) -> None:
    if logprobs.ndim != 2:
        raise ValueError(f"the first tensor has shape {tuple(logprobs.shape)}: make it [sequences, tokens]")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            got, want = tuple(tensor.shape), tuple(logprobs.shape)
            raise ValueError(f"{name} has shape {got}: expand it to {want}, one value a token")


def _blank(values: Tensor, mask: Tensor) -> Tensor:
    # where, not a product: NaN * 0 is NaN, forwards and backwards; at least fp32, for bf16 ratios are 1 % off
    return torch.where(mask, values, 0.0).to(torch.promote_types(values.dtype, torch.float32))


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    difference = _blank(logprobs, mask).detach() - _blank(old_logprobs, mask).detach()
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _row_mean(values: Tensor, selected: Tensor) -> Tensor:
    """Mean over each row's selected values, [B, 1]; 0 for a row with none."""
    total = torch.where(selected, values, 0.0).sum(-1, keepdim=True)
    return total / selected.sum(-1, keepdim=True).clamp(min=1)


def _outside_clip(
    ratio: Tensor,
    positive: Tensor,
    eps_low: float,
    eps_high: float,
    low_entropy: Tensor | None = None,
    eps_high_entropy: float = 0.0,
) -> Tensor:
    """Whether the update has gone far enough: beyond the edge of the side it moves to; the edge is inside."""
    low, high = torch.full_like(ratio, eps_low), torch.full_like(ratio, eps_high)
    if low_entropy is not None:
        _check_shapes(ratio, clip_low_entropy_mask=low_entropy)
        low = low.masked_fill(~low_entropy.bool(), eps_high_entropy)
        high = high.masked_fill(~low_entropy.bool(), eps_high_entropy)
    return torch.where(positive, ratio > 1 + high, ratio < 1 - low)


def _policy_gradient(
    tokens: _Tokens, weight: Tensor, aggregation: Aggregation, normalizer: float | None
) -> Tensor:
    coefficient = tokens.advantages * weight
    if tokens.correction is not None:
        coefficient = coefficient * tokens.correction
    return aggregate(-coefficient.detach() * tokens.logprobs, tokens.mask, aggregation, normalizer)


@torch.no_grad()
def _metrics(
    tokens: _Tokens, ratio: Tensor, weight: Tensor, clipped: Tensor, dual_clipped: Tensor
) -> Metrics:
    """What a user must see; `pos` is A > 0 and `neg` A < 0: tokens with A = 0 get no gradient and no sign."""

    def mean(values: Tensor, where: Tensor) -> Mean:
        return Mean(torch.where(where, values, 0).sum(), where.sum())

    corrected_weight = weight if tokens.correction is None else weight * tokens.correction
    metrics = {
        "surrogate": mean(tokens.advantages * corrected_weight, tokens.mask),
        "ratio_mean": mean(ratio, tokens.mask),
        "corrected_weight_mean": mean(corrected_weight, tokens.mask),
        "corrected_weight_square_mean": mean(corrected_weight.square(), tokens.mask),
        "approx_kl_k1": mean(-tokens.log_ratio, tokens.mask),
        "approx_kl_k3": mean(tokens.log_ratio.expm1() - tokens.log_ratio, tokens.mask),
    }
    signs = {"pos": tokens.mask & (tokens.advantages > 0), "neg": tokens.mask & (tokens.advantages < 0)}
    for name, sign in signs.items():
        metrics[f"ratio_mean_{name}"] = mean(ratio, sign)
        metrics[f"weight_mean_{name}"] = mean(weight, sign)
        metrics[f"clip_fraction_{name}"] = mean(clipped, sign)
        metrics[f"dual_clip_fraction_{name}"] = mean(dual_clipped, sign)
    return metrics
