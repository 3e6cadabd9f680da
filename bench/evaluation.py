"""What in-loop evaluation costs: tokens trained a second with it, at its defaults, against without.

Redis, learner and vLLM actor are the real processes, with the demo's model, problems and rewards; batches and
cadence are the defaults (64 prompts of 8 samples; every 20 steps 256 held-out prompts, greedy). The learning
rate is next to nothing, so that completions are of one length throughout. In one run periods with an
evaluation, which begins with the period, take turns with periods without; each of the former is compared with
its two neighbours.

    aspo bench evaluation --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from aspo.config import EvalConfig, LearnerConfig
from aspo_cli import demo_model
from aspo_cli.demo import service_of, write_config
from aspo_cli.processes import Processes


def run(folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Train for a period of warm-up, one without an evaluation and the pairs; gives the steps' metrics."""
    demo_model.write_problems(folder, seed=0)
    demo_model.make_model(folder / "initial-model", 0, lambda step, loss: None)
    write_config(folder, seed=0)
    overrides = [
        f"learner.steps={2 * arguments.every * (1 + arguments.pairs)}",
        f"learner.batch_prompts={arguments.batch}",
        f"learner.mini_batch_prompts={min(arguments.batch, LearnerConfig().mini_batch_prompts)}",
        "learner.epochs=1",
        "learner.learning_rate=1e-12",
        f"eval.every={2 * arguments.every}",
        f"eval.max_prompts={arguments.prompts}",
        f"eval.max_share={EvalConfig().max_share}",
        "eval.min_steps=1000000",  # never done early
    ]
    with Processes(folder / "logs") as parts:
        service_of(folder, overrides).start(parts)
        while not parts.finished("learner"):
            time.sleep(0.2)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rates(steps: Sequence[dict[str, float]], every: int) -> list[float]:
    """Tokens trained a second in each period of `every` steps but the first."""
    bounds = range(every - 1, len(steps), every)
    return [
        sum(step["tokens"] for step in steps[first + 1 : last + 1])
        / (steps[last]["seconds"] - steps[first]["seconds"])
        for first, last in pairwise(bounds)
    ]


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    steps = run(folder, arguments)
    found = rates(steps, arguments.every)
    bare, ours = found[::2], found[1::2]
    costs = [1 - rate / statistics.mean(around) for rate, around in zip(ours, pairwise(bare), strict=True)]
    trained = sum(step["tokens"] for step in steps[-arguments.every :])
    return {
        "name": "evaluation",
        "every": arguments.every,
        "max_prompts": arguments.prompts,
        "batch_prompts": arguments.batch,
        "tokens_per_second_with": ours,
        "tokens_per_second_without": bare,
        "evaluation_token_share": steps[-1]["evaluation_tokens"] / trained,
        "cost_each": costs,
        "cost": statistics.median(costs),
        "aim": 0.05,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=8, help="evaluations")
    parser.add_argument("--every", type=int, default=EvalConfig().every, help="steps between evaluations")
    parser.add_argument("--prompts", type=int, default=EvalConfig().max_prompts, help="of an evaluation")
    parser.add_argument("--batch", type=int, default=LearnerConfig().batch_prompts, help="prompts a step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), arguments)))
