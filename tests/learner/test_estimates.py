"""avg@k, pass@k and majority@k against their definitions, counted out, and the coverage of the intervals."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from aspo_learner.estimates import describe, estimate, final_answer, majority, pass_at_k, wilson


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    """Counted over all subsets; that it equals 1 - C(n-c, k) / C(n, k) is Chen et al.'s eq. 1."""
    right = np.array([[i < c for i in range(n)] for c in range(n + 1)])
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        expected = [Fraction(sum(any(row[list(s)]) for s in subsets), len(subsets)) for row in right]
        assert pass_at_k(right, k) == pytest.approx([float(share) for share in expected], abs=1e-12)


def test_pass_at_k_keeps_its_precision_for_many_answers() -> None:
    right = np.arange(1000)[None] < 1  # one of a thousand: exactly k / 1000
    assert pass_at_k(right, 100)[0] == pytest.approx(0.1, abs=1e-12)


def test_the_majority_is_that_of_the_votes_and_ties_are_drawn() -> None:
    assert majority([True, True, False], ["7", "7", "8"]) == 1
    assert majority([True, False, False], ["7", "8", "8"]) == 0
    assert majority([True, False], ["7", "8"]) == 0.5
    assert majority([True, False, False, False], ["7", "8", None, None]) == 0.5, "no answer is no vote"
    assert majority([False, True], [None, None]) == 0.5
    # Drawn by lot: the mean over every order of the answers of "the first to have most votes".
    right, given = [True, False, False, True], ["7", "8", "8", "7"]
    orders = list(itertools.permutations(range(4)))
    firsts = [Counter(given[i] for i in order).most_common(1)[0][0] for order in orders]
    assert majority(right, given) == sum(first == "7" for first in firsts) / len(orders)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{ \\frac{1}{2} } or \\boxed{ \\frac{1}{3} }", "\\frac{1}{3}"),
        ("\\boxed{unclosed, 7", "7"),
        ("it is 1,234.50 then", "1234.5"),
        ("12 and then -3", "-3"),
        ("no number\n at all \n", "at all"),
        (" \n", None),
        ("٣ is a digit to some", "3"),
        ("9" * 400, "9" * 400),
        ("1234567890123", "1234567890123"),
        ("1e5", "100000"),
        ("it is .50", "0.5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("-0.0", "0"),
        ("1e99999", "1E+99999"),
        ("1e99999999999999999999", "1e99999999999999999999"),
        ("none: \\boxed{ }", None),
    ],
)
def test_equal_answers_vote_alike(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_pattern_finds_the_answer() -> None:
    assert final_answer("#1 #22", r"#(\d+)") == "22"
    assert final_answer("#1 #22", r"#\d+") == "#22"
    assert final_answer("none", r"#(\d+)") is None


def test_the_figures_of_a_set() -> None:
    rewards = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    answers = [["7", "7", "8", "9"], ["1", "2", "3", "4"]]
    found = describe(rewards, answers, right_above=0.5)
    assert {name: round(one.value, 6) for name, one in found.items()} == {
        "avg@4": 0.25,
        "pass@1": 0.25,
        "pass@2": pytest.approx(5 / 12, abs=1e-6),
        "pass@4": 0.5,
        "majority@4": 0.5,
    }
    assert list(describe(rewards[:, :1], [["7"], ["1"]], right_above=0.5)) == ["avg@1", "pass@1"]
    shaped = describe(rewards - 0.25, right_above=0.5)  # a penalty on all: rewards below 0
    assert shaped["avg@4"].value == 0.0
    assert shaped["pass@4"].value == 0.5
    assert -0.25 <= shaped["avg@4"].low < 0 < shaped["avg@4"].high <= 1


def test_an_interval_of_single_answers_is_wilsons() -> None:
    """Its ends are the shares p at which the share seen lies 1.96 of p's own standard errors away."""
    found = estimate(np.array([1.0] * 36 + [0.0] * 4), k=1)
    for end in (found.low, found.high):
        assert abs(0.9 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 40), abs=1e-9)
    assert found.low < 0.9 < found.high
    assert wilson(1.0, 20) == (pytest.approx(20 / (20 + 1.959964**2)), 1.0)
    assert estimate(np.ones(20), k=8) == estimate(np.ones(20), k=1), "all right: as many draws as prompts"


@pytest.mark.parametrize(
    ("prompts", "k", "spread"), [(30, 1, 0.0), (40, 8, 0.7), (100, 4, 3.0), (30, 8, 9.0)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(prompts: int, k: int, spread: float) -> None:
    """Prompts of differing difficulty (beta), k answers each: 3000 evaluations of a policy."""
    rng = np.random.default_rng(prompts + k)
    a, b = 0.8 * (spread or 1), 0.2 * (spread or 1)
    chance = rng.beta(a, b, size=(3000, prompts, 1)) if spread else np.full((3000, prompts, 1), 0.8)
    values = (rng.random((3000, prompts, k)) < chance).mean(axis=2)
    covered = np.mean([found.low <= 0.8 <= found.high for found in (estimate(row, k) for row in values)])
    assert 0.93 <= covered <= 0.98, covered


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (-0.3, 1.7)])
def test_an_interval_holds_its_mean_whatever_the_rounding(bounds: tuple[float, float]) -> None:
    for prompts in range(1, 200):
        for value in bounds:
            found = estimate(np.full(prompts, value), 1, bounds)
            assert found.low <= found.value <= found.high
