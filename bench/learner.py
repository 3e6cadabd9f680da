"""The learner alone: what a training step takes, and how near that is to what the device can do.

`Trainer.train_step` and `Publisher.publish` on the same batch of groups over and over, on a Qwen3 of random
weights; nothing is generated, and no rollout is waited for: `wait` is for the version before to be stored.
Completions have log-normal lengths (median 128 by default, cut to 8 to --longest), prompts 16 to 64 tokens.

- tokens/s: real ones, prompts and completions, over whole steps, publishing included; the median of --rounds.
- MFU: the floating-point operations that the mathematics takes (forward and backward of the linear layers,
  causal attention within each sequence, the head for completions alone; nothing that is computed again),
  over whole steps, against a large square product in the same type, just before.
- the split: of one more step, in which the device is waited for at the ends of every part.
- memory: what the learner predicts before it loads, and what it came to (on a CPU of the whole process).

    aspo bench learner --json
    aspo bench learner --json --model 1.5B --micro-batch-tokens 4096      # a GPU, bf16
    aspo bench learner --trace step.json                                  # for chrome://tracing or Perfetto
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aspo.config import Config, load_config
from aspo.schemas import RolloutGroup, VersionSpan
from aspo.weights.store import WeightStore
from aspo_cli.demo_model import make_tokenizer
from aspo_learner.forecast import uses_bf16
from aspo_learner.memory import Shape, shape_of_config
from aspo_learner.policy import Policy, load_policy
from aspo_learner.publisher import Publisher
from aspo_learner.ranks import Ranks, pick_device
from aspo_learner.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4096}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    # As Qwen2.5-1.5B.
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128},
}
CONFIG = """
[model]
path = {model}
[data]
path = "none"
[sampling]
group_size = {size}
max_tokens = {longest}
[learner]
batch_prompts = {groups}
mini_batch_prompts = {groups}
micro_batch_tokens = {tokens}
"""
SMALL = ("advantages", "packing", "loss", "metrics")  # together under 3 % of a step, is the aim


def save_model(folder: Path, name: str) -> None:
    """Write a model of random weights, and a tokenizer, which nothing uses."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(max_position_embeddings=8192, tie_word_embeddings=True, **MODELS[name])
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_groups(arguments: argparse.Namespace, vocabulary: int) -> list[RolloutGroup]:
    """Random completions, rewards of both kinds in each group, log-probs about those of random weights."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(arguments.groups):
        drawn = rng.lognormal(np.log(arguments.median), 0.8, arguments.group_size)
        lengths = np.clip(drawn, 8, arguments.longest).astype(np.int32)
        group = RolloutGroup(
            uid=f"bench-{number}",
            actor="bench",
            purpose="train",
            temperature=1.0,
            prompt_ids=rng.integers(2, vocabulary, rng.integers(16, 65), dtype=np.int32),
            lengths=lengths,
            token_ids=rng.integers(2, vocabulary, lengths.sum(), dtype=np.int32),
            behavior_logprobs=np.full(lengths.sum(), -np.log(vocabulary), dtype=np.float32),
            rewards=(np.arange(arguments.group_size) % 2).astype(np.float32),
            failed=np.zeros(arguments.group_size, dtype=bool),
            finish_reasons=("stop",) * arguments.group_size,
            spans=tuple((VersionSpan("bench/1/0", int(length)),) for length in lengths),
        )
        groups.append(group)
    return groups


def operations(shape: Shape, policy: Policy, groups: Sequence[RolloutGroup]) -> float:
    """Floating-point operations of one pass over the groups, forward and backward.

    A product costs as much again for the slope in its input, and once more for that in its weight, unless
    that is frozen.
    """
    trained = {id(parameter) for parameter in policy.trained()}
    head = policy.model.get_output_embeddings().weight
    inner = [
        parameter for parameter in policy.model.parameters() if parameter.ndim == 2 and parameter is not head
    ]
    embedding = policy.model.get_input_embeddings().weight
    layers = sum(p.numel() * (6 if id(p) in trained else 4) for p in inner if p is not embedding)
    scored = head.numel() * (6 if id(head) in trained else 4)
    total = 0.0
    for group in groups:
        whole = group.lengths.astype(np.float64) + len(group.prompt_ids)
        total += layers * whole.sum() + scored * group.lengths.sum()
        # Scores and their sum of values, of half the square; thrice for forward and backward.
        total += 6 * shape.layers * shape.query * np.square(whole).sum()
    return total


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, the best of several."""
    size, times = (8192, 20) if device.type == "cuda" else (1536, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        wait_for(device)
        began = time.perf_counter()
        left @ right
        wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """A trainer and a publisher, and one step of both."""

    def __init__(self, config: Config, folder: Path, groups: Sequence[RolloutGroup]) -> None:
        self.policy = load_policy(config, Ranks(pick_device(config.learner.device, 1)))
        self.trainer, self.groups = Trainer(self.policy, config), groups
        self.publisher = Publisher(WeightStore(folder / "weights"), self.policy, "bench", 1)
        self._step = 0

    def step(self) -> float:
        """Train, wait for the version before to be stored, publish; in seconds."""
        phases, self._step = self.trainer.phases, self._step + 1
        wait_for(self.policy.device)
        began = time.perf_counter()
        self.trainer.train_step(self.groups)
        with phases("wait"):
            self.publisher.wait()
        with phases("publish"):
            self.publisher.publish(self._step)
        wait_for(self.policy.device)
        return time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """The shares of one step's parts, and the memory up to now."""
        seconds = self.trainer.phases.seconds = {}
        whole = self.step()
        self.trainer.phases.seconds = None
        split = {name: taken / whole for name, taken in seconds.items()}
        forecast = self.policy.forecast
        assert forecast is not None, "the shape of a Qwen3 is known"
        return {
            "split": split | {"other": 1 - sum(split.values())},
            "loss_advantages_packing_metrics": sum(split[name] for name in SMALL),
            "peak_bytes_predicted": forecast.predicted,
            "peak_bytes": forecast.measured,
        }

    def trace(self, path: Path) -> None:
        """Write a profile of one step."""
        with torch.profiler.profile() as profile:  # of the CPU, and of a GPU if there is one
            self.step()
        profile.export_chrome_trace(str(path))


def configure(folder: Path, arguments: argparse.Namespace) -> Config:
    """Write the model and the settings, and load these."""
    save_model(folder / "model", arguments.model)
    text = CONFIG.format(
        model=json.dumps(str(folder / "model")),
        size=arguments.group_size,
        longest=arguments.longest,
        groups=arguments.groups,
        tokens=arguments.micro_batch_tokens,
    )
    (folder / "bench.toml").write_text(text)
    return load_config(folder / "bench.toml", arguments.set)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = configure(folder, arguments)
    shape = shape_of_config(config.model.path)
    groups = make_groups(arguments, shape.vocabulary)
    device = pick_device(config.learner.device, 1)
    dtype = torch.bfloat16 if uses_bf16(config.learner.precision, device) else torch.float32
    limit = ceiling(device, dtype)
    bench = Bench(config, folder, groups)
    with contextlib.closing(bench.publisher):
        for _ in range(2):  # the first makes the optimizer's state
            bench.step()
        seconds = statistics.median(bench.step() for _ in range(arguments.rounds))
        figures = bench.figures()
        if arguments.trace is not None:
            bench.trace(arguments.trace)
    tokens = sum(len(group.prompt_ids) * len(group) + len(group.token_ids) for group in groups)
    achieved = operations(shape, bench.policy, groups) * config.learner.epochs / seconds
    return {
        "name": "learner",
        "model": arguments.model,
        "parameters": shape.parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens * config.learner.epochs / seconds,
        "flops_per_second": achieved,
        "matmul_flops_per_second": limit,
        "mfu": achieved / limit,
    } | figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="5M")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--median", type=int, default=128, help="of the completions' tokens")
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="section.key=value, as of aspo learner")
    parser.add_argument("--trace", type=Path, help="write a torch profiler's trace of a step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        print(json.dumps(measure(Path(scratch), arguments)))


if __name__ == "__main__":
    main()
