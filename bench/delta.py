"""The weight-delta codec on a real optimizer's steps, against the entropy of the changes and numpy's scan.

A Qwen3-like model of 54M parameters, random at first, takes AdamW steps (fp32 master weights, gradients of a
real forward and backward on random tokens) and publishes bf16. Bytes are compared with the entropy of
independent positions and steps, with the bf16 snapshot and with XOR + zstd-1; times with
`np.flatnonzero(base != new)` over the same tensors on the same cores, all variants taking turns.

    aspo bench delta --json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import zstandard
from transformers import Qwen3Config, Qwen3ForCausalLM

from aspo.weights.delta import (
    apply_delta,
    decode_delta,
    describe_delta,
    encode_delta,
    merge_deltas,
    state_check,
)

State = dict[str, torch.Tensor]
SNAPSHOT_EVERY = 10  # of the versions one is kept to jump from and to, and the last


def main(versions: int, jumps: int, rounds: int, lr: float) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # its threads would spin against those under measurement
    source = published(lr)
    live = copied(next(source))
    base, check = copied(live), state_check(live)
    nbytes = sum(tensor.nbytes for tensor in live.values())
    deltas: list[bytes] = []
    kept = {0: base}
    steps: list[dict[str, float]] = []
    for version, new in zip(range(1, versions + 1), source, strict=False):
        delta = encode_delta(base, new, base_check=check)
        steps.append(size_figures(base, new, delta, nbytes))
        apply_delta(live, delta, checked_base=check)
        require_equal(live, new)
        check = describe_delta(delta).new_check
        deltas.append(delta)
        previous, base = base, copied(new)
        if version % SNAPSHOT_EVERY == 0 or version == versions:
            kept[version] = base
    random.seed(0)
    jumped = [jump(kept, deltas, nbytes) for _ in range(jumps)]
    timed = {
        f"{n}_core": time_figures(previous, base, n, rounds) for n in (1, 2) if n <= (os.cpu_count() or 1)
    }
    return {
        "name": "delta",
        "process": "AdamW, real forward and backward on random tokens, fp32 master, bf16 published",
        "learning_rate": lr,
        "parameters": sum(tensor.numel() for tensor in live.values()),
        "snapshot_bytes": nbytes,
        "versions_identical": len(deltas),
        "steps": {"first": steps[0], "median": median_of(steps), "last": steps[-1]},
        "jumps": jumped,
        "xor_zstd1_bytes": {"last": len(xor_zstd(previous, base))},
        "seconds": timed,
    }


def make_model() -> Qwen3ForCausalLM:
    """A Qwen3-like model of 54M random parameters, its head tied to its embedding."""
    config = Qwen3Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.02,
        max_position_embeddings=512,
    )
    return Qwen3ForCausalLM(config)


def published(lr: float) -> Iterator[State]:
    """The bf16 weights before the first and after each optimizer step."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    while True:
        yield {name: weight.detach().to(torch.bfloat16) for name, weight in model.named_parameters()}
        tokens = torch.randint(model.config.vocab_size, (2, 32))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def size_figures(base: State, new: State, delta: bytes, nbytes: int) -> dict[str, float]:
    """Bytes of one delta against the entropy of its changes, taken as independent."""
    steps = [differences(base[name], new[name]) for name in base]
    changed = np.concatenate([step[step != 0] for step in steps])
    size = sum(step.size for step in steps)
    density = len(changed) / size
    _, counts = np.unique(changed, return_counts=True)
    limit = (
        size * entropy(np.array([density, 1 - density])) + len(changed) * entropy(counts / counts.sum())
    ) / 8
    return {
        "changed_fraction": density,
        "bytes": len(delta),
        "entropy_bytes": limit,
        "bytes_over_entropy": len(delta) / limit,
        "times_smaller": nbytes / len(delta),
    }


def jump(kept: dict[int, State], deltas: list[bytes], nbytes: int) -> dict[str, float]:
    """Go from one version to a later one by merged deltas and by a direct one; both must give its bits."""
    first, last = sorted(random.sample(sorted(kept), 2))
    started = time.perf_counter()
    merged = merge_deltas(deltas[first:last])
    seconds = time.perf_counter() - started
    direct = encode_delta(kept[first], kept[last])
    for delta in (merged, direct):
        require_equal(decode_delta(kept[first], delta), kept[last])
    return {
        "from": first,
        "to": last,
        "merged_bytes": len(merged),
        "direct_bytes": len(direct),
        "merged_over_sum": len(merged) / sum(map(len, deltas[first:last])),
        "times_smaller": nbytes / len(merged),
        "merge_seconds": seconds,
    }


def time_figures(base: State, new: State, cores: int, rounds: int) -> dict[str, Any]:
    """Medians in seconds on so many cores, and speeds as multiples of the scan's."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(allowed)[:cores]))  # threads started from here on inherit it
    old_check, new_check = state_check(base), state_check(new)
    forth, back = encode_delta(base, new), encode_delta(new, base)
    live = copied(base)

    def there_and_back(carried: bool, verify: bool = True) -> None:
        for delta, check in ((forth, old_check), (back, new_check)):
            apply_delta(live, delta, checked_base=check if carried else None, verify=verify, threads=cores)

    times = take_turns(
        {
            "scan": lambda: scan(base, new, cores),
            "encode": lambda: encode_delta(base, new, base_check=old_check, threads=cores),
            "encode_unchecked_base": lambda: encode_delta(base, new, threads=cores),
            "apply_twice": lambda: there_and_back(True),
            "apply_unverified_twice": lambda: there_and_back(True, verify=False),
            "apply_unchecked_base_twice": lambda: there_and_back(False),
            "decode": lambda: decode_delta(base, forth, threads=cores),
            "check": lambda: state_check(base, threads=cores),
            "xor_zstd1": lambda: xor_zstd(base, new),
        },
        rounds,
    )
    for name in ("apply_twice", "apply_unverified_twice", "apply_unchecked_base_twice"):
        times[name.replace("_twice", "")] = times.pop(name) / 2
    os.sched_setaffinity(0, allowed)
    return {"medians": times, "times_scan_speed": {name: times["scan"] / times[name] for name in times}}


def take_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all taking turns so that a neighbour's noise meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def scan(base: State, new: State, threads: int) -> None:
    """The peer: where two states differ, by numpy, tensor by tensor."""
    pairs = [(codes(base[name]), codes(new[name])) for name in base]
    if threads == 1:
        for old, other in pairs:
            np.flatnonzero(old != other)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda pair: np.flatnonzero(pair[0] != pair[1]), pairs))


def xor_zstd(base: State, new: State) -> bytes:
    """The other peer: all codes' XOR, compressed."""
    return zstandard.ZstdCompressor(level=1).compress(
        np.concatenate([codes(base[name]) ^ codes(new[name]) for name in base])
    )


def differences(old: torch.Tensor, new: torch.Tensor) -> np.ndarray:
    """Signed steps of the integer codes."""
    return (codes(new) - codes(old)).view(np.int16)


def codes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy().reshape(-1)


def entropy(shares: np.ndarray) -> float:
    return float(-(shares * np.log2(shares)).sum())


def require_equal(state: State, expected: State) -> None:
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint16), tensor.view(torch.uint16)), f"{name} differs"


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def median_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=100)
    parser.add_argument("--jumps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lr", type=float, default=1e-6)
    arguments = parser.parse_args()
    if min(arguments.versions, arguments.rounds) < 1:
        parser.error("--versions and --rounds must be at least 1")
    run = functools.partial(main, arguments.versions, arguments.jumps, arguments.rounds, arguments.lr)
    print(json.dumps(run()))
