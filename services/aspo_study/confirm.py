"""The main cells once more, with the full asynchronous service: Redis, learner and a vLLM actor as processes.

The learner settings, the model, the kind of problems and the steps are those of the cell. What differs is how
old rollouts are: the service bounds their staleness where the sampler of `trial` fixes it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from aspo.errors import AspoError
from aspo_cli.processes import free_port
from aspo_study.cells import MAIN_TASK, Cell, Row, key_of
from aspo_study.run import read_results
from aspo_study.tasks import TASKS
from aspo_study.trial import EVALUATE_EVERY, HELD_OUT, HELD_OUT_SEED, config_of, warm_start

RESULTS = "confirmed.jsonl"
CONFIRMED = tuple(
    Cell(task=MAIN_TASK, loss=loss, staleness=k) for loss, k in (("aspo", 0), ("aspo", 4), ("grpo", 4))
)
_PROBLEMS = 4096


class ServiceFailed(AspoError):
    """A run of the service did not end well."""

    exit_code = 1


def confirmations(seeds: int, rates: Mapping[str, float], steps: int | None = None) -> Iterator[Cell]:
    """The cells to confirm, a seed after the other."""
    for seed in range(seeds):
        for cell in CONFIRMED:
            tuned = replace(cell, seed=seed, learning_rate=rates[cell.loss])
            yield replace(tuned, steps=steps) if steps else tuned


def confirm(cells: Iterable[Cell], folder: Path) -> Iterator[Row]:
    """Run cells that have no result in `folder` yet; yield each result once it is written there."""
    done = {key_of(row) for row in read_results(folder, RESULTS)}
    for cell in cells:
        if cell.key in done:
            continue
        row = _serve(cell, folder)
        with (folder / RESULTS).open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        yield row


def _serve(cell: Cell, folder: Path) -> Row:
    name = f"{cell.task}-{cell.loss}-{cell.staleness}-{cell.seed}"
    place = (folder / "confirm" / name).resolve()
    place.mkdir(parents=True, exist_ok=True)
    config = write_config(cell, warm_start(cell.task, folder / "models").resolve(), place)
    with (place / "log").open("w") as log:
        command = [sys.executable, "-m", "aspo_cli", "up", "--config", str(config)]
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if code != 0:
        raise ServiceFailed(f"the service ended with code {code}; see {place / 'log'}")
    return asdict(cell) | _results(place / "run")


def _results(run: Path) -> dict[str, float]:
    """What the service came to; accuracies are greedy, of the versions before and after training."""
    summary = json.loads((run / "summary.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    later = steps[len(steps) // 2 :]
    return {
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "staleness_mean": summary["staleness_mean"],
        "staleness_max": summary["staleness_max"],
        **{name: _mean(later, name) for name in ("entropy", "weight_mean_pos", "mismatch_k3")},
        "seconds": summary["seconds"],
    }


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float:
    values = [step[name] for step in steps if name in step]
    return fmean(values) if values else float("nan")


def write_config(cell: Cell, model: Path, place: Path) -> Path:
    """Write the service's config and the problems; gives the config's path."""
    task, port = TASKS[cell.task], free_port()
    problems = {
        "train": task.problems(_PROBLEMS, seed=1000 + cell.seed, held_out=False),
        "held_out": task.problems(HELD_OUT, seed=HELD_OUT_SEED, held_out=True),
    }
    for name, rows in problems.items():
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    learner: dict[str, Any] = config_of(cell, model).model_dump(mode="json", exclude_unset=True)
    settings = learner | {
        "run": {"name": "run", "dir": str(place), "seed": cell.seed},
        "redis": {"url": f"redis://127.0.0.1:{free_port()}/0"},
        "data": {"path": str(place / "train.jsonl")},
        "eval": {"path": str(place / "held_out.jsonl"), "every": EVALUATE_EVERY},
        "reward": {"function": f"{task.reward.__module__}:{task.reward.__name__}", "concurrency": 1},
        "learner": learner["learner"] | {"port": port, "checkpoint_every": cell.steps, "threads": 1},
        "actor": {"id": "actor-0", "port": 0, "learner_url": f"http://127.0.0.1:{port}"},
        "actor.engine": {"max_num_seqs": 128, "max_model_len": 64, "cpu_kv_cache_gib": 0.25},
    }
    path = place / "config.toml"
    path.write_text("\n".join(_section(name, values) for name, values in settings.items()))
    return path


def _section(name: str, values: Mapping[str, Any]) -> str:
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())  # TOML takes JSON's values
    return f"[{name}]\n{''.join(lines)}"
