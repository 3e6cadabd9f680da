"""Prompts: from files and data sets to token ids, as the engine gets them; nothing is tokenised again.

reader = PromptReader(config.data, chosen, tokenizer, room=room)
prompts = load_prompts(reader)          # one pass; `reader.counts` says what was left out
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aspo.config import Config, ConfigError, DataConfig, EvalSet, Source
from aspo_learner.rows import Row, load_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row: its token ids, the columns that the reward function gets, its set's name and its place there.

    `row` counts the prompts that were not left out.
    """

    token_ids: list[int]
    reward_inputs: dict[str, Any]
    source: str = ""
    row: int = 0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A set to evaluate on."""

    chosen: EvalSet
    prompts: list[Prompt]


@dataclass(slots=True)
class Counts:
    """Rows of a set read in this pass, and those of them left out for their length."""

    read: int = 0
    too_long: int = 0


class PromptReader:
    """The prompts of one set, a pass for every iteration, in the set's own order.

    Raises ConfigError for a missing file or column, an empty prompt or set, or a prompt that is longer than
    `room` (unless data.overlong_prompts is "skip").
    """

    def __init__(self, config: DataConfig, chosen: Source, tokenizer: Any, *, room: int) -> None:
        self._config, self._set, self._tokenizer, self._room = config, chosen, tokenizer, room
        self.name = chosen.label
        self.counts = Counts()
        self._rows = load_rows(chosen, streaming=config.streaming)
        self._wanted = {name: chosen.columns.get(name, name) for name in config.reward_columns}
        self._prompt_column = chosen.columns.get(config.prompt_column, config.prompt_column)

    def __iter__(self) -> Iterator[Prompt]:
        self.counts = Counts()
        for number, row in enumerate(self._rows):
            self._require_columns(row, number)
            self.counts.read += 1
            token_ids = self._tokenize(row[self._prompt_column], number)
            if self._is_too_long(len(token_ids), number):
                self.counts.too_long += 1
                continue
            inputs = {name: row[column] for name, column in self._wanted.items()}
            yield Prompt(token_ids, inputs, self.name, self.counts.read - self.counts.too_long - 1)
        if self.counts.read == 0:
            raise ConfigError(f"cannot read prompts from {self._set.path!r}: it holds no rows")
        if self.counts.read == self.counts.too_long:
            raise ConfigError(
                f"{self._set.path} holds no usable prompt ({self.counts.read} rows, {self.counts.too_long} "
                "too long); give at least one row that fits the context and data.max_prompt_tokens"
            )

    def _require_columns(self, row: Row, number: int) -> None:
        for column in (self._prompt_column, *self._wanted.values()):
            if column not in row:
                who = f"{self._set.path}, row {number}," if number else self._set.path
                raise ConfigError(
                    f"{who} has no column {column!r} (it has {', '.join(row)}); set "
                    "data.prompt_column and data.reward_columns, or say by `columns` what they are called"
                )

    def _is_too_long(self, tokens: int, number: int) -> bool:
        limit = self._config.max_prompt_tokens
        if limit is not None and tokens > limit:
            return True
        if tokens > self._room and self._config.overlong_prompts == "error":
            raise ConfigError(
                f"{self._set.path}, row {number}: the prompt has {tokens} tokens, but the context leaves "
                f"{self._room}; shorten it, lower sampling.max_tokens or set data.overlong_prompts = 'skip'"
            )
        return tokens > self._room

    def _tokenize(self, prompt: Any, number: int) -> list[int]:
        config, tokenizer = self._config, self._tokenizer
        templated = bool(tokenizer.chat_template) if config.chat_template is None else config.chat_template
        if fault := _fault_of(prompt):
            raise ConfigError(f"{self._set.path}, row {number}: {fault}")
        if not templated and (config.system_prompt or not isinstance(prompt, str)):
            raise ConfigError(
                "data.system_prompt and prompts that are lists of messages need a chat template; set "
                "data.chat_template = true"
            )
        if not templated:
            return list(tokenizer(prompt)["input_ids"])
        text = tokenizer.apply_chat_template(
            self._messages(prompt),
            add_generation_prompt=True,
            tokenize=False,
            **config.chat_template_options,
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _messages(self, prompt: Any) -> list[dict[str, Any]]:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        system = self._config.system_prompt
        if system and messages[0].get("role") != "system":
            return [{"role": "system", "content": system}, *messages]
        return messages


def _fault_of(prompt: Any) -> str | None:
    """What is wrong with a prompt; None for text, and for messages as chat templates take them."""
    if prompt is None or prompt in ("", []):
        return "the prompt is empty; remove the row"
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list):
        return f"the prompt is neither text nor a list of messages, but {type(prompt).__name__}"
    fit = (
        isinstance(one, dict) and "role" in one and one.keys() & {"content", "tool_calls"} for one in prompt
    )
    return None if all(fit) else 'a message of the prompt is not {"role": ..., "content": ...}'


def room_for_prompts(config: Config, context: int) -> int:
    """The longest prompt, in tokens, that leaves room for a completion; raises ConfigError for none.

    `context` is the model's.
    """
    context = min(context, config.actor.engine.max_model_len or context)
    room = context - config.longest_completion
    if room < 1:
        said = f" and environment.max_tokens ({config.environment.room})" if config.environment.room else ""
        raise ConfigError(
            f"sampling.max_tokens ({config.sampling.max_tokens}){said} leaves no room for a prompt in "
            f"a context of {context} tokens; lower it"
        )
    return room


def load_prompts(reader: PromptReader) -> list[Prompt]:
    """Read a whole set; says how many of its prompts were left out."""
    prompts, counts = list(reader), reader.counts
    level = logging.WARNING if counts.too_long else logging.INFO
    log.log(level, "%s: %d prompts, skipped %d too long", reader.name, len(prompts), counts.too_long)
    return prompts


def load_held_out(config: Config, tokenizer: Any, *, room: int) -> list[HeldOut]:
    """Read the prompts of every set of `eval`; none without any."""
    data = config.data.model_copy(update={"streaming": False})
    return [
        HeldOut(chosen, load_prompts(PromptReader(data, chosen, tokenizer, room=room)))
        for chosen in config.eval.chosen
    ]
