"""Rewards of the reference runs: 1 or 0, for what follows the thought; of sets in verl's format.

A row's `reward_model` holds `ground_truth`: for maths an answer or several, for code the JSON of either
Python tests (`functional`) or `inputs` and `outputs`.
"""

from __future__ import annotations

import json
from typing import Any

from aspo_actor.rewards import code_tests, math_match
from aspo_actor.rewards.sandbox import Sandbox


def after_thought(completion: str) -> str:
    """What stands after the end of the thought; all of it where none ends."""
    _, ended, answer = completion.partition("</think>")
    return answer if ended else completion


def maths(completion: str, *, reward_model: dict[str, Any], **columns: Any) -> float:
    """1 if the answer equals one of the right ones as mathematics."""
    right = reward_model["ground_truth"]
    answers = right if isinstance(right, list) else [right]
    return max(math_match(after_thought(completion), answer=answer) for answer in answers)


def code(completion: str, *, reward_model: dict[str, Any], sandbox: Sandbox, **columns: Any) -> float:
    """1 if the program passes all tests."""
    right = json.loads(reward_model["ground_truth"])
    pairs = zip(right.get("inputs", ()), right.get("outputs", ()), strict=True)
    tests = right.get("functional") or [{"input": given, "output": wanted} for given, wanted in pairs]
    return code_tests(after_thought(completion), tests=tests, sandbox=sandbox)
