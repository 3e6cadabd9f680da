"""`aspo quarantine`: the rollouts that the learner set aside; listing, looking, judging again, forgetting."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aspo.config import ConfigError, load_config
from aspo_cli.options import ConfigPath, Json, Overrides

if TYPE_CHECKING:
    from aspo.quarantine import Entry, Quarantine

app = typer.Typer(
    no_args_is_help=True,
    help="Rollouts that were set aside as unusable: list, show, requeue and purge.",
    epilog="Example: aspo quarantine ls --config my.toml",
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command("ls", epilog="Example: aspo quarantine ls --config my.toml --last 100 --json")
def list_entries(
    config: ConfigPath,
    count: Annotated[int, typer.Option("--last", min=1, help="How many of the newest to list.")] = 20,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Count the entries by reason and list the newest."""
    counts: Counter[str] = Counter()
    newest: list[Entry] = []
    with _quarantine(config, overrides) as quarantine:
        for entry in quarantine.entries():
            counts[entry.kind] += 1
            newest += [entry] if len(newest) < count else []
    if as_json:
        typer.echo(json.dumps({"counts": counts, "newest": [entry.as_json() for entry in newest]}))
        return
    reasons, entries = Table("reason", "rollouts"), Table("id", "reason", "uid", "actor", "bytes")
    for kind, number in counts.most_common():
        reasons.add_row(Text(kind), str(number))
    for entry in newest:
        texts = (entry.id, entry.reason, entry.uid, entry.actor)
        entries.add_row(*map(Text, texts), f"{entry.size:,}")
    _console().print(reasons, entries)


@app.command(epilog="Example: aspo quarantine show 1700000000000-0 --config my.toml")
def show(
    config: ConfigPath,
    entry_id: Annotated[str, typer.Argument(metavar="ID", help="As `aspo quarantine ls` lists it.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show one entry, decoded as far as it decodes; whatever could fool a terminal is escaped."""
    from aspo.quarantine import describe

    with _quarantine(config, overrides) as quarantine:
        entry, payload = quarantine.entry(entry_id)
    facts = entry.as_json() | describe(payload)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    fields = facts.pop("fields")
    table = Table(show_header=False)
    for name, value in (facts | {f"  {name}": value for name, value in fields.items()}).items():
        table.add_row(Text(name), Text("-" if value is None else str(value)))
    _console().print(table)


@app.command(epilog="Example: aspo quarantine requeue 1700000000000-0 --config my.toml")
def requeue(
    config: ConfigPath,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As `aspo quarantine ls` lists them.")],
    overrides: Overrides = None,
) -> None:
    """Have the learner judge entries again, after a setting was mended say; none is trained twice."""
    with _quarantine(config, overrides) as quarantine:
        for entry_id in ids:
            quarantine.requeue(entry_id)
            typer.echo(f"requeued {entry_id}")


@app.command(epilog="Example: aspo quarantine purge --older 7d --yes --config my.toml")
def purge(
    config: ConfigPath,
    older: Annotated[str | None, typer.Option(help="Only what is older, such as 90m, 12h or 7d.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All entries.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    overrides: Overrides = None,
) -> None:
    """Forget entries for good."""
    if (older is None) != everything:
        raise ConfigError("say which entries to purge: either --older 7d or --all")
    older_s = None if older is None else _seconds(older)
    with _quarantine(config, overrides) as quarantine:
        which = "all entries" if older is None else f"entries older than {older}"
        if not yes:
            typer.confirm(f"Forget {which} of the quarantine for good?", abort=True)
        typer.echo(f"purged {quarantine.purge(older_s)} entries")


@contextmanager
def _quarantine(config: Path, overrides: list[str] | None) -> Iterator[Quarantine]:
    import redis

    from aspo.quarantine import Quarantine
    from aspo.queue import QueueError, connect

    settings = load_config(config, overrides or [])
    with connect(settings.redis.location) as client:
        try:
            yield Quarantine(client, settings.run.name)
        except redis.RedisError as error:
            raise QueueError(f"Redis refused: {error}; use the user `learner` to requeue and purge") from None


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None:
        raise ConfigError(f"--older {text!r}: write a number and a unit, such as 90m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)
