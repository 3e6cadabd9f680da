from typing import Any, get_args

import numpy as np
import pytest

from aspo.codec import (
    Poison,
    decode_group,
    encode_group,
    validate_group,
)
from aspo.schemas import PolicyVersion, RolloutGroup, VersionSpan
from frames import NEW, OLD, make_group


def verdict(group: RolloutGroup, **limits: Any) -> str | None:
    current = PolicyVersion(run="demo", epoch=1, step=42)
    defaults = {"vocab_size": 10, "max_tokens": 3, "max_prompt_tokens": 3, "current": current}
    return validate_group(decode_group(encode_group(group)), **(defaults | limits))


def logprobs(value: float) -> Any:
    return np.array([-0.5, -1.0, 0.0, value], np.float32)


def versioned(version: str) -> Any:
    return (VersionSpan(OLD, 2), VersionSpan(NEW, 1)), (VersionSpan(version, 1),)


POISONS: list[tuple[str, dict[str, Any]]] = [
    ("empty-prompt", {"prompt_ids": np.array([], np.int32)}),
    ("empty-completion", {"lengths": np.array([4, 0], np.int32), "spans": ((VersionSpan(NEW, 4),), ())}),
    ("too-long", {"lengths": np.array([4], np.int32)}),
    ("too-long", {"turns": ((1, 1, 1), (1,))}),
    ("too-long", {"prompt_ids": np.array([5, 6, 7, 8], np.int32)}),
    ("token-out-of-range", {"token_ids": np.array([1, 2, 3, 10], np.int32)}),
    ("token-out-of-range", {"token_ids": np.array([1, 2, 3, -1], np.int32)}),
    ("token-out-of-range", {"prompt_ids": np.array([5, 6, 10], np.int32)}),
    ("token-out-of-range", {"prompt_ids": np.array([5, 6, -1], np.int32)}),
    ("nan-logprob", {"behavior_logprobs": logprobs(np.nan)}),
    ("nan-logprob", {"behavior_logprobs": logprobs(np.inf)}),
    ("nan-logprob", {"behavior_logprobs": logprobs(-np.inf)}),
    ("positive-logprob", {"behavior_logprobs": logprobs(2e-4)}),
    ("bad-reward", {"rewards": np.array([np.nan, 0], np.float32)}),
    ("bad-reward", {"rewards": np.array([0, -np.inf], np.float32)}),
    ("bad-reward", {"reward_parts": {"format": np.array([0, np.nan], np.float32)}}),
    ("bad-temperature", {"temperature": 0.0}),
    ("bad-temperature", {"temperature": 1e-30}),
    ("foreign-run", {"spans": versioned("other/1/42")}),
    ("foreign-run", {"spans": versioned("other/9/9")}),
    ("future-version", {"spans": versioned("demo/1/43")}),
    ("future-version", {"spans": versioned("demo/2/0")}),
]


@pytest.mark.parametrize(("reason", "changes"), POISONS)
def test_poison_has_a_reason(reason: str, changes: dict[str, Any]) -> None:
    if "lengths" in changes and len(changes["lengths"]) == 1:
        changes = changes | {
            "rewards": np.zeros(1, np.float32),
            "failed": np.zeros(1, np.bool_),
            "finish_reasons": ("stop",),
            "spans": ((VersionSpan(NEW, 4),),),
        }
    assert verdict(make_group(**changes)) == reason


def test_every_reason_is_tested() -> None:
    assert {reason for reason, _ in POISONS} == set(get_args(Poison))


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, {}),
        ({"token_ids": np.array([0, 2, 3, 9], np.int32)}, {}),
        ({"behavior_logprobs": logprobs(9e-5)}, {}),
        ({"behavior_logprobs": logprobs(-80.0)}, {}),
        ({"prompt_ids": np.arange(9, dtype=np.int32)}, {"max_prompt_tokens": None}),
        ({"turns": ((1, 1, 1), (1,))}, {"max_tokens": 2, "max_environment_tokens": 1}),
        ({"spans": versioned("demo/0/99")}, {}),
        ({"spans": versioned("other/9/9")}, {"current": None}),
        ({"temperature": 0.0, "purpose": "eval"}, {}),
        ({"temperature": 0.01}, {}),
    ],
)
def test_a_sound_group_has_none(changes: dict[str, Any], limits: dict[str, Any]) -> None:
    assert verdict(make_group(**changes), **limits) is None
