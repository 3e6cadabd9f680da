"""Groups that agree, and completions that were cut."""

from __future__ import annotations

import dataclasses

import numpy as np

from aspo_learner.groups import describe_groups, mask_truncated, teaches
from rollouts import make_plain_group


def test_groups_of_one_mind_are_counted_by_what_they_agree_on() -> None:
    rewards = ([1, 1], [0.5, 0.5], [0, 0], [-1, -1], [1, 0])
    groups = [make_plain_group([[("r/1/0", 2)]] * 2, rewards=own) for own in rewards]
    groups[2] = dataclasses.replace(groups[2], rewards=np.zeros(2, np.float32))
    assert [teaches(group) for group in groups] == [False, False, False, False, True]
    assert describe_groups(groups, [groups[0], groups[2], groups[2]]) == {
        "refilled_groups": 3,
        "all_right_fraction": 3 / 8,
        "all_wrong_fraction": 4 / 8,
    }


def test_only_the_tokens_of_cut_completions_are_masked() -> None:
    group = make_plain_group([[("r/1/0", 2)], [("r/1/0", 1), ("r/1/1", 2)], [("r/1/0", 1)]])
    group = dataclasses.replace(group, finish_reasons=("stop", "length", "stop"))
    weights = np.array([1, 0.5, 1, 1, 1, 0.25], np.float32)
    masked = mask_truncated(group, weights)
    assert masked.dtype == np.float32
    assert masked.tolist() == [1, 0.5, 0, 0, 0, 0.25]
