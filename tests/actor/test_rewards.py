"""The built-in rewards: right, wrong, hostile and malformed answers, with its score; None is a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from aspo.config import RewardConfig, RewardPart
from aspo_actor.rewards import overlong_penalty
from aspo_actor.rewards.calls import Answers
from aspo_actor.rewards.scorer import Scorer

TAGS = r"<think>.+?</think>\s*<answer>[^<]*</answer>"
BOXED = r"\\boxed\{([^{}]*)\}"
BACKTRACKING = r"(a+)+b"

EXACT: list[tuple[str, Any, float | None]] = [
    ("42", "42", 1),
    (" 42\n", 42, 1),
    ("42.", "42", 0),
    ("", "42", 0),
    ("", "", 1),
    ("The answer is 42", "42", 0),
    ("42\x00", "42", 0),
    ("4" * 1_000_000, "42", 0),
    ("None", None, None),
]
NUMERIC: list[tuple[str, Any, float | None]] = [
    ("It is 42.", "42", 1),
    ("First 41, then 42.0", 42, 1),
    ("1,234", "1234", 1),
    ("-3", "3", 0),
    ("4.2e1", "42", 1),
    ("42 or 43", "42", 0),
    ("no number", "42", 0),
    ("", "42", 0),
    ("1e999", "42", 0),
    ("9" * 100_000, "42", 0),
    ("nan", "42", 0),
    ("٤٢", "42", 1),  # Arabic digits: a number none the less
    ("it is .5", ".5", 1),
    ("it is .5", "5", 0),
    ("version 1.2.3", "3", 1),
    ("so...5", "5", 1),
    ("\N{MINUS SIGN}5", "-5", 1),
    ("\N{MINUS SIGN}5", "5", 0),
    ("-5", "\N{MINUS SIGN}5", 1),
    ("1e99999999999999999999", "42", 0),
    ("42", "forty-two", None),
    ("42", None, None),
    ("42", "inf", None),
    ("42", 10**400, None),
]
REGEX: list[tuple[str, Any, float | None]] = [
    (r"so \boxed{42}", "42", 1),
    (r"\boxed{41} no, \boxed{ 42 }", 42, 1),
    (r"\boxed{42} no, \boxed{41}", "42", 0),
    ("42", "42", 0),
    (r"\boxed{42", "42", 0),
    ("", "42", 0),
    (r"\boxed{" * 10_000, "42", 0),
    (r"\boxed{None}", None, None),
]
FORMAT: list[tuple[str, Any, float | None]] = [
    ("<think>a\nb</think>\n<answer>42</answer>", "", 1),
    ("  <think>a</think><answer></answer>\n", "", 1),
    ("<think></think><answer>42</answer>", "", 0),
    ("<think>a</think><answer>42</answer> and more", "", 0),
    ("<answer>42</answer>", "", 0),
    ("<think>a<answer>42</answer>", "", 0),
    ("", "", 0),
    ("<think>" * 10_000, "", 0),
]
MATH: list[tuple[str, Any, float | None]] = [
    (r"so $\boxed{\frac{1}{2}}$", "1/2", 1),
    (r"\boxed{\dfrac12}", "0.5", 1),
    ("The answer is 42", "42", 1),
    (r"$\{2,1\}$", r"\{1,2\}", 1),
    (r"$(x+1)^2$", "x^2+2x+1", 1),
    (r"$2\sqrt{2}$", r"\sqrt{8}", 1),
    ("$1234$", "1,234", 1),
    ("$0.1$", r"10\%", 1),
    (r"First $\boxed{41}$. No, that is wrong, it is $\boxed{42}$.", r"$\boxed{42}$", 1),
    (r"Either \boxed{41} or \boxed{42}", "42", 0),
    (r"$(2, 1)$", "(1,2)", 0),
    (r"\boxed{43}", 42, 0),
    ("no mathematics at all", "42", 0),
    ("", "42", 0),
    (r"\boxed{", "42", 0),
    (r"\frac{" * 2_000, "42", 0),
    ("__import__('os').abort()", "42", 0),
    (r"$9^{9^{9^{9}}}$", "3", 0),  # takes for ever
    ("42", "", None),
    ("$None$", None, None),
]
CASES = [
    *((RewardPart(function="aspo_actor.rewards:exact_match"), *case) for case in EXACT),
    *((RewardPart(function="aspo_actor.rewards:numeric_match"), *case) for case in NUMERIC),
    *((RewardPart(function="aspo_actor.rewards:regex_match", options={"pattern": BOXED}), *c) for c in REGEX),
    *(
        (RewardPart(function="aspo_actor.rewards:format_match", options={"pattern": TAGS}), *c)
        for c in FORMAT
    ),
    *((RewardPart(function="aspo_actor.rewards:math_match"), *case) for case in MATH),
]


def score(scorer: Scorer, *completions: str, **columns: Any) -> list[float | None]:
    """The rewards, None for what failed."""
    answers = Answers("?", completions, [[0]] * len(completions), 100, columns)
    scores = asyncio.run(scorer.score(answers))
    pairs = zip(scores.rewards.tolist(), scores.failed, strict=True)
    return [None if failed else reward for reward, failed in pairs]


@pytest.fixture(scope="module")
def scorers() -> Iterator[dict[str, Scorer]]:
    """One for every built-in: its worker is warm after the first case."""
    parts = {part.function: part for part, *_ in CASES}
    found: dict[str, Scorer] = {}
    for path, part in parts.items():
        config = RewardConfig(function=path, options=part.options, concurrency=1, timeout_s=60.0)
        found[path] = Scorer(config, ["answer"]).__enter__()
    yield found
    for scorer in found.values():
        scorer.__exit__(None, None, None)


def test_overlong_penalty_falls_over_the_buffer() -> None:
    def penalty(tokens: int, buffer: int) -> float:
        return overlong_penalty("", completion_tokens=tokens, max_tokens=100, buffer=buffer)

    want = {0: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 100: -1.0, 110: -1.5}
    assert {tokens: penalty(tokens, 20) for tokens in want} == pytest.approx(want)
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match="buffer"):
            penalty(10, buffer)


@pytest.mark.parametrize(("part", "completion", "answer", "reward"), CASES)
def test_a_built_in_reward(
    scorers: dict[str, Scorer], part: RewardPart, completion: str, answer: Any, reward: float | None
) -> None:
    assert score(scorers[part.function], completion, answer=answer) == [reward]
