"""The `aspo` command. Services are imported by the command that runs them, so that `--help` is quick."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from aspo.config import ConfigError
from aspo.errors import AspoError
from aspo.text import printable
from aspo_cli import quarantine, settings, study, weights
from aspo_cli.options import DEFAULT_LEARNER, ConfigPath, Json, LearnerUrl, Overrides, Token

INTERRUPTED = 130
_MAX_ERROR = 4000
app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Asynchronous off-policy RL of language models: vLLM actors, a Redis queue, an ASPO learner.",
    epilog="Exit codes: 0 done, 1 a part of the service failed, 2 something to mend in what was asked, "
    "130 ended by Ctrl-C. Completion for your shell: aspo --install-completion",
)

app.add_typer(weights.app, name="weights")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(settings.app, name="config")
app.add_typer(study.app, name="study")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aspo {importlib.metadata.version('aspo')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take what comes before a command's name."""


@app.command(epilog="Example: aspo demo --seed 3")
def demo(
    seed: Annotated[int, typer.Option(help="Seeds model, data, sampling and training.")] = 0,
    runs: Annotated[Path, typer.Option(help="Parent folder of the run's folder.")] = Path("runs"),
    name: Annotated[
        str, typer.Option(help="The run's name; a former run of that name is moved aside.")
    ] = "demo",
    prepare: Annotated[
        Path | None, typer.Option(help="Only make the demo's model and problems, in this folder.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Teach a small model to add on this machine's CPU, with every real part in a process of its own."""
    from aspo_cli.demo import prepare_in, run_demo

    if prepare is not None:
        prepare_in(prepare, seed)
        return
    raise typer.Exit(run_demo(seed=seed, runs=runs, name=name, overrides=overrides or []))


@app.command(epilog="Example: aspo learner --config my.toml")
def learner(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run a run's learner, which trains, publishes and ends with the model."""
    from aspo_cli.services import run_learner

    run_learner(config, overrides or [])


@app.command(epilog="Example: aspo actor --config my.toml --set actor.port=0")
def actor(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run an actor; any number may run, anywhere."""
    from aspo_cli.services import run_actor

    run_actor(config, overrides or [])


@app.command(epilog="Example: aspo up --config my.toml --actors 3")
def up(
    config: ConfigPath,
    actors: Annotated[int, typer.Option(min=0, max=64, help="Actors on this machine.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Processes of the learner, one a GPU.")] = 1,
    redis: Annotated[
        str | None,
        typer.Option(
            help="URL of a Redis that runs; else one is started where redis.url says, if that is here."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run Redis, the learner and its actors on this machine."""
    from aspo_cli.up import run_up

    raise typer.Exit(run_up(config, actors, redis, overrides or [], ranks=ranks))


@app.command(epilog="Example: aspo size 7B --actors 4 --gpu-gib 80")
def size(
    model: Annotated[str, typer.Argument(help="A size such as 7B, a model folder or a hub name.")],
    actors: Annotated[int, typer.Option(min=1, help="Actors.")] = 1,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of a run.")] = None,
    gpu_gib: Annotated[float, typer.Option(min=1.0, help="Memory of a GPU, in GiB.")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt.")] = 512,
    step_seconds: Annotated[float, typer.Option(min=0.01, help="Time of a learner's step.")] = 60.0,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Estimate GPUs, memory, network and Redis of a model."""
    from aspo_cli.size import run_size

    run_size(
        model,
        config,
        overrides or [],
        as_json=as_json,
        gpu_gib=gpu_gib,
        actors=actors,
        prompt_tokens=prompt_tokens,
        step_seconds=step_seconds,
    )


@app.command(epilog="Example: aspo check --config my.toml --role actor")
def check(
    config: ConfigPath,
    role: Annotated[
        Literal["learner", "actor"], typer.Option(help="Whose needs to check on this machine.")
    ] = "learner",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check Redis and this machine's disk before a run; the services do the same when they start."""
    from aspo_cli.check import run_check

    raise typer.Exit(run_check(config, role, overrides or [], as_json=as_json))


@app.command(epilog="Example: aspo relay relay-cache --learner http://learner:8000 --port 8002")
def relay(
    folder: Annotated[Path, typer.Argument(help="Where the relay keeps the weights it serves.")],
    learner: LearnerUrl = DEFAULT_LEARNER,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on; 0 picks a free one.")] = 8002,
    probe_port: Annotated[int | None, typer.Option(help="Port for the probes alone.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain to serve HTTPS with.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    advertise: Annotated[str | None, typer.Option(help="URL by which actors reach this relay.")] = None,
    token: Token = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds the token.")] = None,
) -> None:
    """Re-serve a learner's weights, verified; actors name the relay as their actor.learner_url."""
    from aspo_cli.services import run_relay

    auth = {"actor_token": token or None, "actor_token_file": token_file}
    http = {"host": host, "port": port, "probe_port": probe_port, "tls_cert": tls_cert, "tls_key": tls_key}
    run_relay(folder, learner, advertise, auth, http)


@app.command(epilog="Example: aspo status --learner http://learner:8000 --json")
def status(
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
    watch: Annotated[
        bool, typer.Option("--watch/--once", help="Refresh until Ctrl-C.")
    ] = sys.stdout.isatty(),
    as_json: Json = False,
) -> None:
    """Show what a learner and its actors are doing."""
    from aspo_cli.status import show_status

    show_status(learner, token, watch=watch, as_json=as_json)


@app.command(epilog="Example: aspo top --learner http://learner:8000 --every 5")
def top(
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many looks.")] = None,
    as_json: Json = False,
) -> None:
    """Watch a learner and its actors live: time, curves, lags; as JSON, a line for each look."""
    from aspo_cli.top import watch

    watch(learner, token, every_s=every, count=count, as_json=as_json)


@app.command("eval", epilog="Example: aspo eval -c my.toml --version sums/1/42 -k 8 --temperature 1")
def evaluate(
    config: ConfigPath,
    version: Annotated[str | None, typer.Option(help="run/epoch/step; the live one by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder, in place of a version.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Ask the actors that run; start no engine.")] = False,
    actor: Annotated[
        list[str] | None, typer.Option(help="URL of an actor to ask; may be repeated; as --live.")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, max=1024, help="Answers to each prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Of the answers.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each set.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    learner: Annotated[str | None, typer.Option(help="URL of the learner; the config's by default.")] = None,
    token: Token = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure avg@k, pass@k and majority@k on the held-out sets of a config, beside the training.

    Of the live version by default, by an engine of this command's own; --live has the running actors answer.
    """
    if sum((version is not None, model is not None, live or bool(actor))) > 1:
        raise ConfigError("--version, --model and --live (or --actor) exclude each other; give one")
    from aspo_cli.eval import Wanted, run_eval

    asked = Wanted(
        version=version,
        model=model,
        live=live,
        actors=actor or (),
        k=k,
        temperature=temperature,
        limit=limit,
        out=out,
        learner=learner,
        token=token,
    )
    run_eval(config, overrides or [], asked, as_json=as_json)


@app.command(epilog="Example: aspo export my-model --version demo/1/42")
def export(
    folder: Annotated[Path, typer.Argument(help="Where to write the model; must not exist yet.")],
    version: Annotated[str | None, typer.Option(help="run/epoch/step; the latest by default.")] = None,
    learner: LearnerUrl = DEFAULT_LEARNER,
    token: Token = None,
) -> None:
    """Download a published version from a running learner as a folder that from_pretrained and vLLM load.

    A run that is complete has left its last one in RUNS/NAME/model; `aspo weights pull` takes the live one.
    """
    from aspo_cli.pull import pull_version

    typer.echo(pull_version(learner, token, version, folder))


@app.command(epilog="Example: aspo report demo demo.1 --output comparison")
def report(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Runs, by name or folder.")],
    runs: Annotated[Path, typer.Option(help="Parent folder of the runs' folders.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to; the first run's `report`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what runs came to, one or several side by side, as one HTML file and PNG files."""
    from aspo_cli.report import run_report

    run_report(names, runs, output=output, as_json=as_json)


@app.command(epilog="Example: aspo doctor demo --json")
def doctor(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run, by name or folder.")],
    runs: Annotated[Path, typer.Option(help="Parent folder of the runs' folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what is off with a run, from its metrics, and what to change; exit code 1 if there is anything."""
    from aspo_cli.doctor import run_doctor
    from aspo_cli.report import read_run

    raise typer.Exit(run_doctor(read_run(name, runs), as_json=as_json))


@app.command(
    epilog="Example: aspo bench delta --json",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A file of the bench folder, such as actor.")],
    as_json: Json = False,
) -> None:
    """Run a benchmark; each prints ratios to a peer or a limit measured in the same run.

    Options that it does not know go to the benchmark, such as --trace FILE to learner.
    """
    from aspo_cli.bench import run_bench

    run_bench(name, context.args, as_json=as_json)


@app.command(hidden=True, epilog="Example: aspo docs docs/reference")
def docs(folder: Annotated[Path, typer.Argument(help="Where the pages go.")]) -> None:
    """Write the reference pages of the documentation, from the code."""
    from aspo_cli.reference import write_pages

    write_pages(folder)


def run() -> None:
    """Entry point: a user's mistake is one line on standard error, not a traceback."""
    try:
        app()
    except AspoError as error:
        print(f"aspo: error: {printable(str(error), _MAX_ERROR)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
