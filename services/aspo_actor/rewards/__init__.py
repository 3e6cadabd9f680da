"""Built-in reward functions: `f(completion, **columns) -> float`, as any reward function named in the config.

`completion` is the decoded text without special tokens; the columns are the data set's
`data.reward_columns`, and further arguments the `options` of the config. A function that names one of these
is given it as well: `prompt` (text), `completion_tokens` (how many), `max_tokens`, `sandbox` (see `sandbox`);
`turns` (texts, the model's first and last) and `environment_state`, where there is an environment.
What cannot be scored raises: the sample counts as failed.
"""

from __future__ import annotations

import ast
import json
import math
import re
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from aspo.numbers import last_number, plain
from aspo_actor.rewards.sandbox import Sandbox

_FENCE = re.compile(r"[ \t]*```+[ \t]*([^\s`{]*)")
_PYTHON = ("python", "py", "python3")


def exact_match(completion: str, *, answer: Any, **columns: Any) -> float:
    """1 if the completion is the answer, but for white space around it, else 0."""
    return float(completion.strip() == _text(answer))


def numeric_match(completion: str, *, answer: Any, **columns: Any) -> float:
    """1 if the last number in the completion equals the answer as a number (to 1e-6, relative), else 0.

    Raises ValueError for an answer that is no finite number.
    """
    target = float(plain(str(answer)))
    if not math.isfinite(target):
        raise ValueError(f"the answer {str(answer)[:80]!r} is no finite number")
    found = last_number(completion)
    return float(found is not None and abs(float(found) - target) <= 1e-6 * max(1.0, abs(target)))


def regex_match(completion: str, *, answer: Any, pattern: str, **columns: Any) -> float:
    """1 if the last match of `pattern` in the completion (its first group, if it has one) is the answer."""
    matches = list(re.finditer(pattern, completion))
    if not matches:
        return 0.0
    last = matches[-1]
    found = last[1] if last.re.groups else last[0]
    return float(found is not None and found.strip() == _text(answer))


def format_match(completion: str, *, pattern: str, **columns: Any) -> float:
    """1 if the whole completion, stripped, fits `pattern`, whose `.` is any character, else 0."""
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


def math_match(completion: str, *, answer: Any, seconds: int = 3, **columns: Any) -> float:
    r"""1 if the answer that the completion gives equals the right one as mathematics, else 0.

    By math-verify: what is in `\boxed{}` counts (two such are two answers, and wrong) or, without it, the
    last formula or number. What takes longer than `seconds` to read or to compare is not equal. Raises
    ValueError for a right answer that is no mathematics.
    """
    from math_verify import parse, verify

    text = _text(answer)
    gold = parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=seconds)
    if not gold:
        raise ValueError(f"the answer {text[:80]!r} is no mathematics; use exact_match for it")
    found = parse(completion, parsing_timeout=seconds)
    return float(bool(found) and verify(gold, found, timeout_seconds=seconds))


def overlong_penalty(
    completion: str, *, completion_tokens: int, max_tokens: int, buffer: int, **columns: Any
) -> float:
    """DAPO's soft punishment: 0 up to `max_tokens - buffer` tokens, then linearly down to -1 at `max_tokens`.

    Raises ValueError unless 0 < buffer <= max_tokens. Source: arXiv 2503.14476.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer is {buffer}: make it at least 1 and at most max_tokens ({max_tokens})")
    return min(-(completion_tokens - (max_tokens - buffer)) / buffer, 0.0)


def environment_score(
    completion: str, *, environment_state: Any, key: str = "score", **columns: Any
) -> float:
    """What the environment's state says under `key`; 0 if it was never asked. Raises KeyError without one."""
    return 0.0 if environment_state is None else float(environment_state[key])


def code_tests(
    completion: str,
    *,
    tests: str | Sequence[Mapping[str, str]],
    sandbox: Sandbox,
    partial: bool = False,
    **columns: Any,
) -> float:
    """1 if the completion's last Python block passes the tests, run in the sandbox, else 0.

    The block is the last that says it is Python, or without one the last that says nothing. `tests` is a list
    of {"input", "output"}, or such a list as JSON: what the program reads from standard input and must write
    to standard output, but for white space at the ends of lines; or Python source that follows the program
    and raises if it is wrong. `partial` gives the share of passed inputs. Raises ValueError for tests that
    are neither, or empty. Outputs are compared here, out of the program's reach; Python tests run beside it,
    where a program made for the purpose can cheat them.
    """
    program, cases = _program(completion), _cases(tests)
    if isinstance(cases, str):
        return float(_survives(program, cases, sandbox))
    passed = 0
    for test in cases:
        result = sandbox.run(program, test["input"])
        right = result.fault is None and _lines(result.output) == _lines(test["output"])
        if not right and not partial:
            return 0.0
        passed += right
    return passed / len(cases)


def _text(answer: Any) -> str:
    if answer is None:
        raise ValueError("the answer is missing; remove the row")
    return str(answer).strip()


def _program(completion: str) -> str:
    """The block of code in an answer, or the whole of one that has no blocks."""
    blocks: list[tuple[str, list[str]]] = []
    within = False
    for line in completion.replace("\r\n", "\n").split("\n"):
        fence = _FENCE.match(line)
        if fence and not within:
            blocks.append((fence[1].lower(), []))
            within = True
        elif fence and not fence[1]:
            within = False
        elif within:
            blocks[-1][1].append(line)
    python = [lines for label, lines in blocks if label in _PYTHON]
    python = python or [lines for label, lines in blocks if not label]
    return textwrap.dedent("\n".join(python[-1])) if python else completion


def _cases(tests: str | Sequence[Mapping[str, str]]) -> str | Sequence[Mapping[str, str]]:
    """Tests as Python source or as pairs of input and output, which tables often keep as JSON."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            if not ast.parse(str(tests)).body:
                raise ValueError("the tests hold no statement; remove the row") from None
            return tests
    if not tests:
        raise ValueError("the tests are empty; remove the row")
    if not isinstance(tests, list | tuple) or not all({"input", "output"} <= set(one) for one in tests):
        raise ValueError('the tests are neither Python nor a list of {"input": ..., "output": ...}')
    return tests


def _survives(program: str, tests: str, sandbox: Sandbox) -> bool:
    """Whether the tests are run to their end, which a program that exits early does not reach."""
    mark = f"passed {secrets.token_hex(16)}"
    result = sandbox.run(f"{program}\n\n{tests}\n\nprint('\\n{mark}')\n")
    return result.fault is None and _lines(result.output)[-1:] == [mark]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]
