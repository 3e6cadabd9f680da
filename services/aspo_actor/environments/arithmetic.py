"""Arithmetic that a model wrote, worked out without running it: whitelists of its syntax and its size."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 256
MAX_BITS = 4096  # of an integer: about 1200 digits
Number = int | float

_CHARACTERS = re.compile(r"[0-9eE.+\-*/%() \t]*")
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class ArithmeticFault(ValueError):
    """What is wrong with an expression, in a few words."""


def calculate(text: str) -> str:
    """The value of + - * / // % ** and brackets on numbers: an integer, or a float of 12 digits.

    Raises `ArithmeticFault` for anything else, and for what is too long or too large to be worked out.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise ArithmeticFault("the expression is too long")
    if _CHARACTERS.fullmatch(text) is None:
        raise ArithmeticFault("the expression is not arithmetic")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text, mode="eval")
        value = _value(tree.body)
    except ZeroDivisionError:
        raise ArithmeticFault("division by zero") from None
    except OverflowError:
        raise ArithmeticFault("the result is too large") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ArithmeticFault("the expression is not arithmetic") from None
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _bounded(_SIGNS[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            _require_small_power(left, right)
        return _bounded(_OPERATIONS[type(node.op)](left, right))
    raise ArithmeticFault("the expression is not arithmetic")


def _require_small_power(base: Number, exponent: Number) -> None:
    """Before it is worked out: the power of two integers may fill any memory."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise ArithmeticFault("the result is too large")


def _bounded(value: Any) -> Number:
    if isinstance(value, complex):
        raise ArithmeticFault("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ArithmeticFault("the result is too large")
    if isinstance(value, float) and abs(value) == float("inf"):
        raise ArithmeticFault("the result is too large")
    number: Number = value
    return number
