"""Reward functions in worker processes: right, wrong, raising, hanging and dying ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from aspo.config import ConfigError, RewardConfig
from aspo_actor.rewards import exact_match, numeric_match
from aspo_actor.rewards.scorer import Scorer, load_reward_function


def difficult(completion: str, *, answer: str) -> Any:
    """A reward function that does what the completion says."""
    if completion == "raise":
        raise RuntimeError("no idea")
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(7)
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    return float(completion == answer)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    # The wait of the first call includes a new worker's imports, hence seconds and not less.
    config = RewardConfig(function=f"{__name__}:difficult", timeout_s=3.0, concurrency=2, failed_score=-1.0)
    with Scorer(config, ["answer"]) as scorer:
        yield scorer


@pytest.mark.parametrize(
    ("completions", "rewards", "failed"),
    [
        (["4", "5"], [1, 0], [False, False]),
        (["4", "raise", "nan", "none", "5"], [1, -1, -1, -1, 0], [False, True, True, True, False]),
        (["4", "die"], [1, -1], [False, True]),
        (["hang", "4"], [-1, 1], [True, False]),
    ],
    ids=["well", "raises", "dies", "hangs"],
)
async def test_a_failure_costs_its_own_sample_only(
    scorer: Scorer, completions: Sequence[str], rewards: Sequence[float], failed: Sequence[bool]
) -> None:
    before = scorer.failures
    scores = await scorer.score(completions, {"answer": "4"})
    np.testing.assert_array_equal(scores.rewards, rewards)
    np.testing.assert_array_equal(scores.failed, failed)
    assert scorer.failures - before == sum(failed)


@pytest.mark.parametrize(
    ("path", "columns", "words"),
    [
        ("no_such_module:f", ["answer"], "No module named 'no_such_module'; put its folder on PYTHONPATH"),
        ("aspo_actor.rewards:no_such", ["answer"], "has no 'no_such'"),
        ("aspo_actor.rewards:re", ["answer"], "is not a plain function"),
        ("aspo_actor.rewards:exact_match", ["solution"], "set data.reward_columns"),
    ],
)
def test_a_function_that_cannot_work_is_refused_at_the_start(
    path: str, columns: Sequence[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_reward_function(path, columns)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [("42", "42", 1), (" 42\n", 42, 1), ("42.", "42", 0), ("", "42", 0), ("The answer is 42", "42", 0)],
)
def test_exact_match(completion: str, answer: object, reward: float) -> None:
    assert exact_match(completion, answer=answer) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("It is 42.", "42", 1),
        ("First 41, then 42.0", 42, 1),
        ("1,234", "1234", 1),
        ("-3", "3", 0),
        ("4.2e1", "42", 1),
        ("42 or 43", "42", 0),
        ("no number", "42", 0),
        ("", "42", 0),
    ],
)
def test_numeric_match(completion: str, answer: object, reward: float) -> None:
    assert numeric_match(completion, answer=answer) == reward
