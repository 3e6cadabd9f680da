"""Built-in reward functions: `f(completion, **columns) -> float`, as any reward function named in the config.

`completion` is the decoded text without special tokens; `columns` are the data set's `data.reward_columns`.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def exact_match(completion: str, *, answer: Any, **columns: Any) -> float:
    """1 if the completion is the answer, but for white space around it, else 0."""
    return float(completion.strip() == str(answer).strip())


def numeric_match(completion: str, *, answer: Any, **columns: Any) -> float:
    """1 if the last number in the completion equals the answer as a number (to 1e-6, relative), else 0."""
    found = _NUMBER.findall(completion)
    if not found:
        return 0.0
    value, target = float(found[-1].replace(",", "")), float(str(answer).replace(",", ""))
    return float(abs(value - target) <= 1e-6 * max(1.0, abs(target)))
