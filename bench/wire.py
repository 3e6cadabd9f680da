"""The queue in the loop against bare redis-py, and the wire's codec against lists as JSON.

A real redis-server on loopback, four actors' processes that store while the learner's reads. Ours: one XADD a
group by `RolloutWriter`, read by `RolloutReader` and acknowledged behind a fence. The limit: redis-py's
pipelined XADD and XREADGROUP of the same payloads by as many processes, nothing else. By turns, medians.

    aspo bench wire --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES, TOKENS = 8, 1024
GROUPS, ACTORS = 512, 4
AT_ONCE = 64
_SPAWN = multiprocessing.get_context("spawn")
ARRAYS = {
    "prompt_ids": np.int32,
    "lengths": np.int32,
    "token_ids": np.int32,
    "behavior_logprobs": np.float32,
    "rewards": np.float32,
}


def make_group(seed: int) -> Any:
    """A rollout group of 8 x 1024 tokens."""
    from aspo.schemas import RolloutGroup, VersionSpan

    rng, total = np.random.default_rng(seed), SAMPLES * TOKENS
    return RolloutGroup(
        uid=f"bench:train:{seed}",
        actor="bench",
        purpose="train",
        temperature=1.0,
        prompt_ids=rng.integers(0, 32000, 64).astype(np.int32),
        lengths=np.full(SAMPLES, TOKENS, dtype=np.int32),
        token_ids=rng.integers(0, 32000, total).astype(np.int32),
        behavior_logprobs=-rng.random(total).astype(np.float32),
        rewards=rng.random(SAMPLES).astype(np.float32),
        failed=np.zeros(SAMPLES, dtype=bool),
        finish_reasons=("stop",) * SAMPLES,
        spans=tuple((VersionSpan("bench/1/0", TOKENS),) for _ in range(SAMPLES)),
    )


def write(url: str, actor: int) -> None:
    """A process that stores its share of the groups, our way or the bare one, whenever it is told to."""
    from aspo.codec import encode_group
    from aspo.queue import RolloutWriter, connect

    client = connect(url)
    payloads = [encode_group(make_group(seed)) for seed in range(GROUPS // ACTORS)]
    client.incr("ready")
    while run := client.blpop([f"go-{actor}"], timeout=0)[1].decode():
        if run == "bare":
            write_bare(client, payloads)
            continue
        writer = RolloutWriter(client, run, f"actor-{actor}")
        for index, payload in enumerate(payloads):
            writer.put(f"{run}:train:{actor}-{index}", payload)


def write_bare(client: Any, payloads: list[bytes]) -> None:
    for start in range(0, len(payloads), AT_ONCE):
        pipeline = client.pipeline(transaction=False)
        for payload in payloads[start : start + AT_ONCE]:
            pipeline.xadd("bare", {"group": payload})
        pipeline.execute()


def start(client: Any, run: str) -> float:
    """Have all actors begin; returns the moment."""
    for actor in range(ACTORS):
        client.rpush(f"go-{actor}", run)
    return time.perf_counter()


def bare(client: Any) -> float:
    """Seconds from the start to the last group's arrival, by pipelined XADD and XREADGROUP."""
    client.xgroup_create("bare", "g", id="0", mkstream=True)
    began, read = start(client, "bare"), 0
    while read < GROUPS:
        reply = client.xreadgroup("g", "c", {"bare": ">"}, count=AT_ONCE, block=1000)
        read += sum(len(entries) for _, entries in reply or [])
    return time.perf_counter() - began


def ours(client: Any, folder: Path, number: int) -> tuple[float, float]:
    """Seconds from the start to the last group's arrival by our queue, and for their acknowledgement."""
    from aspo.fence import Fence
    from aspo.queue import RolloutReader

    run, read = f"bench-{number}", []
    fence = Fence.acquire(client, run, folder / run)
    reader = RolloutReader(client, run, fence=fence)
    began = start(client, run)
    while len(read) < GROUPS:
        read += reader.read(count=AT_ONCE, block_ms=1000)
    moved = time.perf_counter()
    reader.acknowledge(read)
    acknowledged = time.perf_counter()
    fence.release()
    return moved - began, acknowledged - moved


def to_json(group: Any) -> bytes:
    """The peer: a group as most loops send it over HTTP, a JSON object of lists."""
    fields = {name: getattr(group, name).tolist() for name in ARRAYS}
    return json.dumps({"uid": group.uid} | fields).encode()


def from_json(payload: bytes) -> dict[str, Any]:
    """Arrays again, which is what a learner needs."""
    found = json.loads(payload)
    return {name: np.asarray(found[name], dtype=dtype) for name, dtype in ARRAYS.items()}


def codecs(rounds: int) -> dict[str, float]:
    """Microseconds a group for encoding and decoding, ours against lists as JSON; from arrays to arrays."""
    from aspo.codec import decode_group, encode_group

    group = make_group(0)
    pair: dict[str, Callable[[], Any]] = {
        "codec": lambda: decode_group(encode_group(group)),
        "json_lists": lambda: from_json(to_json(group)),
    }
    taken: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(rounds * 20):
        for name, call in pair.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    found = {f"{name}_us_per_group": seconds * 1e6 for name, seconds in medians.items()}
    return found | {"codec_to_json_lists": medians["json_lists"] / medians["codec"]}


def measure(url: str, folder: Path, rounds: int) -> dict[str, float]:
    from aspo.codec import encode_group
    from aspo.queue import connect

    client = connect(url)
    while int(client.get("ready") or 0) < ACTORS:
        time.sleep(0.05)
    size = sum(len(encode_group(make_group(seed))) for seed in range(GROUPS // ACTORS)) * ACTORS
    limit, moved, acknowledged = [], [], []
    for number in range(rounds + 1):
        client.flushall()
        limit.append(bare(client))
        client.flushall()
        seconds, acknowledging = ours(client, folder, number)
        moved.append(seconds)
        acknowledged.append(acknowledging)
    bare_seconds, our_seconds = statistics.median(limit[1:]), statistics.median(moved[1:])  # one to warm up
    return {
        "actors": ACTORS,
        "bytes_per_group": size / GROUPS,
        "bare_mb_per_second": size / bare_seconds / 1e6,
        "queue_mb_per_second": size / our_seconds / 1e6,
        "queue_to_bare": bare_seconds / our_seconds,
        "acknowledge_us_per_group": statistics.median(acknowledged) / GROUPS * 1e6,
    } | codecs(rounds)


def main() -> None:
    from aspo_cli.processes import free_port, redis_command, wait_for_port

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        folder, port = Path(scratch), free_port()
        with (folder / "redis.log").open("wb") as log:
            server = subprocess.Popen(redis_command(folder, port), stdout=log, stderr=log)
        try:
            assert wait_for_port(port, 10.0)
            url = f"redis://127.0.0.1:{port}/0"
            actors = [_SPAWN.Process(target=write, args=(url, actor), daemon=True) for actor in range(ACTORS)]
            for actor in actors:
                actor.start()
            print(json.dumps(measure(url, folder, rounds)))
            for actor in actors:
                actor.kill()
                actor.join()
        finally:
            server.terminate()
            server.wait(10)


if __name__ == "__main__":
    main()
