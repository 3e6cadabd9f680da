"""A reward of one's own: the share of the sum's digits that are right."""

from __future__ import annotations

from typing import Any


def digits(completion: str, *, answer: int, **columns: Any) -> float:
    """Compare what follows `#` with the sum, from the right; 0 without it, or with too many digits."""
    _, marked, found = completion.rpartition("#")
    wanted = str(answer)
    if not marked or len(found) > len(wanted):
        return 0.0
    right = (a == b for a, b in zip(reversed(found), reversed(wanted), strict=False))
    return len([hit for hit in right if hit]) / len(wanted)
