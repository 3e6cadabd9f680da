"""Group-relative advantages, as in the reference runs of ASPO (arXiv 2510.06062).

Deviations from the reference code (github.com/wizard-III/Archer2.0, a fork of verl):

1. A group whose rewards are all equal is uninformative whatever they equal; the reference drops those that
   are all exactly 0 or all exactly 1.
2. A group of one has advantage 0 and is uninformative; the reference gives it its raw reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, estimator: Literal["grpo", "dr-grpo"] = "grpo") -> Tensor:
    """The advantage of each of one prompt's G samples over its group; zeros if the group is uninformative.

    `rewards` [G], result [G], both in reward units before scaling. `grpo` is (R - mean) / (std + 1e-6) with
    the sample standard deviation (ddof 1); `dr-grpo` leaves the division out. Raises ValueError for rewards
    that are not finite, not [G], or for an unknown estimator. Source: arXiv 2402.03300, 2503.20783.
    """
    if estimator not in ("grpo", "dr-grpo"):
        raise ValueError(f"unknown estimator {estimator!r}: use grpo or dr-grpo")
    if not is_informative(rewards):
        return torch.zeros_like(_as_float(rewards))
    centred = _as_float(rewards) - _as_float(rewards).mean()
    return centred / (_as_float(rewards).std() + 1e-6) if estimator == "grpo" else centred


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
