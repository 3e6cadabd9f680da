"""Advantages of a batch of groups: GRPO's as in the reference runs of ASPO (arXiv 2510.06062), and others.

Deviations from the reference code (github.com/wizard-III/Archer2.0, a fork of verl):

1. A group whose rewards are all equal is uninformative whatever they equal; the reference drops those that
   are all exactly 0 or all exactly 1.
2. A group of one has advantage 0 and is uninformative; the reference gives it its raw reward.
3. REINFORCE++ is normalised over the batch's samples; the reference's fork does so over their tokens, by
   which long answers weigh more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from aspo.config import Estimator


def batch_advantages(rewards: Sequence[Tensor], estimator: Estimator = "grpo") -> list[Tensor]:
    """The advantages of a batch of groups; zeros for a group that is uninformative.

    `rewards` holds [G] for each group, and so does the result; in reward units before scaling. `reinforce++`
    (with baseline, arXiv 2501.03262) divides R - mean by its standard deviation (ddof 1) over the whole
    batch, uninformative groups included, + 1e-6; the others are `group_advantages`.
    """
    if estimator != "reinforce++":
        return [group_advantages(group, estimator=estimator) for group in rewards]
    centred = [group_advantages(group, estimator="dr-grpo") for group in rewards]
    everything = torch.cat(centred) if centred else torch.zeros(0)
    scale = everything.std() + 1e-6 if len(everything) > 1 else 1.0
    return [group / scale for group in centred]


def group_advantages(rewards: Tensor, *, estimator: Literal["grpo", "dr-grpo", "rloo"] = "grpo") -> Tensor:
    """The advantage of each of one prompt's G samples over its group; zeros if the group is uninformative.

    `rewards` [G], result [G], both in reward units before scaling. `grpo` is (R - mean) / (std + 1e-6) with
    the sample standard deviation (ddof 1); `dr-grpo` leaves the division out; `rloo` is R - the mean of the
    others. Raises ValueError for rewards that are not finite, not [G], or for an unknown estimator.
    Source: arXiv 2402.03300, 2503.20783, 2402.14740.
    """
    if estimator not in ("grpo", "dr-grpo", "rloo"):
        known = ", ".join(get_args(Estimator))
        raise ValueError(f"unknown estimator {estimator!r} of one group: use one of {known}")
    if not is_informative(rewards):
        return torch.zeros_like(_as_float(rewards))
    centred = _as_float(rewards) - _as_float(rewards).mean()
    if estimator == "grpo":
        return centred / (_as_float(rewards).std() + 1e-6)
    return centred * len(centred) / (len(centred) - 1) if estimator == "rloo" else centred


def is_informative(rewards: Tensor) -> bool:
    """Whether a group of rewards [G] can teach anything: at least two samples, not all of the same reward.

    Raises ValueError for rewards that are not finite or not [G].
    """
    if rewards.ndim != 1 or rewards.numel() == 0:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: pass the [G] rewards of one group")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards are not finite ({rewards.tolist()}): drop the group or score the sample 0")
    return bool((rewards != rewards[0]).any())


def _as_float(rewards: Tensor) -> Tensor:
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))
