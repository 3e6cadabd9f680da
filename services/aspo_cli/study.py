"""`aspo study`: the paper's claims on stale data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aspo.config import ConfigError
from aspo_cli.options import Json

app = typer.Typer(no_args_is_help=True, help="Put the paper's claims to the test on stale data.")
Folder = Annotated[Path, typer.Option(help="Folder of the study's models and results.")]
Data = Annotated[Path, typer.Option(help="CSV file of a study's results; `confirmed.csv` lies beside it.")]
FOLDER, DATA, PAGE = Path("runs/study"), Path("docs/study/results.csv"), Path("docs/study.md")


@app.command(epilog="Example: aspo study run --phase tune --phase core --workers 2")
def run(
    folder: Folder = FOLDER,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="A task; all by default.")] = None,
    phases: Annotated[list[str] | None, typer.Option("--phase", help="A phase; all by default.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of a thread each.")] = 1,
) -> None:
    """Run every cell that has no result yet; stop it at any time, the same command goes on."""
    from aspo_study.cells import PHASES, best_rates, plan
    from aspo_study.run import missing, read_results, run_cells
    from aspo_study.tasks import TASKS

    chosen = _known("--phase", phases, PHASES), _known("--task", tasks, TASKS)
    with _progress() as progress:
        for phase in chosen[0]:
            cells = list(plan(phase, chosen[1], best_rates(read_results(folder))))
            done = len(cells) - len(missing(cells, folder))
            bar = progress.add_task(phase, total=len(cells), completed=done)
            for _ in run_cells(cells, folder, workers=workers):
                progress.advance(bar)


@app.command(epilog="Example: aspo study confirm --seeds 5")
def confirm(
    folder: Folder = FOLDER,
    seeds: Annotated[int, typer.Option(min=1, max=5, help="Seeds of each cell.")] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a run; the study's by default.")] = None,
) -> None:
    """Run the main cells with Redis, a vLLM actor and the learner as processes; needs a quiet machine."""
    from aspo_study.cells import best_rates
    from aspo_study.confirm import confirm as confirmed
    from aspo_study.confirm import confirmations
    from aspo_study.run import read_results

    cells = list(confirmations(seeds, best_rates(read_results(folder)), steps))
    with _progress() as progress:
        bar = progress.add_task("confirm", total=len(cells))
        for row in confirmed(cells, folder):
            progress.advance(bar)
            progress.print(json.dumps(row), soft_wrap=True)


@app.command(epilog="Example: aspo study summary --json")
def summary(data: Data = DATA, as_json: Json = False) -> None:
    """Print a study's tables, in Markdown, or as JSON each setting's means and 95 % intervals."""
    from aspo_study import summary as tables

    rows = tables.read_csv(data)
    if as_json:
        typer.echo(json.dumps(tables.figures(rows)))
    else:
        typer.echo(tables.summary(rows, tables.read_confirmed(data)), nl=False)


@app.command(epilog="Example: aspo study plot --out plots")
def plot(
    data: Data = DATA, out: Annotated[Path | None, typer.Option(help="Folder; that of the data.")] = None
) -> None:
    """Draw a study's plots."""
    from aspo_study.plots import plot_all
    from aspo_study.summary import read_csv

    for path in plot_all(read_csv(data), out or data.parent):
        Console().print(str(path), soft_wrap=True)


@app.command(epilog="Example: aspo study publish --folder runs/study")
def publish(
    folder: Folder = FOLDER,
    data: Data = DATA,
    page: Annotated[Path, typer.Option(help="The page whose tables to renew.")] = PAGE,
) -> None:
    """Write what was run as CSV and plots, and renew the tables of the page about it."""
    from aspo_study import page as pages
    from aspo_study.plots import plot_all
    from aspo_study.summary import read_csv

    pages.write_data(folder, data)
    plot_all(read_csv(data), data.parent)
    pages.renew(page, data)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns)


def _known(option: str, chosen: list[str] | None, known: Iterable[str]) -> list[str]:
    """What was chosen, or all there is; raises ConfigError for what is not known."""
    names = list(known)
    for name in chosen or []:
        if name not in names:
            raise ConfigError(f"{option} {name!r}: there are {', '.join(names)}")
    return chosen or names
