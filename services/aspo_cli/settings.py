"""`aspo config`: what is set and where it comes from, checking a file, and the schema that editors read.

for setting in effective(Path("my.toml"), ["learner.steps=5"]):
    print(setting.name, setting.value, setting.source)
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_settings import EnvSettingsSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aspo.config import ENV_DELIMITER, ENV_PREFIX, Config, load_config, parse_overrides
from aspo.text import printable
from aspo_cli.options import ConfigPath, Json, Overrides

DEFAULT = "default"
HIDDEN = "***"
_SECRET_KEY = re.compile(r"(?:^|[._-])(?:\w*token|\w*secret|\w*password|(?:\w*_)?key)$", re.IGNORECASE)
_SECRET_SECTION = "auth."
_FREE_TABLES = ("options", "extra")  # tables whose keys are not ours to know
app = typer.Typer(
    no_args_is_help=True,
    help="The settings of a run: show where each comes from, check a file, print the schema for editors.",
    epilog="Example: aspo config show --config my.toml --set learner.steps=5",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting; `source` is `default`, the file's name, a variable's name or `--set`."""

    name: str
    value: Any
    source: str


@app.command(epilog="Example: aspo config show --config my.toml --changed")
def show(
    config: ConfigPath,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out what is at its default.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show every setting in effect and where it comes from; secrets are not shown."""
    found = [s for s in effective(config, overrides or []) if not changed or s.source != DEFAULT]
    if as_json:
        typer.echo(json.dumps({s.name: {"value": s.value, "source": s.source} for s in found}))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for setting in found:
        style = "dim" if setting.source == DEFAULT else ""
        cells = (setting.name, json.dumps(setting.value, ensure_ascii=False), setting.source)
        table.add_row(*(Text(printable(cell, 4000), style=style) for cell in cells))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


@app.command(epilog="Example: aspo config check --config my.toml")
def check(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a config without starting anything; `aspo check` also looks at Redis and the disk."""
    settings = list(effective(config, overrides or []))
    changed = sum(setting.source != DEFAULT for setting in settings)
    if as_json:
        typer.echo(json.dumps({"ok": True, "settings": len(settings), "changed": changed}))
        return
    typer.echo(f"ok: {config} sets {changed} of {len(settings)} settings, variables and --set included")


@app.command(epilog="Example: aspo config schema > aspo.schema.json")
def schema() -> None:
    """Print the JSON schema of config files; editors read it by a first line `#:schema aspo.schema.json`."""
    typer.echo(json.dumps(config_schema(), indent=2))


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Config.model_json_schema() | {"title": "ASPO run"}


def effective(path: Path, overrides: list[str]) -> Iterator[Setting]:
    """All settings in effect, in the order of the config's definition; raises `ConfigError`."""
    config = load_config(path, overrides)
    layers = [
        ("--set", parse_overrides(overrides)),
        ("", EnvSettingsSource(Config)()),
        (path.name, tomllib.loads(path.read_text())),
    ]
    for name, value in _leaves(config.model_dump(mode="json")):
        yield Setting(name, _shown(name, value), _source(name, layers))


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
    from aspo.queue import url_without_password

    is_free = any(f".{table}." in name for table in _FREE_TABLES)
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
