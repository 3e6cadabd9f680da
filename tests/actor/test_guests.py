"""What guests may ask for, before any engine is asked."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from aspo_actor.openai_routes import CompletionAsked


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [""]},
        {"prompt": "a", "stop": [str(number) for number in range(17)]},  # looked for after every token
    ],
)
def test_what_could_not_be_answered_or_holds_up_the_engines_loop_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionAsked.model_validate({"model": "m"} | fields)


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", 1), ([1, 2], 1), (["a", "b"], 2), ([[1], [2, 3], [4]], 3)]
)
def test_prompts_are_counted_whatever_their_form(prompt: Any, prompts: int) -> None:
    assert CompletionAsked.model_validate({"model": "m", "prompt": prompt, "n": 2}).samples == 2 * prompts
