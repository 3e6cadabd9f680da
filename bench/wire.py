"""The queue in the loop against bare redis-py, and the wire's codec against a pickled list.

A real redis-server on loopback. Ours: one XADD a group by `RolloutWriter` (with its registry entry), read by
`RolloutReader` as the learner does, and acknowledged behind a fence. The limit: redis-py's pipelined XADD and
XREADGROUP of the same payloads, nothing else. By turns, medians.

    aspo bench wire --json
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES, TOKENS = 8, 1024
GROUPS = 256
AT_ONCE = 64
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


def bare(client: Any, payloads: list[bytes]) -> float:
    """Seconds for pipelined XADD, then XREADGROUP, of all payloads."""
    client.delete("bare")
    client.xgroup_create("bare", "g", id="0", mkstream=True)
    began, read = time.perf_counter(), 0
    for start in range(0, len(payloads), AT_ONCE):
        pipeline = client.pipeline(transaction=False)
        for payload in payloads[start : start + AT_ONCE]:
            pipeline.xadd("bare", {"group": payload})
        pipeline.execute()
    while read < len(payloads):
        read += sum(len(e) for _, e in client.xreadgroup("g", "c", {"bare": ">"}, count=AT_ONCE))
    return time.perf_counter() - began


def ours(client: Any, folder: Path, payloads: list[bytes], number: int) -> tuple[float, float]:
    """Seconds for put and read of all payloads, and for their fenced acknowledgement."""
    from aspo.fence import Fence
    from aspo.queue import RolloutReader, RolloutWriter

    run = f"bench-{number}"
    fence = Fence.acquire(client, run, folder / run)
    writer, reader = RolloutWriter(client, run, "a"), RolloutReader(client, run, fence=fence)
    began, read = time.perf_counter(), []
    for index, payload in enumerate(payloads):
        writer.put(f"{run}:train:{index}", payload)
    while len(read) < len(payloads):
        read += reader.read(count=AT_ONCE)
    moved = time.perf_counter()
    reader.acknowledge(read)
    acknowledged = time.perf_counter()
    fence.release()
    return moved - began, acknowledged - moved


def to_pickled_lists(group: Any) -> bytes:
    """The peer: a group as most loops send it, a pickled dict of lists."""
    fields = {name: getattr(group, name) for name in ARRAYS}
    return pickle.dumps({"uid": group.uid} | {name: array.tolist() for name, array in fields.items()})


def from_pickled_lists(payload: bytes) -> dict[str, Any]:
    """Arrays again, which is what a learner needs."""
    found = pickle.loads(payload)  # noqa: S301 - its own data
    return {name: np.asarray(found[name], dtype=dtype) for name, dtype in ARRAYS.items()}


def codecs(rounds: int) -> dict[str, float]:
    """Microseconds a group for encoding and decoding, ours against pickled lists; from arrays to arrays."""
    from aspo.codec import decode_group, encode_group

    group = make_group(0)
    pair: dict[str, Callable[[], Any]] = {
        "codec": lambda: decode_group(encode_group(group)),
        "pickled_lists": lambda: from_pickled_lists(to_pickled_lists(group)),
    }
    taken: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(rounds * 20):
        for name, call in pair.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    found = {f"{name}_us_per_group": statistics.median(times) * 1e6 for name, times in taken.items()}
    return found | {
        "codec_to_pickled_lists": statistics.median(taken["pickled_lists"])
        / statistics.median(taken["codec"])
    }


def measure(url: str, folder: Path, rounds: int) -> dict[str, float]:
    from aspo.codec import encode_group
    from aspo.queue import connect

    client = connect(url)
    payloads = [encode_group(make_group(seed)) for seed in range(GROUPS)]
    size, limit, moved, acknowledged = sum(map(len, payloads)), [], [], []
    for number in range(rounds):
        limit.append(bare(client, payloads))
        seconds, acknowledging = ours(client, folder, payloads, number)
        moved.append(seconds)
        acknowledged.append(acknowledging)
        client.flushall()
    return {
        "bytes_per_group": size / GROUPS,
        "bare_mb_per_second": size / statistics.median(limit) / 1e6,
        "queue_mb_per_second": size / statistics.median(moved) / 1e6,
        "queue_to_bare": statistics.median(limit) / statistics.median(moved),
        "acknowledge_us_per_group": statistics.median(acknowledged) / GROUPS * 1e6,
    } | codecs(rounds)


def main() -> None:
    from aspo_cli.processes import free_port, redis_command, wait_for_port

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        folder, port = Path(scratch), free_port()
        with (folder / "redis.log").open("wb") as log:
            server = subprocess.Popen(redis_command(folder, port), stdout=log, stderr=log)
        try:
            assert wait_for_port(port, 10.0)
            print(json.dumps(measure(f"redis://127.0.0.1:{port}/0", folder, rounds)))
        finally:
            server.terminate()
            server.wait(10)


if __name__ == "__main__":
    main()
