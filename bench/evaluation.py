"""What in-loop evaluation costs: tokens trained a second with it, at its defaults, against without.

Redis, learner and vLLM actor are the real processes, with the demo's model, problems and rewards; batches and
cadence are the defaults (64 prompts of 8 samples; every 20 steps 256 held-out prompts, greedy). The learning
rate is next to nothing, so that completions are of one length throughout. Runs with and without take turns;
of each, whole periods of the evaluation count, after a warm-up.

    aspo bench evaluation --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aspo.config import EvalConfig, LearnerConfig
from aspo_cli import demo_model
from aspo_cli.demo import service_of, write_config
from aspo_cli.processes import Processes

WARM_UP_STEPS = 10  # half a period at the defaults: an evaluation that begins then also ends in it


def run(folder: Path, problems: Path, evaluate: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens trained a second, seconds a step and the evaluation's tokens a step, of one run."""
    folder.mkdir()
    for name in ("initial-model", "train.jsonl", "held_out.jsonl"):
        (folder / name).symlink_to(problems / name)
    write_config(folder, seed=0, evaluate=evaluate)
    measured = arguments.periods * arguments.every
    overrides = [
        f"learner.steps={WARM_UP_STEPS + measured}",
        f"learner.batch_prompts={arguments.batch}",
        f"learner.mini_batch_prompts={min(arguments.batch, LearnerConfig().mini_batch_prompts)}",
        "learner.epochs=1",
        "learner.learning_rate=1e-12",
    ]
    if evaluate:
        default = EvalConfig()
        overrides += [
            f"eval.every={arguments.every}",
            f"eval.max_prompts={arguments.prompts}",
            f"eval.max_share={default.max_share}",
            "eval.min_steps=1000000",  # never done early
        ]
    with Processes(folder / "logs") as parts:
        service_of(folder, overrides).start(parts)
        while not parts.finished("learner"):
            time.sleep(0.2)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    window = steps[WARM_UP_STEPS:]
    seconds = window[-1]["seconds"] - steps[WARM_UP_STEPS - 1]["seconds"]
    tokens = sum(step["tokens"] for step in window)
    spent = window[-1].get("evaluation_tokens", 0.0) * arguments.periods
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_per_step": seconds / len(window),
        "evaluation_token_share": spent / tokens,
    }


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    problems = folder / "problems"
    problems.mkdir()
    demo_model.write_problems(problems, seed=0)
    demo_model.make_model(problems / "initial-model", 0, lambda step, loss: None)
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(arguments.rounds):
        for evaluate in (True, False) if number % 2 else (False, True):
            name = "with" if evaluate else "without"
            figures = run(folder / f"{name}-{number}", problems, evaluate, arguments)
            found[evaluate].append(figures)
            print(f"round {number + 1}, {name}: {figures}", file=sys.stderr)
    rates = {kind: [one["tokens_per_second"] for one in runs] for kind, runs in found.items()}
    costs = [1 - ours / bare for ours, bare in zip(rates[True], rates[False], strict=True)]
    return {
        "name": "evaluation",
        "every": arguments.every,
        "max_prompts": arguments.prompts,
        "batch_prompts": arguments.batch,
        "tokens_per_second_with": rates[True],
        "tokens_per_second_without": rates[False],
        "evaluation_token_share": statistics.median(one["evaluation_token_share"] for one in found[True]),
        "cost_each_round": costs,
        "cost": statistics.median(costs),
        "aim": 0.05,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--periods", type=int, default=2, help="evaluations a run")
    parser.add_argument("--every", type=int, default=EvalConfig().every, help="steps between evaluations")
    parser.add_argument("--prompts", type=int, default=EvalConfig().max_prompts, help="of an evaluation")
    parser.add_argument("--batch", type=int, default=LearnerConfig().batch_prompts, help="prompts a step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), arguments)))
