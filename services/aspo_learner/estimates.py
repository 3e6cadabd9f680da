"""What k answers to each prompt of a set say of a policy: avg@k, pass@k, majority@k, with 95 % intervals.

    found = describe(rewards, answers, right_above=0.5)     # rewards [P, k], answers P lists of k texts
    found["pass@4"].value, found["pass@4"].low, found["pass@4"].high

Every figure is a mean over prompts, and prompts are what was drawn: answers to one prompt resemble each
other. So an interval counts prompts, not answers. It is Wilson's, for as many independent draws as would
give the variance seen between prompts (Dean & Pagano 2015, as for cluster samples); with k = 1 that is
Wilson's own. Unlike the normal interval and the bootstrap over prompts it stays within the range of the
rewards, and does not shrink to a point where all prompts are right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aspo.numbers import last_number, spelling

Z95 = 1.959964  # of the normal distribution, two-sided
_BOXED = "\\boxed{"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def describe(
    rewards: NDArray[np.floating],
    answers: Sequence[Sequence[str | None]] | None = None,
    *,
    right_above: float,
) -> dict[str, Estimate]:
    """All figures of a set by name; `rewards` [P, k], majority@k only with the `answers` that vote."""
    rewards = np.asarray(rewards, dtype=np.float64)
    right, k = rewards > right_above, rewards.shape[1]
    bounds = min(0.0, float(rewards.min())), max(1.0, float(rewards.max()))
    found = {f"avg@{k}": estimate(rewards.mean(axis=1), k, bounds)}
    for drawn in _powers_of_two(k):
        found[f"pass@{drawn}"] = estimate(pass_at_k(right, drawn), k)
    if answers is not None and k > 1:
        votes = [majority(own, given) for own, given in zip(right, answers, strict=True)]
        found[f"majority@{k}"] = estimate(np.array(votes), k)
    return found


def pass_at_k(right: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """Chance [P] that k of a prompt's n answers, drawn without replacement, hold a right one; `right` [P, n].

    1 - C(n - c, k) / C(n, k) for c right ones, which is unbiased (Chen et al. 2021, eq. 1).
    """
    number = np.arange(1, right.shape[1] + 1)
    wrong = right.shape[1] - right.sum(axis=1, keepdims=True)
    factors = np.where(number > wrong, np.maximum(1 - k / number, 0.0), 1.0)
    chances: NDArray[np.float64] = 1 - factors.prod(axis=1)
    return chances


def majority(right: Sequence[bool] | NDArray[np.bool_], answers: Sequence[str | None]) -> float:
    """Chance that the answer given most often is right; ties are drawn, and None does not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return float(np.mean(right))
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    given = list(zip(answers, right, strict=True))
    return float(np.mean([np.mean([ok for text, ok in given if text == winner]) for winner in winners]))


def final_answer(text: str, pattern: str | None = None) -> str | None:
    r"""What a completion answers, for the vote: equal answers give equal strings; None without an answer.

    The last match of `pattern` (its first group); or without one the last `\boxed{}`, else the last number,
    else the last line.
    """
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        found = matches[-1][1 if matches[-1].re.groups else 0] if matches else None
        return found.strip() if found else None
    boxed = _last_boxed(text)
    if boxed is not None:
        return "".join(boxed.split()) or None
    number = last_number(text)
    if number is not None:
        return spelling(number)
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def estimate(values: NDArray[np.float64], k: int, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """The mean of values [P] within `bounds`, each from k answers, and its interval."""
    low, high = bounds
    mean = float(values.mean())
    share = min(1.0, max(0.0, (mean - low) / (high - low)))
    spread, error = share * (1 - share), float(values.var()) / (high - low) ** 2 / len(values)
    # No more than there were answers; where all prompts are alike, as many as prompts.
    draws = min(spread / error, len(values) * k) if spread and error else len(values)
    below, above = wilson(share, draws)
    # The interval holds the mean, but for rounding: where all is right it would end just below 1.
    return Estimate(mean, min(mean, low + below * (high - low)), max(mean, low + above * (high - low)))


def wilson(share: float, draws: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many independent draws."""
    width = Z95**2 / draws
    centre = (share + width / 2) / (1 + width)
    half = np.sqrt(share * (1 - share) * width + width**2 / 4) / (1 + width)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _powers_of_two(k: int) -> list[int]:
    """1, 2, 4 and so on up to k, and k itself."""
    return sorted({2**i for i in range(k.bit_length())} | {k})


def _last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, its braces balanced."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None
