"""Actor throughput in the loop against the same engine alone, on the demo's task.

Alternates, in one run and with one vLLM engine: `alone`, the engine fed directly with the training prompts;
`worker`, the real worker (Redis, rewards, encoding) while the learner is paused; and `loop`, the same while
a real learner trains on what it sends and its weights are applied in flight. All keep the same number of
samples in flight and count the tokens of finished groups over windows of equal length. `loop` against
`worker` is what the updates cost, and the cores that the learner takes where there are too few of them.

    aspo bench actor --json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from aspo.config import Config, load_config
from aspo.queue import connect
from aspo.weights.client import WeightClient, export
from aspo_actor.engine import RolloutEngine
from aspo_actor.rewards.scorer import Scorer
from aspo_actor.weight_sync import WeightSync
from aspo_actor.worker import Worker
from aspo_cli import demo_model
from aspo_cli.demo import write_config
from aspo_cli.processes import Processes, redis_command, wait_for_port
from aspo_learner.data import PromptReader, load_prompts
from aspo_learner.policy import load_tokenizer

RAMP_S = 1.5
# Enough tasks outstanding that the actor never waits for the learner.
OVERRIDES = ["learner.max_staleness=200", "learner.steps=100000"]


async def main(rounds: int, window_s: float, niceness: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch, Processes(Path(scratch) / "logs") as parts:
        folder = Path(scratch) / "bench"
        folder.mkdir()
        demo_model.write_problems(folder, seed=0)
        demo_model.make_model(folder / "initial-model", 0, lambda step, loss: None)
        ports = write_config(folder, seed=0, evaluate=False)
        parts.start("redis", redis_command(folder / "redis", ports["redis_port"]))
        wait_for_port(ports["redis_port"], 10)
        flags = [part for override in OVERRIDES for part in ("--set", override)]
        learner = [sys.executable, "-m", "aspo_cli", "learner", "--config", str(folder / "config.toml")]
        parts.start("learner", ["nice", "-n", str(niceness), *learner, *flags])
        config = load_config(folder / "config.toml", OVERRIDES)
        return {"learner_niceness": niceness} | await measure(config, folder, rounds, window_s)


async def measure(config: Config, folder: Path, rounds: int, window_s: float) -> dict[str, Any]:
    async with WeightClient(config.actor.learner_url, folder / "blobs") as client:
        plan = await client.latest(wait_s=30)
        assert plan is not None, "the learner published nothing"
        mirror = await export(client, plan, folder / "model")
        engine = await RolloutEngine.start(
            folder / "model", config.model.dtype, config.actor.engine, version=plan.manifest.version
        )
        figures: dict[str, list[float]] = {"alone": [], "worker": [], "loop": []}
        with Scorer(config.reward, config.data.reward_columns) as scorer:
            sync = WeightSync(client, engine, mirror, folder)
            following = asyncio.create_task(sync.run())
            for _ in range(rounds):
                await post(config, "pause")
                await asyncio.sleep(1.0)
                figures["alone"].append(await alone(config, engine, folder, window_s))
                figures["worker"].append(await loop(config, engine, scorer, sync, window_s))
                await post(config, "resume")
                figures["loop"].append(await loop(config, engine, scorer, sync, window_s))
            following.cancel()
        await engine.close()
    medians = {name: statistics.median(rates) for name, rates in figures.items()}
    return {
        "name": "actor",
        "cores": os.cpu_count(),
        "rounds": rounds,
        "window_seconds": window_s,
        "tokens_per_second": figures,
        "medians": medians,
        "worker_over_alone": medians["worker"] / medians["alone"],
        "loop_over_alone": medians["loop"] / medians["alone"],
        "weight_updates": sync.stats.syncs,
        "pause_seconds_last": sync.stats.pause_seconds,
    }


async def alone(config: Config, engine: RolloutEngine, folder: Path, window_s: float) -> float:
    """Tokens per second of the engine fed directly, as many samples in flight as the worker keeps."""
    tokenizer = load_tokenizer(config.model.path)
    prompts = itertools.cycle(
        load_prompts(PromptReader(config.data, config.data.mixture[0], tokenizer, room=64))
    )
    sampling = config.sampling
    done = 0

    async def feed() -> None:
        nonlocal done
        while True:
            group = await engine.sample(
                next(prompts).token_ids,
                n=sampling.group_size,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
            )
            done += sum(len(completion.token_ids) for completion in group)

    places = config.actor.engine.max_num_seqs // sampling.group_size + 1
    feeders = [asyncio.create_task(feed()) for _ in range(places)]
    rate = await rate_over(lambda: done, window_s)
    for feeder in feeders:
        feeder.cancel()
    await asyncio.gather(*feeders, return_exceptions=True)
    return rate


async def loop(
    config: Config, engine: RolloutEngine, scorer: Scorer, sync: WeightSync, window_s: float
) -> float:
    """Tokens per second of the real worker, the learner training on what it sends."""
    worker = Worker(config, "bench", connect(config.redis.url), engine, scorer, sync)
    working = asyncio.create_task(worker.run())
    rate = await rate_over(lambda: worker.tokens, window_s)
    await worker.drain(30.0)
    await working
    return rate


async def rate_over(count: Callable[[], int], window_s: float) -> float:
    """Growth per second of a counter over a window that starts after the ramp."""
    await asyncio.sleep(RAMP_S)
    before, started = count(), time.monotonic()
    await asyncio.sleep(window_s)
    return (count() - before) / (time.monotonic() - started)


async def post(config: Config, verb: str) -> None:
    """Pause or resume the learner."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{config.actor.learner_url}/v1/{verb}") as response,
    ):
        response.raise_for_status()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=8.0, help="seconds")
    parser.add_argument("--learner-niceness", type=int, default=0, help="19 leaves the actor all it wants")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(main(arguments.rounds, arguments.window, arguments.learner_niceness))))
