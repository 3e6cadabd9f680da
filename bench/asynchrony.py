"""What asynchrony pays: training steps a second at the default max_staleness against max_staleness = 0.

The learner, Redis and their queues are the real processes, with the demo's model (without its warm start,
for nothing here depends on what it says), problems and config (32 prompts of 8 samples a batch, trained on
twice, one learner thread); so are the actor's worker (claims, leases, storing) and
the verified weights that it pulls for every version. Only the engine is simulated: a group takes a fixed time
in which nothing is computed, a batch of groups at once, and its completions are the teacher's demonstrations,
half of them rewarded. That latency is the learner's own pace: the seconds a step takes in a first run whose
engine answers at once. So a synchronous run pays for step and sampling one after the other, an asynchronous
one for both at a time; twice the steps is the most there can be.

Both kinds take turns, each run with a learner of its own; the first steps of a run are left out.

    aspo bench asynchrony --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aspo.config import Config, load_config
from aspo.queue import connect
from aspo.schemas import PolicyVersion, VersionSpan
from aspo.weights.client import Mirror, VersionGone, WeightClient
from aspo.weights.manifest import WeightsError
from aspo_actor.completion import Completion
from aspo_actor.rewards.calls import Answers
from aspo_actor.rewards.scorer import Scores
from aspo_actor.worker import Worker
from aspo_cli import demo_model
from aspo_cli.demo import write_config
from aspo_cli.demo_task import EOS, demonstrate
from aspo_cli.processes import Processes, redis_command, wait_for_port
from aspo_learner.policy import load_tokenizer

WARM_UP_STEPS = 4


class SimulatedEngine:
    """Answers with demonstrations after a fixed time, under the version that was last pulled."""

    healthy, recoverable = True, False

    def __init__(self, model: str, latency_s: float, version: str) -> None:
        self._tokenizer, self._latency_s, self.version = load_tokenizer(model), latency_s, version
        self._random = random.Random(0)

    async def sample(self, prompt_ids: Sequence[int], *, n: int, **_: Any) -> list[Completion]:
        """`n` completions of a prompt."""
        version = self.version
        await asyncio.sleep(self._latency_s)
        prompt = self.text_of(prompt_ids)
        return [self._completion(prompt, version) for _ in range(n)]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Decode tokens."""
        text: str = self._tokenizer.decode(token_ids)
        return text

    def _completion(self, prompt: str, version: str) -> Completion:
        text = demonstrate(prompt, self._random, forget=demo_model.FORGET)
        tokens = np.array(self._tokenizer(text + EOS)["input_ids"], dtype=np.int32)
        logprobs = np.full(len(tokens), -0.1, dtype=np.float32)
        return Completion(tokens, logprobs, (VersionSpan(version, len(tokens)),), "stop", text)


class HalfRight:
    """Scores every other sample 1, so that each group teaches something."""

    async def score(self, answers: Answers) -> Scores:
        """Rewards of a group."""
        rewards = (np.arange(len(answers.completions)) % 2).astype(np.float32)
        return Scores(rewards, np.zeros(len(rewards), dtype=bool), {})


class Follower:
    """Pulls and verifies every version as an actor does; the simulated engine then has it."""

    def __init__(self, client: WeightClient, mirror: Mirror, engine: SimulatedEngine) -> None:
        self._client, self._mirror, self._engine = client, mirror, engine
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            with contextlib.suppress(VersionGone):
                plan = await self._client.latest(have=self._mirror.version, wait_s=20)
                if plan is None:
                    continue
                self._engine.version = (await self._mirror.follow(plan)).version
                async with self._moved:
                    self._moved.notify_all()

    async def wait_for(self, version: str) -> None:
        """Wait until `version` or a newer one is there."""
        wanted = PolicyVersion.parse(version)
        async with self._moved:
            await self._moved.wait_for(lambda: PolicyVersion.parse(self._engine.version) >= wanted)


async def act(config: Config, folder: Path, latency_s: float) -> None:
    """Be the actor of a run, until cancelled."""
    async with WeightClient(config.actor.learner_url, folder / "blobs", name="simulated") as client:
        plan = await client.latest(wait_s=60)
        assert plan is not None, "the learner published nothing"
        mirror = Mirror(client)
        version = (await mirror.follow(plan)).version
        engine = SimulatedEngine(config.model.path, latency_s, version)
        follower = Follower(client, mirror, engine)
        following = asyncio.create_task(follower.run())
        worker: Any = Worker(config, "simulated", connect(config.redis.url), engine, HalfRight(), follower)  # type: ignore[arg-type]
        try:
            await worker.run()
        finally:
            following.cancel()


def run(folder: Path, problems: Path, max_staleness: int | None, latency_s: float, steps: int) -> float:
    """Seconds a step takes, the median of one run past its warm-up."""
    folder.mkdir()
    for name in ("initial-model", "train.jsonl"):
        (folder / name).symlink_to(problems / name)
    ports = write_config(folder, seed=0, evaluate=False)
    overrides = [f"learner.steps={steps + WARM_UP_STEPS}", "actor.max_samples=256"]
    if max_staleness is not None:
        overrides.append(f"learner.max_staleness={max_staleness}")
    config = load_config(folder / "config.toml", overrides)
    flags = [part for override in overrides for part in ("--set", override)]
    with Processes(folder / "logs") as parts:
        parts.start("redis", redis_command(folder / "redis", ports["redis_port"]))
        wait_for_port(ports["redis_port"], 10)
        learner = [sys.executable, "-m", "aspo_cli", "learner", "--config", str(folder / "config.toml")]
        parts.start("learner", [*learner, *flags])
        wait_for_port(ports["learner_port"], 60)
        asyncio.run(act_until_done(parts, config, folder, latency_s))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    ended = [json.loads(line)["seconds"] for line in lines[WARM_UP_STEPS - 1 :]]
    return (ended[-1] - ended[0]) / (len(ended) - 1)


async def act_until_done(parts: Processes, config: Config, folder: Path, latency_s: float) -> None:
    acting = asyncio.create_task(act(config, folder, latency_s))
    while not await asyncio.to_thread(parts.finished, "learner"):
        if acting.done():
            acting.result()
        await asyncio.sleep(0.2)
    acting.cancel()
    with contextlib.suppress(asyncio.CancelledError, WeightsError):
        await acting


def measure(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    problems = folder / "problems"
    problems.mkdir()
    demo_model.write_problems(problems, seed=0)
    recipe = dataclasses.replace(demo_model.DEMO, steps=0)  # it is never sampled from
    demo_model.make_model(problems / "initial-model", 0, lambda step, loss: None, recipe)
    latency_s = run(folder / "pace", problems, None, 0.0, steps)
    seconds: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    for number in range(rounds):
        for name, max_staleness in (("asynchronous", None), ("synchronous", 0)):
            took = run(folder / f"{name}-{number}", problems, max_staleness, latency_s, steps)
            seconds[name].append(took)
            print(f"round {number + 1}: {name} {took:.2f} s a step", file=sys.stderr)
    pairs = zip(seconds["synchronous"], seconds["asynchronous"], strict=True)
    return {
        "name": "asynchrony",
        "rounds": rounds,
        "steps": steps,
        "latency_seconds": latency_s,
        "seconds_per_step": seconds,
        "steps_per_second": {name: 1 / statistics.median(taken) for name, taken in seconds.items()},
        "asynchronous_over_synchronous": statistics.median(slow / fast for slow, fast in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        print(json.dumps(measure(Path(scratch), options.rounds, options.steps)))


if __name__ == "__main__":
    main()
