"""Environments that fail in every way, in a module that a worker process imports quickly."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from aspo_actor.environments import Step


class Unreadable:
    """What can be pickled, and not be read again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


class Difficult:
    """Does what the model says."""

    def reset(self, prompt: str, *, answer: str) -> dict[str, str]:
        return {"answer": answer}

    async def step(self, state: Any, completion: str) -> Any:
        if completion == "raise":
            raise RuntimeError("no idea")
        if completion == "hang":
            time.sleep(60)  # noqa: ASYNC251 - it is to block
        if completion == "exit":
            sys.exit(0)
        if completion == "cancel":
            raise asyncio.CancelledError
        if completion == "die":
            os._exit(7)
        replies: dict[str, Any] = {
            "none": None,
            "silent": Step(state),
            "object": Step(object(), "a"),
            "large": Step(bytes(2**21), "a"),
            "long": Step(state, "a" * 2**19),
            "foreign": Step(state, [{"role": "user", "content": "a", "by": Unreadable()}]),
            "huge": Step(state, [{"role": "user", "content": "a", "name": "a" * 2**21}]),
            "messages": Step(state, [{"role": "user", "content": "a"}]),
        }
        return replies.get(completion, Step(state | {"score": 0.5}, done=True))


class Unloadable:
    """What a worker cannot make, though it looks well."""

    def __init__(self, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        raise RuntimeError("no data")
