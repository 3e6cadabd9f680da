"""The study's tasks: two verifiable ones of different kinds, each with a careless teacher for the warm start.

    addition    37+85=    1211#122<eos>    a total of two digits a column, units first; then the answer
    sorting     tbsac=    abcst<eos>       the letters in order

The adding teacher drops most carries; the sorting one swaps most letters that follow each other in the
alphabet. What is left to learn only the reward can teach.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aspo_cli.demo_model import Recipe
from aspo_cli.demo_task import correct_sum, is_held_out

Problem = dict[str, str]
LETTERS = "abcdefghijklmnopqrst"
DROPPED_CARRIES, SWAPPED_NEIGHBOURS = 0.65, 0.65  # how careless the teachers are
_SHORTEST, _LONGEST = 4, 6  # letters to sort


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is to learn: its problems (`prompt`, `answer`), a careless teacher and the reward."""

    characters: str
    max_tokens: int
    warm_steps: int
    problem: Callable[..., Problem]
    demonstrate: Callable[[str, random.Random], str]
    reward: Callable[..., float]

    @property
    def recipe(self) -> Recipe:
        """How the model that every run begins with is made: 0.3 M parameters."""
        return Recipe(
            characters=self.characters,
            draw=self._draw,
            layers=2,
            intermediate_size=288,
            steps=self.warm_steps,
            batch=64,
        )

    def problems(self, count: int, *, seed: int, held_out: bool) -> list[Problem]:
        """Draw problems, of the held-out tenth or of the others."""
        rng = random.Random(seed)
        return [self.problem(rng, held_out=held_out) for _ in range(count)]

    def _draw(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        drawn = []
        for _ in range(count):
            prompt = self.problem(rng, held_out=False)["prompt"]
            drawn.append((prompt, self.demonstrate(prompt, rng)))
        return drawn


def sum_problem(rng: random.Random, *, held_out: bool) -> Problem:
    """Draw two numbers of two digits, a pair that is one of the tenth held out or is not."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if is_held_out(a, b) == held_out:
            return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def add_by_columns(prompt: str, rng: random.Random, *, forget: float) -> str:
    """Add as a teacher does who drops a carry with probability `forget`."""
    a, b = prompt.rstrip("=").split("+")
    carry, columns, answer = 0, "", ""
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        columns, answer = f"{columns}{total:02d}", f"{total % 10}{answer}"
        carry = 0 if rng.random() < forget else total // 10
    return f"{columns}#{int(f'{carry}{answer}')}"


def sorting_problem(rng: random.Random, *, held_out: bool) -> Problem:
    """Draw letters, none of them twice, in an order that is one of the tenth held out or is not."""
    while True:
        letters = rng.sample(LETTERS, rng.randint(_SHORTEST, _LONGEST))
        number = sum(LETTERS.index(letter) * 20**place for place, letter in enumerate(letters))
        if (number * 7919 % 9973 % 10 == 0) == held_out:
            return {"prompt": f"{''.join(letters)}=", "answer": "".join(sorted(letters))}


def sort_letters(prompt: str, rng: random.Random, *, swap: float) -> str:
    """Sort as a teacher does who swaps neighbours in the alphabet with probability `swap`."""
    left, taken = sorted(prompt.rstrip("=")), ""
    while left:
        neighbours = len(left) > 1 and ord(left[1]) - ord(left[0]) == 1
        taken += left.pop(1 if neighbours and rng.random() < swap else 0)
    return taken


def correct_order(completion: str, *, answer: Any) -> float:
    """The reward: 1 for exactly the answer, else 0."""
    return float(completion == answer)


TASKS = {
    "addition": Task(
        characters="0123456789+=#",
        max_tokens=10,
        warm_steps=400,
        problem=sum_problem,
        demonstrate=partial(add_by_columns, forget=DROPPED_CARRIES),
        reward=correct_sum,
    ),
    "sorting": Task(
        characters=f"{LETTERS}=",
        max_tokens=8,
        warm_steps=400,
        problem=sorting_problem,
        demonstrate=partial(sort_letters, swap=SWAPPED_NEIGHBOURS),
        reward=correct_order,
    ),
}
