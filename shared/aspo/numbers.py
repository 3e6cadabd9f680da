"""Numbers as models write them: `last_number("so it is 1,234.50")` is Decimal("1234.50")."""

from __future__ import annotations

import re
from decimal import Context, Decimal, InvalidOperation

_LONG = 1000  # digits
_MINUS = "\N{MINUS SIGN}"
# A dot begins a number only where it does not go on another, nor an ellipsis.
_NUMBER = re.compile(rf"[-+{_MINUS}]?(?:\d[\d,]*(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, to its last digit; None without one, or with an exponent beyond reason."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace(_MINUS, "-")) if found else None
    except InvalidOperation:
        return None


def spelling(number: Decimal) -> str:
    """One spelling for equal numbers."""
    plain = number.normalize(Context(prec=len(number.as_tuple().digits))) if number else Decimal(0)
    return f"{plain:f}" if abs(plain.adjusted()) < _LONG else str(plain)
