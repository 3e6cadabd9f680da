"""The settings in effect, made fit to be shown: where each comes from, and no secrets.

for setting in effective(Path("my.toml"), ["learner.steps=5"]):
    print(setting.name, setting.value, setting.source)
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_settings import EnvSettingsSource

from aspo.config import ENV_DELIMITER, ENV_PREFIX, Config, load_config, parse_overrides
from aspo.queue import url_without_password

DEFAULT = "default"
HIDDEN = "***"
_SECRET_KEY = re.compile(
    r"(?:^|[._-])(?:\w*(?:token|secret|passw(?:or)?d|passphrase|credentials?|authorization|api_?key)|(?:\w*_)?key)$",
    re.IGNORECASE,
)
_SECRET_SECTION = "auth."
# Tables whose keys are not ours to know.
_FREE = re.compile(r"(?:^|\.)(?:options|extra)\.|^trackers\.")


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting; `source` is `default`, the file's name, a variable's name or `--set`."""

    name: str
    value: Any
    source: str


def public_settings(config: Config) -> dict[str, Any]:
    """All settings by name, as they may be shown to anybody."""
    return {name: _shown(name, value) for name, value in _leaves(config.model_dump(mode="json"))}


def effective(path: Path, overrides: list[str]) -> Iterator[Setting]:
    """All settings in effect, in the order of the config's definition; raises `ConfigError`."""
    config = load_config(path, overrides)
    layers = [
        ("--set", parse_overrides(overrides)),
        ("", EnvSettingsSource(Config)()),
        (path.name, tomllib.loads(path.read_text())),
    ]
    for name, value in public_settings(config).items():
        yield Setting(name, value, _source(name, layers))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _source(name: str, layers: list[tuple[str, dict[str, Any]]]) -> str:
    for source, tree in layers:
        # A token that was read from a file is set by the setting that names the file.
        if any(_holds(tree, spelling) for spelling in (name, f"{name}_file")):
            return source or _variable(name)
    return DEFAULT


def _holds(tree: Any, name: str) -> bool:
    for key in name.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _variable(name: str) -> str:
    """The variable that sets it: its own, or one that gives a whole table as JSON."""
    variables = {variable.upper(): variable for variable in os.environ}
    parts = name.upper().split(".")
    spellings = [[*parts[:-1], f"{parts[-1]}_FILE"]] + [parts[:end] for end in range(len(parts), 0, -1)]
    candidates = (ENV_PREFIX + ENV_DELIMITER.join(spelling) for spelling in spellings)
    return next((variables[one] for one in candidates if one in variables), "environment")


def _shown(name: str, value: Any) -> Any:
    """The value as it may be shown to anybody."""
    if isinstance(value, list):
        return [_shown_entry(name, entry) for entry in value]
    is_free = _FREE.search(name)
    if value is not None and (name.startswith(_SECRET_SECTION) or (is_free and _SECRET_KEY.search(name))):
        return HIDDEN
    if isinstance(value, str) and "://" in value and ("@" in value or name == "redis.url"):
        return url_without_password(value)
    return value


def _shown_entry(name: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return _shown(name, entry)
    return {key: _shown_nested(f"{name}.{key}", value) for key, value in entry.items()}


def _shown_nested(name: str, value: Any) -> Any:
    return _shown_entry(name, value) if isinstance(value, dict) else _shown(name, value)
