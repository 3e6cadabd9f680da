"""A calculator for the model: it writes an expression between marks, and the reply is the result.

    [environment]
    function = "aspo_actor.environments.calculator:Calculator"

    model          I work it out. <calculator>37 * 48</calculator>
    environment    1776
    model          It is 1776.

A turn without a call ends the conversation. What cannot be worked out is said, not raised.
"""

from __future__ import annotations

import re
from typing import Any

from aspo_actor.environments import Step
from aspo_actor.environments.arithmetic import ArithmeticFault, calculate


class Calculator:
    """Answers the last call of each turn; the state counts the calls.

    `pattern` is a regular expression whose first group is the expression; in `reply` and `error`, `{}` stands
    for the result and for what was wrong.
    """

    def __init__(
        self,
        pattern: str = r"<calculator>(.*?)</calculator>",
        reply: str = "{}",
        error: str = "error: {}",
    ) -> None:
        self._call, self._reply, self._error = re.compile(pattern, re.DOTALL), reply, error

    def reset(self, prompt: str, **columns: Any) -> dict[str, int]:
        """Before the first turn nothing was asked."""
        return {"calls": 0}

    def step(self, state: dict[str, int], completion: str) -> Step:
        """Work out what the turn asks for last."""
        calls = self._call.findall(completion)
        if not calls:
            return Step(state, done=True)
        try:
            reply = self._reply.replace("{}", calculate(calls[-1]))
        except ArithmeticFault as error:
            reply = self._error.replace("{}", str(error))
        return Step({"calls": state["calls"] + 1}, reply)
