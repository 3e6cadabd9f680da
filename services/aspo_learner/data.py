"""Prompts: from a file or data set to token ids, and the order in which training asks for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aspo.config import ConfigError, DataConfig

log = logging.getLogger(__name__)
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row: its token ids and the columns that the reward function gets."""

    token_ids: list[int]
    reward_inputs: dict[str, Any]


def load_prompts(
    config: DataConfig,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    path: str | None = None,
    split: str | None = None,
) -> list[Prompt]:
    """Read and tokenize all prompts; `path` and `split` replace the config's, for held-out sets.

    Raises ConfigError for a missing file or column, an empty set, or a prompt longer than `max_prompt_tokens`
    (unless data.overlong_prompts is "skip").
    """
    path = path or config.path
    rows = _load_rows(path, split or config.split)
    for column in (config.prompt_column, *config.reward_columns):
        if column not in rows.column_names:
            raise ConfigError(
                f"{path} has no column {column!r} (it has {', '.join(rows.column_names)}); "
                "set data.prompt_column and data.reward_columns"
            )
    prompts, skipped = [], 0
    for number, row in enumerate(rows):
        token_ids = _tokenize(row[config.prompt_column], tokenizer, config.chat_template)
        if not token_ids:
            raise ConfigError(f"{path}, row {number}: the prompt is empty; remove the row")
        if len(token_ids) <= max_prompt_tokens:
            prompts.append(Prompt(token_ids, {name: row[name] for name in config.reward_columns}))
        elif config.overlong_prompts == "skip":
            skipped += 1
        else:
            raise ConfigError(
                f"{path}, row {number}: the prompt has {len(token_ids)} tokens, but the context leaves "
                f"{max_prompt_tokens}; shorten it, lower sampling.max_tokens or set "
                "data.overlong_prompts = 'skip'"
            )
    if skipped:
        log.warning(
            "%s: skipped %d of %d prompts longer than %d tokens", path, skipped, len(rows), max_prompt_tokens
        )
    if not prompts:
        raise ConfigError(f"{path} holds no usable prompt; give at least one row that fits the context")
    return prompts


def _load_rows(path: str, split: str) -> Any:
    import datasets

    suffix = Path(path).suffix
    if suffix in _FORMATS and not Path(path).is_file():
        raise ConfigError(f"no prompt file at {path}; set data.path or eval.path to a file that exists")
    try:
        if suffix in _FORMATS:
            return datasets.load_dataset(_FORMATS[suffix], data_files={split: path}, split=split)
        return datasets.load_dataset(path, split=split)
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or ["it holds no rows"])[0]
        raise ConfigError(f"cannot read prompts from {path!r}, split {split!r}: {reason}") from None


def _tokenize(prompt: Any, tokenizer: Any, chat_template: bool | None) -> list[int]:
    use_template = chat_template if chat_template is not None else bool(tokenizer.chat_template)
    if use_template and prompt:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not prompt:
        return []
    if not isinstance(prompt, str):
        raise ConfigError(
            "prompts that are lists of messages need a chat template; set data.chat_template = true"
        )
    return list(tokenizer(prompt)["input_ids"])


class PromptOrder:
    """A seeded permutation of the rows for every pass over the data; index -> row, with no state to lose."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._pass, self._rows = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> Prompt:
        number, place = divmod(index, len(self._prompts))
        if number != self._pass:
            self._pass = number
            self._rows = np.random.default_rng([self._seed, 2, number]).permutation(len(self._prompts))
        return self._prompts[int(self._rows[place])]
