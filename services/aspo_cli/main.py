"""The `aspo` command. Services are imported by the command that runs them, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aspo.errors import AspoError

INTERRUPTED = 130
app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Asynchronous off-policy RL of language models: vLLM actors, a Redis queue, an ASPO learner.",
    epilog="Exit codes: 0 done, 1 a part of the service failed, 2 something to mend in what was asked.",
)

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="TOML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a setting: section.key=value; may be repeated."),
]
LearnerUrl = Annotated[str, typer.Option("--learner", help="URL of the learner.")]
Token = Annotated[
    str | None, typer.Option("--token", envvar="ASPO_TOKEN", help="Bearer token, if the learner asks.")
]
DEFAULT_LEARNER = "http://127.0.0.1:8000"


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seeds model, data, sampling and training.")] = 0,
    runs: Annotated[Path, typer.Option(help="Parent folder of the run's folder.")] = Path("runs"),
    name: Annotated[
        str, typer.Option(help="The run's name; a former run of that name is moved aside.")
    ] = "demo",
    overrides: Overrides = None,
) -> None:
    """Teach a small model to add on this machine's CPU, with every real part in a process of its own."""
    from aspo_cli.demo import run_demo

    raise typer.Exit(run_demo(seed=seed, runs=runs, name=name, overrides=overrides or []))


@app.command()
def learner(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run a run's learner: aspo learner --config my.toml"""
    from aspo_cli.services import run_learner

    run_learner(config, overrides or [])


@app.command()
def actor(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run an actor; any number may run, anywhere: aspo actor --config my.toml"""
    from aspo_cli.services import run_actor

    run_actor(config, overrides or [])


@app.command()
def status(
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
    watch: Annotated[
        bool, typer.Option("--watch/--once", help="Refresh until Ctrl-C.")
    ] = sys.stdout.isatty(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the learner's status as JSON.")] = False,
) -> None:
    """Show what a learner and its actors are doing."""
    from aspo_cli.status import show_status

    show_status(learner, token, watch=watch, as_json=as_json)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where to write the model; must not exist yet.")],
    version: Annotated[str | None, typer.Option(help="run/epoch/step; the latest by default.")] = None,
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
) -> None:
    """Download a published version as a folder that from_pretrained and vLLM load."""
    from aspo_cli.export import export_version

    typer.echo(export_version(learner, token, version, folder))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A file of the bench folder, such as actor.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a benchmark; each prints ratios to a peer or a limit measured in the same run."""
    from aspo_cli.bench import run_bench

    run_bench(name, as_json=as_json)


def run() -> None:
    """Entry point: a user's mistake is one line on standard error, not a traceback."""
    try:
        app()
    except AspoError as error:
        print(f"aspo: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
