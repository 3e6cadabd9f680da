"""What a step says of its batch."""

from __future__ import annotations

import dataclasses

import numpy as np

from aspo.schemas import PolicyVersion
from aspo_learner.report import describe_batch, describe_sets
from aspo_learner.staleness import StalenessRule
from rollouts import make_plain_group

CURRENT = PolicyVersion(run="test", epoch=1, step=3)
RULE = StalenessRule(max_staleness=4, policy="drop", decay=0.5)


def test_each_part_of_the_reward_is_averaged_over_what_was_scored() -> None:
    groups = [make_plain_group([[("test/1/3", 2)]] * 2, uid=f"test:train:{i}") for i in range(2)]
    parts = [{"right": [1, 0], "format": [0.5, 0.5]}, {"right": [1, 0], "format": [-0.5, 0]}]
    groups = [
        dataclasses.replace(
            group,
            failed=np.array([False, i == 1]),
            reward_parts={name: np.array(values, np.float32) for name, values in parts[i].items()},
        )
        for i, group in enumerate(groups)
    ]
    weights = [np.ones(4, np.float32)] * 2
    metrics = describe_batch(RULE, groups, weights, [], CURRENT)
    assert metrics["reward_part/right"] == 2 / 3
    assert metrics["reward_part/format"] == 0.5 / 3
    assert metrics["reward_failed_fraction"] == 0.25


def test_each_data_set_has_its_own_reward() -> None:
    groups = [
        make_plain_group([[("test/1/3", 2)]] * 2, rewards=rewards) for rewards in ([1, 1], [1, 0], [0.5, 0.5])
    ]
    assert describe_sets(groups, ["a", "b", "a"]) == {
        "set_groups/a": 2,
        "set_reward/a": 0.75,
        "set_groups/b": 1,
        "set_reward/b": 0.5,
    }
