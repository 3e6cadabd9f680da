"""Runs an environment in worker processes: a call that hangs or dies costs its conversation alone."""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from aspo.config import ConfigError, EnvironmentConfig
from aspo_actor.environments import Environment, Message, Step
from aspo_actor.imports import import_callable
from aspo_actor.workers import CallLost, Workers, describe

log = logging.getLogger(__name__)
MAX_STATE = 2**20  # bytes
MAX_REPLY = 2**18  # characters


@dataclass(frozen=True, slots=True)
class Opening:
    """What a conversation begins with: the prompt's text and the data set's columns."""

    prompt: str
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A `Step` on its way between processes, the state packed."""

    state: bytes
    reply: str | list[Message]
    done: bool


class EnvironmentHost(Workers):
    """Answers turns off the event loop, with a time limit; use as a context manager."""

    def __init__(self, config: EnvironmentConfig) -> None:
        assert config.function is not None, "the caller asks for an environment"
        _require_factory(config.function, config.options)
        self._config, self._function = config, config.function
        self.failures = 0
        super().__init__(config.concurrency, _load, (config.function, config.options, config.loading_s))

    async def check(self) -> None:
        """Wait for a worker that has loaded the environment; raises ConfigError if none can."""
        patience = 2 * self._config.loading_s
        try:
            async with asyncio.timeout(patience):
                fault: str | None = await self.call(
                    _loaded, self._function, self._config.options, timeout_s=patience
                )
        except (TimeoutError, CallLost):
            fault = f"it does not load within {self._config.loading_s:g} s"
        if fault is not None:
            raise ConfigError(
                f"environment.function {self._function!r}: {fault}; mend it, or raise environment.loading_s"
            )

    async def answer(self, opening: Opening, state: bytes | None, completion: str) -> Answer | None:
        """Answer one turn, the first from state None; None, counted, if the environment could not."""
        arguments = (self._function, self._config.options, opening, state, completion)
        result: Answer | str
        try:
            result = await self.call(answer, *arguments, timeout_s=self._config.timeout_s)
        except CallLost as error:
            result = str(error)
        if isinstance(result, Answer):
            return result
        self.blame(result)
        return None

    def blame(self, fault: str) -> None:
        """Count a conversation that the environment could not go on with."""
        log.warning("environment %s: %s; the conversation counts as failed", self._function, fault)
        self.failures += 1


def answer(
    function: str, options: dict[str, Any], opening: Opening, state: bytes | None, completion: str
) -> Answer | str:
    """In a worker: what the environment answers, or what is wrong with that; raises what it raises."""
    environment = _environment(function, msgspec.json.encode(options))
    known = unpack(state)
    if state is None:
        known = _now(environment.reset(**({"prompt": opening.prompt} | opening.columns)))
    return _checked(_now(environment.step(known, completion)))


def unpack(state: bytes | None) -> Any:
    """What an environment remembers, None before its first answer."""
    return None if state is None else msgspec.msgpack.decode(state)


def _load(function: str, options: dict[str, Any], seconds: float) -> None:
    """In a new worker, before the time limit of a call runs; what goes wrong, the calls will say."""

    def too_late(*signal_and_frame: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        _environment(function, msgspec.json.encode(options))
    except BaseException:  # a worker that fails to come up would be started for ever
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _loaded(function: str, options: dict[str, Any]) -> str | None:
    """In a worker: what is wrong with the environment, None if it is there."""
    try:
        _environment(function, msgspec.json.encode(options))
    except BaseException as error:
        return describe(error)
    return None


@lru_cache(maxsize=1)
def _environment(function: str, options: bytes) -> Environment:
    made: Environment = import_callable("environment.function", function)(**msgspec.json.decode(options))
    return made


def _now(result: Any) -> Any:
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _checked(step: Any) -> Answer | str:
    if not isinstance(step, Step):
        return f"its step gave a {type(step).__name__}, not a Step"
    try:
        state = msgspec.msgpack.encode(step.state)
    except (TypeError, OverflowError, RecursionError) as error:
        return f"its state is not plain data: {error}"
    if len(state) > MAX_STATE:
        return f"its state has {len(state)} bytes; at most {MAX_STATE} are kept"
    if not step.done and not step.reply:
        return "it neither replied nor ended the conversation"
    return _with_reply(state, step)


def _with_reply(state: bytes, step: Step) -> Answer | str:
    """The answer, its reply made plain: what else is in it may not survive the way to the actor."""
    said = str(step.reply) if isinstance(step.reply, str) else [dict(message) for message in step.reply]
    try:
        packed = msgspec.json.encode(said)
    except (TypeError, RecursionError) as error:
        return f"its reply is not plain data: {error}"
    if len(text_of(said)) > MAX_REPLY:
        return f"its reply has {len(text_of(said))} characters; at most {MAX_REPLY} are taken"
    if len(packed) > MAX_STATE:
        return f"its messages have {len(packed)} bytes; at most {MAX_STATE} are taken"
    return Answer(state, msgspec.json.decode(packed), bool(step.done))


def text_of(reply: str | Sequence[Message]) -> str:
    """What a reply says, whoever says it."""
    if isinstance(reply, str):
        return reply
    return "\n".join(str(message.get("content", "")) for message in reply)


def _require_factory(function: str, options: dict[str, Any]) -> None:
    """Raise ConfigError for a factory that is not there or does not take the options."""
    factory = import_callable("environment.function", function)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(
            f"environment.function {function!r} does not take environment.options: {error}; mend them"
        ) from None
