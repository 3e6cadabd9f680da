"""Reward functions in worker processes: right, wrong, raising, hanging and dying ones."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from aspo.config import ConfigError, RewardConfig, RewardPart
from aspo_actor.rewards.calls import Answers, load_reward_function
from aspo_actor.rewards.scorer import Scorer


def answers(completions: Sequence[str], *, tokens: Sequence[int] = (), **columns: Any) -> Answers:
    """Completions of 3 tokens each, or of as many as `tokens` says, to one prompt."""
    lengths = tokens or [3] * len(completions)
    return Answers("2+2=", completions, [list(range(n)) for n in lengths], 10, columns)


class Speechless(Exception):
    """What cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def difficult(completion: str, *, answer: str) -> Any:
    """A reward function that does what the completion says."""
    if completion == "raise":
        raise RuntimeError("no idea")
    if completion == "complain":
        raise ValueError("too hard")
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(7)
    if completion == "exit":
        sys.exit(0)
    if completion == "interrupt":
        raise KeyboardInterrupt
    if completion == "cancel":
        raise asyncio.CancelledError
    if completion == "speechless":
        raise Speechless
    if completion == "odd":
        return Speechless()
    if completion == "huge":
        return 10**400
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
        (["exit", "4", "interrupt", "cancel"], [-1, 1, -1, -1], [True, False, True, True]),
        (["4", "speechless", "odd", "huge"], [1, -1, -1, -1], [False, True, True, True]),
    ],
    ids=["well", "raises", "dies", "hangs", "ends", "is odd"],
)
async def test_a_failure_costs_its_own_sample_only(
    scorer: Scorer, completions: Sequence[str], rewards: Sequence[float], failed: Sequence[bool]
) -> None:
    before = scorer.failures
    scores = await scorer.score(answers(completions, answer="4"))
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
        load_reward_function(RewardPart(function=path), columns)


async def thinking(completion: str, *, prompt: str, answer: str) -> float:
    """A judge that takes its time, for all completions at once."""
    await asyncio.sleep(0.5)
    if completion == "raise":
        raise RuntimeError(prompt)
    return float(completion == answer)


def trl(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
    """As rewards are written for TRL."""
    assert prompts == ["2+2="] * len(completions)
    return [
        None if text == "?" else float(text == right) for text, right in zip(completions, answer, strict=True)
    ]


def trl_chat(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    assert columns["prompts"][0] == [{"role": "user", "content": "2+2="}]
    if any(chat[0]["content"] == "raise" for chat in completions):
        raise RuntimeError
    return [float(len(ids)) for ids in completion_ids]


def too_few(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0]


def test_parts_are_summed_by_weight_and_each_is_told() -> None:
    config = RewardConfig(
        parts=(
            RewardPart(function="aspo_actor.rewards:exact_match", name="right"),
            RewardPart(function=f"{__name__}:thinking", weight=2.0),
            RewardPart(function="aspo_actor.rewards:overlong_penalty", options={"buffer": 4}, weight=0.5),
            RewardPart(function=f"{__name__}:trl", style="trl", weight=-1.0),
            RewardPart(function=f"{__name__}:trl_chat", style="trl-chat", weight=0.0),
        ),
        failed_score=-1.0,
        concurrency=2,
    )
    with Scorer(config, ["answer"]) as scorer:
        scores = asyncio.run(
            scorer.score(answers(["4", "5", "?", "raise"], tokens=[6, 8, 10, 1], answer="4"))
        )
        assert scorer.failures == 1
    np.testing.assert_array_equal(scores.rewards, [2.0, -0.25, -0.5, -1.0])
    np.testing.assert_array_equal(scores.failed, [False, False, False, True])
    assert {name: values.tolist() for name, values in scores.parts.items()} == {
        "right": [1, 0, 0, 0],
        "thinking": [1, 0, 0, 0],
        "overlong_penalty": [0, -0.5, -1, 0],
        "trl": [1, 0, 0, 0],
        "trl_chat": [6, 8, 10, 0],
    }


async def awaited(completion: str, *, answer: str) -> Any:
    return difficult(completion, answer=answer)


def in_one(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[Any]:
    """As TRL asks; ends the process if it is alone with it."""
    return [difficult(text, answer=answer[0]) for text in completions]


def forgetful(completion: str, *, seen: list[str]) -> float:
    seen.append(completion)
    return float(len(seen))


@pytest.mark.parametrize("wicked", ["exit", "interrupt", "cancel", "speechless", "odd", "huge"])
@pytest.mark.parametrize("function", ["awaited", "in_one"])
def test_whatever_is_raised_stays_in_the_worker(function: str, wicked: str) -> None:
    style = "trl" if function == "in_one" else "plain"
    config = RewardConfig(function=f"{__name__}:{function}", style=style, concurrency=1)
    with Scorer(config, ["answer"]) as scorer:
        scores = asyncio.run(scorer.score(answers(["4", wicked], answer="4")))
        again = asyncio.run(scorer.score(answers(["4", "5"], answer="4")))
    assert scores.failed.tolist() == [False, True]
    assert again.rewards.tolist() == [1, 0]


async def test_a_fault_is_said_the_first_the_tenth_and_the_hundredth_time(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        await scorer.score(answers(["complain"] * 30, answer="4"))
    said = [
        re.sub(r" \(test_scorer\.py:\d+\)", "", line).partition("ValueError: ")[2] for line in caplog.messages
    ]
    assert said == ["too hard", "too hard (10 times now)", "too hard (100 times now)"]


def test_a_function_that_changes_a_column_changes_it_for_itself() -> None:
    config = RewardConfig(function=f"{__name__}:forgetful", concurrency=1)
    with Scorer(config, ["seen"]) as scorer:
        scores = asyncio.run(scorer.score(answers(["a", "b", "c"], seen=["x"])))
    assert scores.rewards.tolist() == [2, 2, 2]


def test_a_function_for_groups_that_gives_too_few_fails_them_all() -> None:
    config = RewardConfig(function=f"{__name__}:too_few", style="trl", concurrency=1)
    with Scorer(config, []) as scorer:
        scores = asyncio.run(scorer.score(answers(["4", "5"])))
    np.testing.assert_array_equal(scores.failed, [True, True])


def test_code_is_not_run_unless_the_config_says_so() -> None:
    config = RewardConfig(function="aspo_actor.rewards:code_tests")
    with pytest.raises(ConfigError, match=r"reward\.code\.sandbox is 'off'; set it to 'bubblewrap'"):
        Scorer(config, ["tests"])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"function": "aspo_actor.rewards:exact_match", "options": {"answer": "4"}},
            "'answer' is a column too",
        ),
        ({"function": "aspo_actor.rewards:format_match"}, "missing a required argument: 'pattern'"),
        (
            {"function": f"{__name__}:thinking", "options": {"warmth": 3}},
            "unexpected keyword argument 'warmth'",
        ),
        ({"function": "aspo_actor.rewards:exact_match", "style": "trl"}, "missing a required argument"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_the_start(part: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_reward_function(RewardPart(**part), ["answer"])
