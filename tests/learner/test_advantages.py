"""Group advantages against the formula in plain Python."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aspo_learner.advantages import batch_advantages, group_advantages, is_informative

rewards_of_a_group = st.lists(st.floats(-2, 2), min_size=2, max_size=16)


@settings(deadline=None, database=None)
@given(rewards_of_a_group)
def test_grpo_advantage_is_the_formula(rewards: list[float]) -> None:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    if min(rewards) == max(rewards):
        assert got.tolist() == [0.0] * len(rewards)
    else:
        assert got.tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], rel=1e-6, abs=1e-9)


def test_half_right_by_hand() -> None:
    std = math.sqrt(1 / 3)  # four rewards around 0.5, divided by three
    want = [0.5 / (std + 1e-6)] * 2 + [-0.5 / (std + 1e-6)] * 2
    assert group_advantages(torch.tensor([1, 1, 0, 0])).tolist() == pytest.approx(want)
    assert group_advantages(torch.tensor([1, 1, 0, 0]), estimator="dr-grpo").tolist() == [
        0.5,
        0.5,
        -0.5,
        -0.5,
    ]


@settings(deadline=None, database=None)
@given(rewards_of_a_group)
def test_rloo_holds_each_sample_against_the_mean_of_the_others(rewards: list[float]) -> None:
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), estimator="rloo")
    others = [statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    want = [r - other for r, other in zip(rewards, others, strict=True)]
    assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)


@settings(deadline=None, database=None)
@given(st.lists(rewards_of_a_group, min_size=1, max_size=5))
def test_reinforce_plus_plus_is_scaled_by_the_whole_batch(groups: list[list[float]]) -> None:
    got = batch_advantages([torch.tensor(rewards, dtype=torch.float64) for rewards in groups], "reinforce++")
    centred = [[r - statistics.fmean(rewards) for r in rewards] for rewards in groups]
    scale = statistics.stdev(value for group in centred for value in group) + 1e-6
    for found, group in zip(got, centred, strict=True):
        assert found.tolist() == pytest.approx([value / scale for value in group], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
def test_the_other_estimators_see_one_group_at_a_time(estimator: Any) -> None:
    groups = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 3.0])]
    got = batch_advantages(groups, estimator)
    for found, group in zip(got, groups, strict=True):
        assert torch.equal(found, group_advantages(group, estimator=estimator))
    assert batch_advantages([], "reinforce++") == []


@pytest.mark.parametrize("rewards", [[1.0] * 7, [0.0] * 2, [0.1] * 3, [-0.3] * 5, [1.0]])
def test_a_group_that_teaches_nothing_has_no_advantage(rewards: list[float]) -> None:
    group = torch.tensor(rewards)
    assert not is_informative(group)
    assert group_advantages(group).tolist() == [0.0] * len(rewards)


def test_one_different_reward_makes_a_group_informative() -> None:
    for position in range(3):
        rewards = torch.zeros(3)
        rewards[position] = 1e-3
        assert is_informative(rewards)
        assert group_advantages(rewards).argmax() == position


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_must_be_finite(bad: float) -> None:
    for function in (group_advantages, is_informative):
        with pytest.raises(ValueError, match="not finite"):
            function(torch.tensor([0.0, bad, 1.0]))


def test_bad_groups_say_what_to_do() -> None:
    for rewards in (torch.zeros(2, 2), torch.zeros(0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"pass the \[G\] rewards"):
            group_advantages(rewards)
    with pytest.raises(ValueError, match="use one of grpo"):
        group_advantages(torch.zeros(2), estimator="gae")  # type: ignore[arg-type]
