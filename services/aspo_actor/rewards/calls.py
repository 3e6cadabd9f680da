"""How a reward function is found and called: for each completion, or TRL's way for a whole group.

A worker process of the `scorer` runs `score_all`; the actor itself only looks whether a function will do.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import importlib
import inspect
import itertools
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aspo.codec import MAX_REWARD
from aspo.config import CodeConfig, ConfigError, RewardPart
from aspo_actor.completion import Completion
from aspo_actor.imports import import_callable
from aspo_actor.rewards.sandbox import Sandbox, adopt_orphans, reap_orphans
from aspo_actor.workers import describe

RewardFunction = Callable[..., Any]
# To a function that names them.
_GIVEN = {"prompt", "completion_tokens", "max_tokens", "sandbox", "turns", "environment_state"}
_GIVEN_TO_TRL = {"completion_ids"}


@dataclass(frozen=True, slots=True)
class Answers:
    """One prompt's completions, as reward functions see them; texts without special tokens.

    Where there is an environment, a completion is the model's last turn, `turns` all that was said, the model
    first and last, `states` what the environment remembers and `lost` whether it failed; `token_ids` are the
    model's in any case.
    """

    prompt: str
    completions: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    max_tokens: int
    columns: dict[str, Any]
    turns: Sequence[Sequence[str]] = ()
    states: Sequence[Any] = ()
    lost: Sequence[bool] = ()

    @classmethod
    def of(
        cls, prompt: str, completions: Sequence[Completion], max_tokens: int, columns: dict[str, Any]
    ) -> Answers:
        """What an engine gave for a prompt."""
        return cls(
            prompt,
            [c.text for c in completions],
            [c.model_tokens.tolist() for c in completions],
            max_tokens,
            columns,
            turns=[c.turns or (c.text,) for c in completions],
            states=[c.state for c in completions],
            lost=[c.failed for c in completions],
        )

    def only(self, number: int) -> Answers:
        """The same prompt with one of the completions."""
        one = slice(number, number + 1)
        names = ("completions", "token_ids", "turns", "states", "lost")
        return dataclasses.replace(self, **{name: getattr(self, name)[one] for name in names})

    @property
    def conversations(self) -> Sequence[Sequence[str]]:
        """All that was said in each, which is the completion where there is no environment."""
        return self.turns or [(text,) for text in self.completions]


def load_reward_function(part: RewardPart, columns: Sequence[str]) -> RewardFunction:
    """Import `module:function`; raises ConfigError if it is not there or cannot take the columns."""
    path = part.function
    function = import_callable("reward.function", path)
    unfit = (inspect.isclass, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(is_kind(function) for is_kind in unfit):
        raise ConfigError(f"reward.function {path!r} is not a plain function")
    if hidden := sorted(set(columns) & set(part.options)):
        raise ConfigError(f"reward.options of {path!r}: {hidden[0]!r} is a column too; rename one")
    _require_signature(function, part, columns)
    return function


def wants_sandbox(part: RewardPart) -> bool:
    """Whether the function asks for a sandbox; such a one gets a call for each completion."""
    return "sandbox" in _named(_find(part))


def score_all(part: RewardPart, answers: Answers, code: CodeConfig) -> list[float | str]:
    """In a worker: a number or what went wrong, per completion; raises what goes wrong with a group."""
    function = _find(part)
    if part.style != "plain":
        return _score_group(function, part, answers)
    if "sandbox" in _named(function):
        adopt_orphans()
    calls = list(_calls(function, part, answers, Sandbox(code)))
    if inspect.iscoroutinefunction(function):
        return asyncio.run(_await_all(function, calls))
    values = [_score_one(function, *call) for call in calls]
    if "sandbox" in _named(function):
        reap_orphans()
    return values


def _require_signature(function: RewardFunction, part: RewardPart, columns: Sequence[str]) -> None:
    leading = ("completion",) if part.style == "plain" else ("prompts", "completions")
    given = _GIVEN if part.style == "plain" else _GIVEN_TO_TRL
    names = {*columns, *part.options, *(_named(function) & given)}
    try:
        if part.style == "plain":
            inspect.signature(function).bind("completion", **dict.fromkeys(names))
        else:
            inspect.signature(function).bind(**dict.fromkeys((*names, *leading)))
    except (TypeError, ValueError) as error:
        taken = ", ".join((*leading, *columns, *part.options))
        raise ConfigError(
            f"reward.function {part.function!r} does not take ({taken}): {error}; set data.reward_columns or "
            "its options"
        ) from None


def _calls(
    function: RewardFunction, part: RewardPart, answers: Answers, sandbox: Sandbox
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each completion with the arguments that go with it."""
    arguments = answers.columns | part.options
    wanted = (_named(function) & _GIVEN) - arguments.keys()
    states = answers.states or [None] * len(answers.completions)
    samples = zip(answers.completions, answers.token_ids, answers.conversations, states, strict=True)
    for completion, token_ids, turns, state in samples:
        given = {
            "prompt": answers.prompt,
            "completion_tokens": len(token_ids),
            "max_tokens": answers.max_tokens,
            "sandbox": sandbox,
            "turns": turns,
            "environment_state": state,
        }
        # Its own copy: a function that changes a list changes it for itself.
        yield completion, copy.deepcopy(arguments) | {name: given[name] for name in wanted}


def _score_one(function: RewardFunction, completion: str, arguments: dict[str, Any]) -> float | str:
    try:
        return _checked(function(completion, **arguments))
    # A user's function may raise anything, SystemExit too; the sample fails, the run goes on.
    except BaseException as error:
        return describe(error)


async def _await_all(
    function: RewardFunction, calls: Sequence[tuple[str, dict[str, Any]]]
) -> list[float | str]:
    async def score(completion: str, arguments: dict[str, Any]) -> float | str:
        try:
            return _checked(await function(completion, **arguments))
        except BaseException as error:
            return describe(error)

    return list(await asyncio.gather(*(score(*call) for call in calls)))


def _score_group(function: RewardFunction, part: RewardPart, answers: Answers) -> list[float | str]:
    """Call f(prompts, completions, **columns), every argument a list with an entry per completion."""
    size = len(answers.completions)
    prompt: Any = answers.prompt
    completions: list[Any] = list(answers.completions)
    if part.style == "trl-chat":
        prompt = [{"role": "user", "content": prompt}]
        completions = [_messages(turns) for turns in answers.conversations]
    columns: dict[str, Any] = {name: [value] * size for name, value in answers.columns.items()}
    arguments = columns | part.options | {"prompts": [prompt] * size, "completions": completions}
    if "completion_ids" in _named(function):
        arguments["completion_ids"] = [list(ids) for ids in answers.token_ids]
    result = function(**arguments)
    values = list(asyncio.run(result) if inspect.iscoroutine(result) else result)
    if len(values) != size:
        return [f"it gave {len(values)} rewards for {size} completions"] * size
    # In TRL, None says that the function does not apply to the sample.
    return [0.0 if value is None else _checked(value) for value in values]


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    roles = itertools.cycle(("assistant", "user"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def _checked(value: Any) -> float | str:
    """A reward, or what is wrong with it; what is no number may raise anything when it is asked for one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"it gave {reprlib.repr(value)}, not a number"
    except BaseException as error:
        return describe(error)
    return number if abs(number) <= MAX_REWARD else f"it gave {number}, not a number within {MAX_REWARD:g}"


def _find(part: RewardPart) -> RewardFunction:
    module_name, _, name = part.function.partition(":")
    found: RewardFunction = getattr(importlib.import_module(module_name), name)
    return found


def _named(function: RewardFunction) -> set[str]:
    """The arguments that a function names, other than by `**`."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind not in kinds}
