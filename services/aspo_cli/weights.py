"""`aspo weights`: the versions of a run; listing, fetching and verifying them, and deciding what is live."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aspo.config import ConfigError
from aspo_cli.options import DEFAULT_LEARNER, Json, LearnerUrl, Token

app = typer.Typer(
    no_args_is_help=True,
    help="Versions of the weights: list, show, verify, pull, snapshot, promote and roll back.",
    epilog="Example: aspo weights pull my-model --version demo/1/42 --learner http://learner:8000",
)
Version = Annotated[str, typer.Argument(help="run/epoch/step, as `aspo weights ls` shows it.")]


@app.command("ls")
def list_versions(learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None, as_json: Json = False) -> None:
    """List the versions kept, what it takes to reach each, and who runs it."""
    found = _call(learner, token, "GET", "/v1/weights")
    if as_json:
        typer.echo(json.dumps(found))
        return
    title = "held: later versions wait for `aspo weights promote`" if found["held"] else None
    table = Table(title=title, title_style="yellow", title_justify="left")
    for name, justify in {"version": "left", "": "left", "changed": "right", "ways to it": "left"}.items():
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("run by")
    for version in found["versions"]:
        fraction = version["changed_fraction"]
        table.add_row(
            version["version"],
            "live" if version["live"] else "",
            "-" if fraction is None else f"{fraction:.2%}",
            ", ".join(f"{_short(base)} {_bytes(size)}" for base, size in version["transfers"].items()),
            escape(", ".join(version["running"])),
        )
    _console().print(table)


@app.command()
def show(
    version: Version, learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None, as_json: Json = False
) -> None:
    """Show what a version is made of, tensor by tensor."""
    manifest = _call(learner, token, "GET", f"/v1/weights/{version}")
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    for name in ("version", "parent", "state_digest", "config_digest", "changed_fraction"):
        typer.echo(f"{name:17} {manifest[name]}")
    table = Table("tensor", "type", "shape", "blake3")
    for info in manifest["tensors"]:
        shape = " x ".join(map(str, info["shape"])) or "scalar"
        table.add_row(info["name"], info["dtype"], shape, info["digest"][:16])
    _console().print(table)


@app.command()
def pull(
    folder: Annotated[Path, typer.Argument(help="Where to write the model; must not exist yet.")],
    version: Annotated[str | None, typer.Option(help="run/epoch/step; the live one by default.")] = None,
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
) -> None:
    """Download and verify a version as a folder that from_pretrained and vLLM load."""
    from aspo_cli.pull import pull_version

    typer.echo(pull_version(learner, token, version, folder))


@app.command()
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


@app.command()
def promote(version: Version, learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None) -> None:
    """Make a version live, and let later ones follow by themselves."""
    typer.echo(_call(learner, token, "POST", f"/v1/weights/{version}/promote")["state"])


@app.command()
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
    typer.echo(_call(learner, token, "POST", "/v1/weights/rollback", body)["state"])


@app.command()
def snapshot(learner: LearnerUrl = DEFAULT_LEARNER, token: Token = None) -> None:
    """Have the learner store its newest version whole, so that newcomers need no deltas."""
    typer.echo(_call(learner, token, "POST", "/v1/weights/snapshot")["state"])


def _call(url: str, token: str | None, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Ask the learner; raises ConfigError with its message and hint, or when none answers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL; write --learner http://HOST:PORT")
    request = urllib.request.Request(
        url.rstrip("/") + urllib.parse.quote(path), data=data, headers=headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise ConfigError(_reason(error)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError(f"no learner answers at {url} ({error}); start one or pass --learner URL") from None
    if not isinstance(answer, dict) or not {"versions", "tensors", "state"} & answer.keys():
        raise ConfigError(f"{url} is not a learner; pass its URL with --learner")
    return answer


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        detail = json.load(error)["error"]
        hint = "pass --token or set ASPO_TOKEN" if error.code in (401, 403) else detail["hint"]
        return f"{detail['message']}; {hint}"
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code}; is it a learner? pass its URL with --learner"


def _short(base: str) -> str:
    return base if base == "snapshot" else f"from {base.rpartition('/')[2]}:"


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)
