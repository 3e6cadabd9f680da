"""From hidden states to the log-probs of given tokens, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Give each target's log-prob and its distribution's entropy at a temperature.

    Shapes: hidden [N, H]; weight [V, H]; targets [N] int64; results [N] fp32, in nats. Differentiable in
    hidden and weight through the log-probs; the entropy carries no gradient.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(torch.promote_types(hidden.dtype, torch.float32))
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy
