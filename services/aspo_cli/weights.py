"""`aspo weights`: the versions of a run; listing, fetching and verifying them, and deciding what is live."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aspo.text import printable
from aspo_cli.ask import ask
from aspo_cli.options import DEFAULT_LEARNER, Json, LearnerUrl, Token

app = typer.Typer(
    no_args_is_help=True,
    help="Versions of the weights: list, show, verify, pull, snapshot, promote and roll back.",
    epilog="Example: aspo weights pull my-model --version demo/1/42 --learner http://learner:8000",
)
_NAMED = 3  # clients of a version that are listed by name
Version = Annotated[str, typer.Argument(help="run/epoch/step, as `aspo weights ls` shows it.")]


@app.command("ls", epilog="Example: aspo weights ls --json")
def list_versions(learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None, as_json: Json = False) -> None:
    """List the versions kept, what it takes to reach each, and who runs it."""
    found = ask(learner, "/v1/weights", token, expect={"live", "versions"})
    if as_json:
        typer.echo(json.dumps(found))
        return
    _console().print(versions_table(found))


@app.command(epilog="Example: aspo weights show demo/1/42")
def show(
    version: Version, learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None, as_json: Json = False
) -> None:
    """Show what a version is made of, tensor by tensor."""
    manifest = ask(learner, f"/v1/weights/{version}", token, expect={"version", "tensors"})
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    for name in ("version", "parent", "state_digest", "config_digest", "changed_fraction"):
        typer.echo(f"{name:17} {manifest[name]}")
    table = _table()
    table.add_column("tensor", overflow="fold")
    for name in ("type", "shape", "blake3"):
        table.add_column(name, no_wrap=True)
    for info in manifest["tensors"]:
        shape = " x ".join(map(str, info["shape"])) or "scalar"
        table.add_row(info["name"], info["dtype"], shape, info["digest"][:12])
    _console().print(table)


@app.command(epilog="Example: aspo weights pull my-model --version demo/1/42")
def pull(
    folder: Annotated[Path, typer.Argument(help="Where to write the model; must not exist yet.")],
    version: Annotated[str | None, typer.Option(help="run/epoch/step; the live one by default.")] = None,
    adapter: Annotated[
        bool, typer.Option(help="Of a run with learner.lora: the adapters, for peft.")
    ] = False,
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
) -> None:
    """Download and verify a version as a folder that from_pretrained and vLLM load, adapters merged."""
    from aspo_cli.pull import pull_version

    typer.echo(pull_version(learner, token, version, folder, adapter=adapter))


@app.command(epilog="Example: aspo weights verify --store runs/demo/state/weights")
def verify(
    version: Annotated[str | None, typer.Argument(help="run/epoch/step; the live one by default.")] = None,
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
    store: Annotated[
        Path | None, typer.Option(help="A run's weights folder: check it, all its versions, on disk.")
    ] = None,
) -> None:
    """Check every digest: of one version as it is served, or of a whole store on disk."""
    from aspo_cli.pull import verify_store, verify_version

    typer.echo(verify_store(store) if store is not None else verify_version(learner, token, version))


@app.command(epilog="Example: aspo weights promote demo/1/44")
def promote(version: Version, learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None) -> None:
    """Make a version live, and let later ones follow by themselves."""
    typer.echo(_tell(learner, f"/v1/weights/{version}/promote", token))


@app.command(epilog="Example: aspo weights rollback demo/1/40 --continue")
def rollback(
    version: Version,
    continue_training: Annotated[
        bool, typer.Option("--continue", help="The learner, too, goes on from that version, in a new epoch.")
    ] = False,
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
) -> None:
    """Make an older version live; later ones wait until one is promoted."""
    body = {"version": version, "continue_training": continue_training}
    typer.echo(_tell(learner, "/v1/weights/rollback", token, body))


@app.command(epilog="Example: aspo weights snapshot")
def snapshot(learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None) -> None:
    """Have the learner store its newest version whole, so that newcomers need no deltas."""
    typer.echo(_tell(learner, "/v1/weights/snapshot", token))


def versions_table(found: dict[str, Any]) -> Table:
    """The answer of `GET /v1/weights` as a table."""
    title = "held: later versions wait for `aspo weights promote`" if found["held"] else None
    table = _table(title=title, title_style="yellow", title_justify="left")
    for name in ("version", "", "changed"):
        table.add_column(name, no_wrap=True, justify="right" if name == "changed" else "left")
    for name in ("ways to it", "run by"):
        table.add_column(name, overflow="fold")
    for version in found["versions"]:
        fraction = version["changed_fraction"]
        table.add_row(
            version["version"],
            "live" if version["live"] else "",
            "-" if fraction is None else f"{fraction:.2%}",
            ", ".join(f"{_short(base)} {_bytes(size)}" for base, size in version["transfers"].items()),
            escape(printable(_some(version["running"]))),
        )
    return table


def _tell(url: str, path: str, token: str | None, body: object = None) -> str:
    return str(ask(url, path, token, expect={"state"}, method="POST", body=body)["state"])


def _short(base: str) -> str:
    return base if base == "snapshot" else f"from {base.rpartition('/')[2]}:"


def _some(names: Sequence[str]) -> str:
    """The names, or how many they are."""
    return ", ".join(names) if len(names) <= _NAMED else f"{len(names)} clients"


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _table(**options: Any) -> Table:
    """A table without lines: 80 columns hold more of it."""
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim", **options)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)
