"""Numbers as models write them: `last_number("so it is 1,234.50")` is Decimal("1234.50")."""

from __future__ import annotations

import re
from decimal import Context, Decimal, InvalidOperation

_LONG = 1000  # digits
_MINUS = "\N{MINUS SIGN}"
# A dot begins a number only where it does not go on another, nor an ellipsis.
_NUMBER = re.compile(rf"[-+{_MINUS}]?(?:\d[\d,]*(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d+)?")


def plain(number: str) -> str:
    """A number's text as Python reads it: no commas between its digits, and a minus of ASCII."""
    return number.replace(",", "").replace(_MINUS, "-")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, to its last digit; None without one, or with an exponent beyond reason."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(plain(found[-1])) if found else None
    except InvalidOperation:
        return None


def spelling(number: Decimal) -> str:
    """One spelling for equal numbers."""
    short = number.normalize(Context(prec=len(number.as_tuple().digits))) if number else Decimal(0)
    return f"{short:f}" if abs(short.adjusted()) < _LONG else str(short)
