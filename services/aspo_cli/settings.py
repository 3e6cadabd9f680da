"""`aspo config`: what is set and where it comes from, checking a file, and the schema that editors read.

for setting in effective(Path("my.toml"), ["learner.steps=5"]):
    print(setting.name, setting.value, setting.source)
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aspo.config import Config
from aspo.text import printable
from aspo_cli.options import ConfigPath, Json, Overrides

app = typer.Typer(
    no_args_is_help=True,
    help="The settings of a run: show where each comes from, check a file, print the schema for editors.",
    epilog="Example: aspo config show --config my.toml --set learner.steps=5",
)


@app.command(epilog="Example: aspo config show --config my.toml --changed")
def show(
    config: ConfigPath,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out what is at its default.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show every setting in effect and where it comes from; secrets are not shown."""
    from aspo.effective import DEFAULT, effective

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
    from aspo.effective import DEFAULT, effective

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
