"""Which groups of a batch teach anything, and what of them is left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from aspo.schemas import FloatArray, RolloutGroup
from aspo_learner.advantages import is_informative


def teaches(group: RolloutGroup) -> bool:
    """Whether the group's rewards differ, so that there is something to learn from it."""
    return is_informative(torch.tensor(group.rewards))


def mask_truncated(group: RolloutGroup, weights: FloatArray) -> FloatArray:
    """Token weights [sum(lengths)] with those of completions that were cut at max_tokens set to 0.

    Their rewards still count in the advantages of the others, as in DAPO (arXiv 2503.14476).
    """
    whole = np.array([reason != "length" for reason in group.finish_reasons])
    return np.where(np.repeat(whole, group.lengths), weights, np.float32(0))


def describe_groups(groups: Sequence[RolloutGroup], refilled: Sequence[RolloutGroup]) -> dict[str, float]:
    """How many groups agreed on their reward, among those of the batch and those that were replaced.

    A reward above 0 counts as right.
    """
    arrived = [*groups, *refilled]
    same = [float(group.rewards[0]) for group in arrived if not teaches(group)]
    return {
        "refilled_groups": float(len(refilled)),
        "all_right_fraction": sum(reward > 0 for reward in same) / len(arrived),
        "all_wrong_fraction": sum(reward <= 0 for reward in same) / len(arrived),
    }
