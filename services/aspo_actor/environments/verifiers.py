"""Environments of the package `verifiers`, release 0.1.10 (see docs/environments.md for what is not reached).

    python -m aspo_actor.environments.verifiers my-env prompts.jsonl       # its prompts, for [data]

    [data]
    path = "prompts.jsonl"
    reward_columns = ["prompt", "answer", "info", "task", "example_id"]
    [environment]                                          # not for single turns
    function = "aspo_actor.environments.verifiers:Conversation"
    options = { env_id = "my-env" }
    [reward]
    function = "aspo_actor.environments.verifiers:rubric"
    options = { env_id = "my-env" }

No OpenAI client is involved: the actor samples token by token as ever, and the environment sees the turns as
chat messages. Its state is carried from call to call as plain data, the client left out. Tool calls are what
the model wrote between `<tool_call>` and `</tool_call>`, as Qwen and Hermes do.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from aspo_actor.environments import Message, Step

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_NOT_KEPT = ("client", "model", "sampling_args", "usage", "usage_tracker", "oai_tools")
_COLUMNS = ("prompt", "answer", "info", "task", "example_id")
KNOWN = "0.1.10"  # later ones have other states and messages


class Conversation:
    """A multi-turn environment of `verifiers` in ours: `env_response` replies, its stop conditions end."""

    def __init__(self, env_id: str, env_args: Mapping[str, Any] | None = None) -> None:
        self._environment = load(env_id, json.dumps(env_args or {}))

    def reset(self, prompt: list[Message], **columns: Any) -> dict[str, Any]:
        """The row of the environment's data set, whose messages take the place of the prompt's text."""
        return {"input": _input(columns | {"prompt": prompt}), "rollout": None, "prompt": None}

    async def step(self, state: dict[str, Any], completion: str) -> Step:
        """Add a turn of the model, and ask the environment whether that is all, and what it says."""
        rollout = await _restore(self._environment, state)
        prompt = await _add_turn(self._environment, rollout, state["prompt"], completion)
        done = await self._environment.is_completed(rollout)
        following: list[Message] = []
        if not done:
            following = await self._environment.get_prompt_messages(rollout)
            done = await self._environment.is_completed(rollout)
        said = len(prompt) + 1
        return Step(_keep(rollout, following), [] if done else following[said:], done=done)


async def rubric(
    completion: str,
    *,
    env_id: str,
    turns: Sequence[str],
    environment_state: Any,
    env_args: Mapping[str, Any] | None = None,
    **columns: Any,
) -> float:
    """What the environment's rubric gives a conversation, or a single answer; weighted as it says.

    Raises AssertionError for a rubric that compares the answers of a group.
    """
    environment = load(env_id, json.dumps(env_args or {}))
    state = environment_state or {"input": _input(columns), "rollout": None, "prompt": None}
    rollout = await _restore(environment, state)
    if len(rollout["trajectory"]) < (len(turns) + 1) // 2:  # the last was cut, or the only one
        await _add_turn(environment, rollout, state["prompt"], turns[-1])
    await environment.render_completion(rollout)
    await environment.rubric.score_rollout(rollout)
    return float(rollout["reward"])


@lru_cache(maxsize=4)
def load(env_id: str, env_args: str) -> Any:
    """Load an environment; ValueError for another release or one that does not chat, else what it raises."""
    if (installed := _installed()) != KNOWN:
        raise ValueError(
            f"this needs verifiers {KNOWN}, and {installed or 'none'} is installed; "
            "pip install -c constraints.txt -e '.[verifiers]'"
        )
    import verifiers

    environment = verifiers.load_environment(env_id, **json.loads(env_args))
    if not isinstance(environment, verifiers.MultiTurnEnv) or environment.message_type != "chat":
        raise ValueError(
            f"{env_id} is no MultiTurnEnv on chat messages; wrap it in an environment of your own"
        )
    return environment


def _installed() -> str | None:
    try:
        return version("verifiers")
    except PackageNotFoundError:
        return None


def prompts_of(environment: Any, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """The rows of an environment's data set, `info` as JSON."""
    rows = environment.get_eval_dataset() if held_out else environment.get_dataset()
    for row in rows:
        info = row.get("info") or {}
        info = info if isinstance(info, str) else json.dumps(info)
        yield {name: row.get(name, "") for name in _COLUMNS} | {"info": info}


def write_prompts(
    env_id: str,
    path: Path,
    args: Annotated[str, typer.Option(help="Arguments of load_environment, as JSON.")] = "{}",
    held_out: Annotated[bool, typer.Option(help="The set for evaluation.")] = False,
) -> None:
    """Write an environment's prompts as JSONL, for data.path or eval.path."""
    environment = load(env_id, args)
    with path.open("w") as file:
        for row in prompts_of(environment, held_out=held_out):
            file.write(json.dumps(row) + "\n")
    if getattr(environment, "oai_tools", None):
        tools = json.dumps({"tools": environment.oai_tools})
        print(f"it has tools: ASPO_DATA__CHAT_TEMPLATE_OPTIONS='{tools}'", file=sys.stderr)


def message_of(text: str) -> dict[str, Any]:
    """A turn of the model as a chat message, with the tool calls in it."""
    calls = []
    for number, body in enumerate(_TOOL_CALL.findall(text)):
        try:
            call = json.loads(body)
            function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))}
        except (ValueError, TypeError, KeyError):
            continue  # a model that cannot spell has not called
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": _TOOL_CALL.sub("", text).strip(), "tool_calls": calls}


def _input(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: columns[name] for name in _COLUMNS if name in columns}


async def _restore(environment: Any, state: Mapping[str, Any]) -> Any:
    """A rollout's State as `verifiers` has it, without a client."""
    rollout = await environment.init_state(state["input"], None, "", None)
    if state["rollout"] is None:
        return await environment.setup_state(rollout)
    rollout.update(state["rollout"])
    return rollout


async def _add_turn(environment: Any, rollout: Any, prompt: list[Message] | None, text: str) -> list[Message]:
    """Put down what the model said to a prompt, None for the first; returns the prompt."""
    asked = list(rollout["prompt"]) if prompt is None else prompt
    step = {
        "prompt": asked,
        "completion": [message_of(text)],
        "response": None,
        "tokens": None,
        "reward": None,
        "advantage": None,
        "is_truncated": False,
        "trajectory_id": rollout["trajectory_id"],
        "extras": {},
    }
    await environment.add_trajectory_step(rollout, step)
    return asked


def _keep(rollout: Any, prompt: list[Message]) -> dict[str, Any]:
    """What of a State is plain data, and the prompt of the next turn."""
    kept = {name: value for name, value in rollout.items() if name not in _NOT_KEPT}
    return {"input": kept["input"], "rollout": kept, "prompt": prompt}


if __name__ == "__main__":
    typer.run(write_prompts)
