"""Running cells one after the other, each result a line in a file, so that a study goes on where it was.

for row in run_cells(cells, Path("runs/study"), workers=2): ...
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from aspo.config import ConfigError
from aspo_study.cells import Cell, Row, key_of
from aspo_study.trial import Trial, warm_start

RESULTS = "results.jsonl"


def read_results(folder: Path, name: str = RESULTS) -> list[Row]:
    """The results in a study's folder, in the order in which they were made; raises ConfigError."""
    path = folder / name
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no study's ({error}); name another --folder") from None


def missing(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """The cells that have no result in `folder` yet."""
    done = {key_of(row) for row in read_results(folder)}
    return [cell for cell in cells if cell.key not in done]


def run_cells(cells: Iterable[Cell], folder: Path, *, workers: int = 1) -> Iterator[Row]:
    """Run the cells that have no result in `folder` yet, and yield each result once it is written there."""
    folder.mkdir(parents=True, exist_ok=True)
    models, left = folder / "models", missing(cells, folder)
    _prepare()
    for task in sorted({cell.task for cell in left}):
        warm_start(task, models)
    with (folder / RESULTS).open("a") as file:
        for row in _results(left, models, workers):
            file.write(f"{json.dumps(row)}\n")
            file.flush()
            yield row


def _results(cells: list[Cell], models: Path, workers: int) -> Iterator[Row]:
    if workers == 1:
        yield from map(partial(_run, models=models), cells)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        waiting = [pool.submit(_run, cell, models=models) for cell in cells]
        yield from (future.result() for future in as_completed(waiting))


def _prepare() -> None:
    torch.set_num_threads(1)  # small products; and sums are in the same order whatever the machine
    transformers_logging.disable_progress_bar()
    logging.getLogger("aspo_learner").setLevel(logging.ERROR)  # what it warns of is what is studied


def _run(cell: Cell, *, models: Path) -> Row:
    return Trial(cell, models).run()
