"""What an environment is: it answers the model between its turns, for as many turns as it takes.

    class Guess:
        def reset(self, prompt, *, number):             # the columns of data.reward_columns
            return {"number": number, "tries": 0}

        def step(self, state, completion):              # what the model said, special tokens left out
            state["tries"] += 1
            if completion.strip() == str(state["number"]):
                return Step(state, done=True)
            return Step(state, "No. Try again.")

    [environment]
    function = "my_module:Guess"                        # called with `environment.options`, once a process

`step` may be async. It runs in worker processes with a time limit, any of which may take the next turn: all
that is to be remembered is in the state, which is plain data (what JSON holds, bytes too). A call that
raises, hangs or makes no sense ends its conversation, which counts as failed, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]  # of a chat: role and content


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment makes of a turn: its state, and either a reply or the end of the conversation.

    A reply is a text, said as `environment.role`, or chat messages.
    """

    state: Any
    reply: str | Sequence[Message] = ""
    done: bool = False


class Environment(Protocol):
    """One kind of conversation; instances hold nothing that belongs to a single one."""

    def reset(self, prompt: str, **columns: Any) -> Any:
        """The state before the model's first turn; a column of the name stands in for the prompt's text."""
        ...

    def step(self, state: Any, completion: str) -> Step:
        """Answer what the model said."""
        ...
