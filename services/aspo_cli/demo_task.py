"""The demo's task: add two numbers of 2 or 3 digits, column by column.

    prompt      37+485=
    completion  7+5+0=12,3+8+1=12,0+4+1=05,#522<eos>

One entry per column, units first: digit + digit + carry = two-digit sum, whose tens digit is the next carry;
then `#` and the answer. A fixed tenth of all operand pairs is held out.
"""

from __future__ import annotations

import random
import re
from typing import Any

CHARACTERS = "0123456789+=,#"
PAD, EOS = "<pad>", "<eos>"
MIN_DIGITS, MAX_DIGITS = 2, 3
MAX_COMPLETION_TOKENS = 48


def make_problem(rng: random.Random, *, held_out: bool) -> dict[str, str]:
    """Draw one problem: its `prompt` and `answer`."""
    while True:
        a, b = (_number(rng, rng.randint(MIN_DIGITS, MAX_DIGITS)) for _ in range(2))
        if is_held_out(a, b) == held_out:
            return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def is_held_out(a: int, b: int) -> bool:
    """Whether a pair of operands belongs to the tenth that is never trained on."""
    return (a * 1000003 + b * 7919 + 12345) % 9973 % 10 == 0


def demonstrate(prompt: str, rng: random.Random, *, forget: float) -> str:
    """Work a problem as a careless teacher does, who drops a carry with probability `forget`."""
    a, b = prompt.rstrip("=").split("+")
    width = max(len(a), len(b))
    carry, columns, answer = 0, "", ""
    for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
        total = int(x) + int(y) + carry
        columns += f"{x}+{y}+{carry}={total:02d},"
        carry, answer = total // 10, str(total % 10) + answer
        if carry and rng.random() < forget:
            carry = 0
    return f"{columns}#{int(str(carry) + answer)}"


def correct_sum(completion: str, *, answer: Any) -> float:
    """The reward: 1 if what follows the only `#` is exactly the answer, else 0."""
    final = re.fullmatch(r"[^#]*#(\d+)", completion)
    return float(final is not None and final[1] == str(answer))


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)
