"""The fused log-prob head against log_softmax and gather: time and peak memory, forward and backward.

Both give log-probs and entropy of 2048 tokens and the gradients of the log-probs, hidden size 896, vocabulary
151,936, in fp32 on a CPU. By turns in one process, medians; the peak is the resident set's above what it was
before the call, of which the weight's gradient alone takes 519 MiB.

    aspo bench head --json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aspo_learner.head import token_logprobs_and_entropy

TOKENS, WIDTH, VOCABULARY = 2048, 896, 151_936
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def log_softmax_and_gather(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The peer: what most trainers do."""
    logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def resident(name: str) -> float:
    """The process's VmRSS (now) or VmHWM (peak), in MiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(head: Head) -> tuple[float, float]:
    """Seconds and peak MiB of one forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.05).requires_grad_()
    targets, slopes = torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.perf_counter()
    logprobs, _ = head(hidden, weight, targets)
    (logprobs * slopes).sum().backward()
    return time.perf_counter() - began, resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads: dict[str, Head] = {"fused": token_logprobs_and_entropy, "log_softmax": log_softmax_and_gather}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in heads}
    for _ in range(options.rounds):
        for name, head in heads.items():
            taken[name].append(measure(head))
    found: dict[str, float] = {"threads": options.threads}
    for name, rounds in taken.items():
        found[f"{name}_seconds"] = statistics.median(seconds for seconds, _ in rounds)
        found[f"{name}_peak_mib"] = max(peak for _, peak in rounds)
    found["time_ratio"] = found["fused_seconds"] / found["log_softmax_seconds"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
