"""`aspo demo`: the whole service on one machine's CPU, from an empty folder to a model that can add."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from aspo.config import Config, ConfigError, load_config
from aspo.errors import AspoError
from aspo_cli import demo_model, status
from aspo_cli.demo_task import MAX_COMPLETION_TOKENS
from aspo_cli.processes import PartFailed, Processes, free_port
from aspo_cli.shares import split_cores, usable_cores
from aspo_cli.up import INTERRUPTED, Service, ended_by_signals, is_plain_loopback, print_failure

TARGET_ACCURACY = 0.95
CONFIG = """\
# The demo is one config among others; see README.md for what the keys mean.
[run]
name = {name}
dir = {runs}
seed = {seed}

[redis]
url = "redis://127.0.0.1:{redis_port}/0"

[model]
path = {model}
dtype = "float32"

[data]
path = {train}

[sampling]
group_size = 8
max_tokens = {max_tokens}
temperature = 1.0

[reward]
function = "aspo_cli.demo_task:correct_sum"
concurrency = 1

[loss]
name = "aspo"
ratio_reference = "behavior"

[learner]
threads = {learner_threads}
port = {learner_port}  # as in actor.learner_url
steps = 200
batch_prompts = 32
mini_batch_prompts = 32
epochs = 2
learning_rate = 1e-4
warmup_updates = 10
betas = [0.9, 0.99]
weight_decay = 0.0
micro_batch_tokens = 2816
max_staleness = 4

[actor]
learner_url = "http://127.0.0.1:{learner_port}"
port = 0
id = "actor-0"

[actor.engine]
max_num_seqs = 256
cpu_kv_cache_gib = 0.5
"""
EVALUATION = """
[eval]
path = {held_out}
every = 10
max_prompts = 256
max_share = 0.2  # more than a run that does not wait for its accuracy would pay
stop_accuracy = {target}
min_steps = 50
"""


def service_of(folder: Path, overrides: list[str]) -> Service:
    """The demo's processes, by the config that `write_config` has left in a folder."""
    path = folder / "config.toml"
    config = load_config(path, overrides)
    return Service(
        config=config,
        path=path,
        overrides=overrides,
        shares=split_cores(usable_cores(), actors=1),
        own_redis=is_plain_loopback(config.redis.url),
        restarts=0,  # what dies in a demo is to be seen
    )


def run_demo(*, seed: int, runs: Path, name: str, overrides: list[str]) -> int:
    """Run the demo and return the exit code."""
    console = Console()
    folder = _fresh_folder(runs / name, console)
    write_config(folder, seed)
    service = service_of(folder, overrides)
    if service.config.run.path != folder:
        raise ConfigError("the demo's run.name and run.dir are set by --name and --runs")
    try:
        with ended_by_signals():
            _prepare(folder, seed, console)
            with Processes(folder / "logs") as parts:
                service.start(parts)
                _watch(parts, service.config, console)
                console.print("\nstopping the actor and Redis", style="dim")
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything is stopped", style="yellow")
        return INTERRUPTED
    except PartFailed as error:
        print_failure(console, "demo", error)
        return error.exit_code
    _print_summary(folder, console)
    return 0


def prepare_in(folder: Path, seed: int) -> None:
    """Make the demo's model and problems for services that are started otherwise; a former model is kept."""
    if (folder / "initial-model").exists():
        Console().print(f"{folder} has a model already", style="dim")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prepare(folder, seed, Console())
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}); name another folder") from None


def _fresh_folder(folder: Path, console: Console) -> Path:
    """Make the run's folder; a former run of that name is moved aside, not lost."""
    if folder.exists():
        number = next(i for i in range(1, sys.maxsize) if not folder.with_name(f"{folder.name}.{i}").exists())
        aside = folder.rename(folder.with_name(f"{folder.name}.{number}"))
        console.print(f"[dim]the former run is now {aside}[/dim]")
    folder.mkdir(parents=True)
    return folder.resolve()


def write_config(folder: Path, seed: int, *, evaluate: bool = True) -> dict[str, int]:
    """Write config.toml for what lies in `folder`; returns the ports it names."""
    ports = {"redis_port": free_port(), "learner_port": free_port()}
    paths = {"model": "initial-model", "train": "train.jsonl", "held_out": "held_out.jsonl"}
    text = (CONFIG + EVALUATION if evaluate else CONFIG).format(
        name=json.dumps(folder.name),
        runs=json.dumps(str(folder.parent)),
        seed=seed,
        target=TARGET_ACCURACY,
        max_tokens=MAX_COMPLETION_TOKENS,
        learner_threads=max(1, (os.cpu_count() or 1) // 2),
        **{key: json.dumps(str(folder / file)) for key, file in paths.items()},
        **ports,
    )
    (folder / "config.toml").write_text(text)
    return ports


def _prepare(folder: Path, seed: int, console: Console) -> None:
    """Write problems and the warm-started model, which is there whole or not at all."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        writing = progress.add_task("Writing problems", total=1)
        demo_model.write_problems(folder, seed)
        progress.advance(writing)
        warming = progress.add_task("Warm-starting a 0.7 M Qwen3", total=demo_model.DEMO.steps)

        def on_step(step: int, loss: float) -> None:
            progress.update(warming, completed=step, description=f"Warm-starting a Qwen3, loss {loss:.3f}")

        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            demo_model.make_model(Path(unfinished) / "model", seed, on_step, demo_model.DEMO)
            (Path(unfinished) / "model").rename(folder / "initial-model")


def _watch(parts: Processes, config: Config, console: Console) -> None:
    """Show the learner's status until it is done."""
    url = config.actor.learner_url
    token = config.auth.reader_token or config.auth.actor_token or config.auth.operator_token
    secret = token.get_secret_value() if token else None
    started = time.monotonic()
    console.print(f"watch it at {url}, or by aspo top --learner {url}", style="dim")
    seen: dict[str, Any] | None = None
    with Live(console=console, refresh_per_second=4) as live:
        while not parts.finished("learner"):
            with contextlib.suppress(AspoError):  # not up yet, or just done: the parts' own exits decide
                seen = status.fetch_status(url, secret)
            live.update(_view(seen, time.monotonic() - started, url))
            time.sleep(0.5)


def _view(seen: dict[str, Any] | None, elapsed: float, url: str) -> Group:
    if seen is None:
        return Group(Text(f"starting Redis, learner and vLLM actor ({elapsed:.0f} s)"))
    accuracy = seen["accuracy"] or 0.0
    bar = Progress(
        TextColumn("held-out accuracy"), BarColumn(60), TextColumn(f"{accuracy:.2f} (aim: {TARGET_ACCURACY})")
    )
    shown = bar.add_task("", total=TARGET_ACCURACY)
    bar.update(shown, completed=min(accuracy, TARGET_ACCURACY))
    return Group(
        status.render(seen), bar, Text(f"{elapsed:.0f} s   watch it at {url}   Ctrl-C stops it", style="dim")
    )


def _print_summary(folder: Path, console: Console) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    table = Table(title="The demo's result", title_justify="left", show_header=False)
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    rows = {
        "held-out greedy accuracy": f"{_share(before)} → {_share(after)}",
        "steps / rollouts / tokens": f"{summary['steps']} / {summary['rollouts']:,} / {summary['tokens']:,}",
        "seconds": f"{summary['seconds']:.0f}",
        "staleness, mean / max": f"{summary['staleness_mean']:.2f} / {summary['staleness_max']:.0f} versions",
        "weight syncs": str(summary["weight_syncs"]),
        "learner waited": f"{summary['learner_idle_fraction']:.0%} of the steady state",
        "curves": str(folder / "curves.png"),
        "summary": str(folder / "summary.json"),
        "model (from_pretrained, vLLM)": summary["model"],
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
