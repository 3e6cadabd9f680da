"""From the end of a learner's step to the first token of the new version, against saving and reloading.

A learner process (54M parameters, fp32 master, AdamW, bf16 published) takes a step and publishes; this
process runs the real vLLM engine under load and follows over loopback HTTP. Then, with the same engine and
load, a step's weights go the usual way: `save_pretrained`, then vLLM's own `reload_weights` from that folder.
Both end when a request made after the update has given its token. Once, too, a new engine is started on the
saved folder, which is what an engine without in-flight updates needs.

    aspo bench publish --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

LEARNING_RATE = 1e-6


def save_model(folder: Path) -> None:
    """Write the delta benchmark's model as bf16, with the demo's tokenizer."""
    import torch
    from delta import make_model

    from aspo_cli.demo_model import make_tokenizer

    torch.manual_seed(0)
    make_model().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def learner(folder: Path, pipe: Connection) -> None:
    """Serve versions; on `publish` and on `save` take a step, answer its end, and send it either way."""
    import torch
    from prometheus_client import CollectorRegistry

    from aspo.config import AuthConfig, ModelConfig
    from aspo.http import Server, create_app, listen
    from aspo.weights.leases import Leases
    from aspo.weights.server import blob_routes, weight_routes
    from aspo.weights.store import WeightStore
    from aspo_learner.policy import Policy
    from aspo_learner.publisher import Publisher

    torch.set_num_threads(1)
    policy = Policy(ModelConfig(path=str(folder / "model"), dtype="bfloat16"), torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, foreach=True)
    leases, auth = Leases(), AuthConfig()
    store = WeightStore(folder / "weights", leased=leases.versions)
    publisher = Publisher(store, policy, "bench", epoch=1)
    app = create_app("bench", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, leases))
    app.include_router(blob_routes(store.blobs))
    ids = torch.randint(policy.vocab_size, (2, 64))
    announced: list[float] = []
    store.on_move(lambda: announced.append(time.monotonic()))

    def step() -> float:
        policy.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.monotonic()

    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        publisher.publish(0)
        publisher.wait()
        pipe.send(server.url)
        for number in range(1, 10_000):
            if pipe.recv() == "publish":
                pipe.send(step())
                publisher.publish(number)
                publisher.wait()
                pipe.send((publisher.metrics, announced[-1]))
            else:
                pipe.send(step())
                copy = type(policy.model)(policy.model.config).to(torch.bfloat16)
                copy.load_state_dict(policy.model.state_dict())
                began = time.monotonic()
                copy.save_pretrained(folder / "saved")
                pipe.send(began)


async def measure(folder: Path, pipe: Connection, rounds: int, load: int) -> dict[str, Any]:
    from aspo.config import EngineConfig
    from aspo.weights.client import WeightClient, export
    from aspo_actor.engine import RolloutEngine
    from aspo_actor.weight_sync import WeightSync

    async with WeightClient(await asyncio.to_thread(pipe.recv), folder / "cache", name="a") as client:
        plan = await client.latest(wait_s=30)
        assert plan is not None
        mirror = await export(client, plan, folder / "engine")
        settings = EngineConfig(max_num_seqs=load + 2, max_model_len=512, cpu_kv_cache_gib=0.5)
        engine = await RolloutEngine.start(folder / "engine", "bfloat16", settings, version="bench/1/0")
        sync = WeightSync(client, engine, mirror, folder)
        loading = [asyncio.create_task(keep_sampling(engine)) for _ in range(load)]
        published = [await publish_once(pipe, sync, engine, client) for _ in range(rounds)]
        reloaded = [await reload_once(folder, pipe, engine) for _ in range(rounds)]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await engine.close()
        restarted = await restart(folder, settings)
    return figures(published[1:], reloaded[1:], restarted, sync.stats.patches)


async def keep_sampling(engine: Any) -> None:
    while True:
        await engine.sample([1, 2, 3, 4, 5, 6, 7, 8], n=1, max_tokens=256, temperature=1.0)


async def publish_once(pipe: Connection, sync: Any, engine: Any, client: Any) -> dict[str, float]:
    before = engine.version
    pipe.send("publish")
    following = asyncio.create_task(sync.sync_once(wait_s=60))
    ended = await asyncio.to_thread(pipe.recv)
    await following
    live = sync.stats.live_at
    metrics, stored = await asyncio.to_thread(pipe.recv)
    timings = sync.stats.timings
    assert engine.version != before
    return {
        "seconds": live - ended,
        "paused": sync.stats.pause_seconds,
        "pull": sync.stats.pull_seconds,
        "apply": sync.stats.apply_seconds,
        "stored": stored - ended,
        "stage": timings.check_s,
        "to_pause": timings.pause_s,
        "write": timings.apply_s,
        "probe": timings.probe_s,
        "bytes": client.stats.last_bytes,
        "changed": metrics["weights_changed_fraction"],
    }


async def reload_once(folder: Path, pipe: Connection, engine: Any) -> dict[str, float]:
    """What one does without a weight plane: save, and have vLLM read it all again."""
    pipe.send("save")
    await asyncio.to_thread(pipe.recv)
    began = await asyncio.to_thread(pipe.recv)
    pausing = time.monotonic()
    await engine.client.pause_generation(mode="keep", clear_cache=False)
    paused = time.monotonic()
    await engine.client.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "saved")})
    await engine.client.resume_generation()
    resumed = time.monotonic()
    await engine.score([1, 2, 3, 4, 5, 6, 7, 8])
    return {"seconds": time.monotonic() - began, "paused": resumed - paused, "to_pause": paused - pausing}


async def restart(folder: Path, settings: Any) -> float:
    """Seconds from the start of a new engine on the saved folder to its first token."""
    from aspo_actor.engine import RolloutEngine

    (folder / "saved" / "tokenizer.json").write_bytes((folder / "model" / "tokenizer.json").read_bytes())
    began = time.monotonic()
    engine = await RolloutEngine.start(folder / "saved", "bfloat16", settings, version="bench/1/0")
    ready = time.monotonic() - began
    await engine.close()
    return ready


def figures(
    published: list[dict[str, float]], reloaded: list[dict[str, float]], restarted: float, patches: int
) -> dict[str, Any]:
    def median(rows: list[dict[str, float]], name: str) -> float:
        return statistics.median(row[name] for row in rows)

    found: dict[str, Any] = {f"publish_{name}": median(published, name) for name in published[0]}
    found |= {f"reload_{name}": median(reloaded, name) for name in reloaded[0]}
    return found | {
        "reload_to_publish": found["reload_seconds"] / found["publish_seconds"],
        "restart_seconds": restarted,
        "restart_to_publish": restarted / found["publish_seconds"],
        "paused_share": found["publish_paused"] / found["publish_seconds"],
        "updates": len(published),
        "patches": patches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--load", type=int, default=2, help="sequences being sampled meanwhile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        folder = Path(scratch)
        save_model(folder / "model")
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=learner, args=(folder, theirs), daemon=True)
        process.start()
        try:
            print(json.dumps(asyncio.run(measure(folder, mine, arguments.rounds, arguments.load))))
        finally:
            process.kill()


if __name__ == "__main__":
    main()
