"""What many actors cost the learner: 1 to 1000 simulated ones that long-poll and pull every delta.

A learner process trains a small model for real and publishes deltas of the size that `--delta-bytes` says
(random bytes: nothing looks into them); its training thread has a core to itself, its HTTP thread and the
simulated actors share the others. The time of a training step with actors is held against steps without any,
by turns. With `--relays`, the actors follow relays, and only those the learner. With `--elsewhere` they
follow a process that has nothing to do with the training: what the step grows by then is the machine's doing,
for the actors, and their memory traffic, are on the same one.

    aspo bench fanout --json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

STEP_SHAPE = (1024, 512)
STEP_LAYERS = 8
STEP_S = 1.3


def learner(folder: Path, pipe: Connection, delta_bytes: int, alone: bool = False) -> None:
    """Train and publish; on a message (steps, publish) answer the seconds of each step.

    `alone` publishes every `STEP_S` seconds and does not train.
    """
    from prometheus_client import CollectorRegistry

    from aspo.config import AuthConfig
    from aspo.http import Server, create_app, listen
    from aspo.weights.leases import Leases
    from aspo.weights.server import blob_routes, weight_routes
    from aspo.weights.store import WeightStore

    leases, auth = Leases(), AuthConfig()
    store = WeightStore(folder, leased=leases.versions)
    app = create_app("bench", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, leases))
    app.include_router(blob_routes(store.blobs))
    training_core = leave_a_core()  # inherited by the HTTP thread
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        if not alone:
            os.sched_setaffinity(0, {training_core})  # this thread: the training
        pipe.send(server.url)
        for number in itertools.count() if alone else ():
            publish_random(store, number, delta_bytes)
            time.sleep(STEP_S)
        serve_steps(pipe, store, delta_bytes, leases)


def leave_a_core() -> int:
    """Keep off the first core, which is the training's; gives its number."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[1:]) or set(cores))
    return cores[0]


def serve_steps(pipe: Connection, store: Any, delta_bytes: int, leases: Any) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(STEP_SHAPE[1], STEP_SHAPE[1]) for _ in range(STEP_LAYERS)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    batch, number = torch.randn(STEP_SHAPE), 0
    publish_random(store, number, delta_bytes)
    while (steps := pipe.recv()) is not None:
        taken = []
        for _ in range(steps):
            number += 1
            publish_random(store, number, delta_bytes)
            began = time.perf_counter()
            for _ in range(10):
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            taken.append(time.perf_counter() - began)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        pipe.send({"seconds": taken, "memory_mib": memory, "clients": len(leases.clients())})


def publish_random(store: Any, number: int, delta_bytes: int) -> None:
    """Announce a version by a transfer of random bytes, as large as a delta."""
    from aspo.schemas import PolicyVersion
    from aspo.weights.manifest import Manifest, TensorInfo, Transfer, config_digest, state_digest

    tensors = tuple(
        TensorInfo(f"model.layers.{i}.weight", "BF16", (512, 512), os.urandom(32).hex()) for i in range(134)
    )
    base = f"bench/1/{number - 1}" if number else None
    blob = store.blobs.put(os.urandom(delta_bytes))
    manifest = Manifest(
        version=f"bench/1/{number}",
        parent=base,
        state_digest=state_digest(tensors),
        config_digest=config_digest({}),
        tensors=tensors,
        files={},
    )
    store.adopt(manifest, [Transfer(version=manifest.version, base=base, blobs=(blob,))])
    store.promote(PolicyVersion.parse(manifest.version))


def actors(urls: list[str], count: int, pipe: Connection) -> None:
    """Follow with `count` clients until told to stop; answers how many deltas each pulled, and how late."""
    leave_a_core()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    asyncio.run(follow_all(urls, count, pipe))


async def follow_all(urls: list[str], count: int, pipe: Connection) -> None:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
        pulled = [0] * count
        jobs = [asyncio.create_task(follow(session, urls[i % len(urls)], i, pulled)) for i in range(count)]
        while not all(pulled):  # noqa: ASYNC110 - a thousand events would be no clearer
            await asyncio.sleep(0.05)
        before = sum(pulled)
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        pipe.send((sum(pulled) - before) / count)
        for job in jobs:
            job.cancel()


async def follow(session: Any, url: str, number: int, pulled: list[int]) -> None:
    have = ""
    while True:
        query = f"wait=30&client=a{number}" + (f"&have={have}" if have else "")
        async with session.get(f"{url}/v1/weights/latest?{query}") as response:
            if response.status != 200:
                continue
            plan = await response.json()
        for transfer in plan["transfers"][-1:] if not have else plan["transfers"]:
            for blob in transfer["blobs"]:
                async with session.get(f"{url}/v1/blobs/{blob['digest']}") as response:
                    async for _ in response.content.iter_any():
                        pass
        have = plan["manifest"]["version"]
        pulled[number] += 1


def relay(url: str, folder: Path, pipe: Connection) -> None:
    from aspo.config import AuthConfig, HttpConfig
    from aspo.http import url_of
    from aspo.weights.relay import Relay

    leave_a_core()
    found = Relay(url, folder, AuthConfig(), HttpConfig())
    pipe.send(url_of(found.place.listener))
    asyncio.run(found.run())


def start(target: Any, *arguments: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    return process, mine


def measure(
    folder: Path, counts: list[int], relays: int, elsewhere: bool, rounds: int, steps: int, size: int
) -> list[Any]:
    process, pipe = start(learner_last, folder / "learner", size, False)
    url, helpers, urls = pipe.recv(), [], []
    try:
        if elsewhere:
            helper, channel = start(learner_last, folder / "elsewhere", size, True)
            helpers.append(helper)
            urls.append(channel.recv())
        for number in range(relays):
            helper, channel = start(relay, url, folder / f"relay-{number}")
            helpers.append(helper)
            urls.append(channel.recv())
        return [one_count(pipe, urls or [url], count, rounds, steps) for count in counts]
    finally:
        for helper in (process, *helpers):
            helper.kill()


def learner_last(folder: Path, delta_bytes: int, alone: bool, pipe: Connection) -> None:
    learner(folder, pipe, delta_bytes, alone)


def one_count(pipe: Connection, urls: list[str], count: int, rounds: int, steps: int) -> dict[str, Any]:
    quiet, busy, pulls, memory, clients = [], [], [], 0.0, 0
    for _ in range(rounds):
        pipe.send(steps)
        quiet += pipe.recv()["seconds"]
        process, channel = start(actors, urls, count)
        channel.recv()
        pipe.send(steps)
        answer = pipe.recv()
        channel.send("stop")
        pulls.append(channel.recv() / steps)
        process.join()
        busy += answer["seconds"]
        memory, clients = answer["memory_mib"], answer["clients"]
    return {
        "actors": count,
        "step_seconds_alone": statistics.median(quiet),
        "step_seconds": statistics.median(busy),
        "growth": statistics.median(busy) / statistics.median(quiet) - 1,
        "deltas_per_actor_and_version": statistics.mean(pulls),
        "learner_memory_mib": memory,
        "learner_clients": clients,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 10, 100, 200, 1000])
    parser.add_argument("--relays", type=int, default=0)
    parser.add_argument("--elsewhere", action="store_true", help="have the actors follow another process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--delta-bytes", type=int, default=650_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        rows = measure(
            Path(scratch),
            options.actors,
            options.relays,
            options.elsewhere,
            options.rounds,
            options.steps,
            options.delta_bytes,
        )
    print(json.dumps({"relays": options.relays, "delta_bytes": options.delta_bytes, "rows": rows}))


if __name__ == "__main__":
    main()
