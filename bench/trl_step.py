"""A training step against TRL's GRPOTrainer and against a bare forward and backward, on the same sequences.

All three train the same Qwen3 of 5 M parameters (hidden 256, 4 layers, 4096 words, tied) from the same
folder by `from_pretrained`, in fp32 on the CPU with as many threads, on the same groups: 8 prompts of 16 to
64 tokens with 8 completions each, of log-normal lengths (median 128, sigma 0.8, cut to 8 to 512). Nothing is
generated.

- ours: `Trainer.train_step` on the groups: rewards and behaviour log-probs in, updated weights out.
- TRL: GRPOTrainer's own `train()`, unpatched, fed through its hook `rollout_func`; timed from the hook's
  return to the end of its optimizer step, so with what it does to every batch of completions: decoding them
  for the reward, padding, advantages. It pads prompts on the left and completions on the right to the longest
  of the whole generation batch, and then draws micro-batches from it at random; so it does by itself. What
  would cost it time and need not is off: gradient checkpointing, and (with one update a batch and
  steps_per_generation = gradient_accumulation_steps) the pass for the old log-probs.
- bare: transformers' forward with its own cross-entropy, and backward, on the very inputs that ours gave to
  the model, as a hook on it has seen them, with the same attention. No advantages, ratios, clipping, metrics
  or optimizer, but a log-prob for every token, prompts included, where ours scores completions.

Both losses are the PPO clip at 0.2 with the mean over all tokens (TRL's default `dapo`, ours by the same
name), no KL term, one update of AdamW, gradient norm cut at 1. TRL has no use for given behaviour log-probs
without vLLM: it takes its own as the old ones. As the log-probs given to ours are the model's own, both
gradients must be the same, and the figures hold both norms. Micro-batches hold the same number of padded
tokens: TRL's are `--per-device-batch` rows, ours a budget of as many tokens. The three take turns; ratios
are medians over the rounds, by the wall and, for machines with other work, by processor time. Tokens are real
ones, prompt and completion, never padding.

TRL lives in `.venv-trl`, which the first run makes (some minutes, 1.5 GB, network).

    aspo bench trl_step --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from trl_peer.channel import Moment
from trl_peer.environment import Peer
from trl_peer.sequences import LONGEST, PAD_ID, make_groups, padded_width, save_groups, save_model, tokens_in

from aspo.config import Config, DataConfig, LearnerConfig, LossConfig, ModelConfig, SamplingConfig
from aspo.schemas import RolloutGroup
from aspo_learner.policy import Policy
from aspo_learner.trainer import Trainer

LEARNING_RATE = 1e-6
Turn = Callable[[], dict[str, float]]


class Ours:
    """This project's trainer, which also notes what it gives to the model."""

    def __init__(self, config: Config, groups: Sequence[RolloutGroup]) -> None:
        self._groups = groups
        policy = Policy(config.model, torch.device("cpu"))
        self._trainer = Trainer(policy, config)
        self.attention: str = policy.model.config._attn_implementation
        self.inputs: list[dict[str, Any]] = []
        self.grad_norm = 0.0
        noting = policy.model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.step()
        noting.remove()

    def _note(self, module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        assert not args, "the trainer gives its inputs by name"
        self.inputs.append(given)

    def step(self) -> dict[str, float]:
        """Seconds of one step."""
        began = Moment.now()
        metrics = self._trainer.train_step(self._groups)
        took = Moment.now().since(began)
        self.grad_norm = self.grad_norm or metrics["grad_norm"]
        return took


class Bare:
    """A forward and a backward with transformers' own loss, on inputs and with the attention of ours."""

    def __init__(self, folder: Path, ours: Ours) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.set_attn_implementation(ours.attention)
        self._batches = [
            (given, given["input_ids"].masked_fill(given["input_ids"] == PAD_ID, -100))
            for given in ours.inputs
        ]

    def step(self) -> dict[str, float]:
        """Seconds of one pass over the batches."""
        began = Moment.now()
        for given, labels in self._batches:
            self._model(**given, labels=labels).loss.backward()
        took = Moment.now().since(began)
        self._model.zero_grad(set_to_none=True)
        return took


def our_config(model: Path, arguments: argparse.Namespace, width: int) -> Config:
    """The settings that TRL's half has in its own terms."""
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(path="none"),
        sampling=SamplingConfig(group_size=arguments.group_size, max_tokens=LONGEST),
        loss=LossConfig(name="dapo", eps_low=0.2, eps_high=0.2),
        learner=LearnerConfig(
            device="cpu",
            batch_prompts=arguments.groups,
            mini_batch_prompts=arguments.groups,
            micro_batch_tokens=arguments.per_device_batch * width,
            learning_rate=LEARNING_RATE,
            warmup_updates=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
        ),
    )


def trl_order(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What TRL's half is told; the first of its rounds is a warm-up, as the first of ours."""
    return {
        "folder": str(folder),
        "model": str(folder / "model"),
        "sequences": str(folder / "sequences.npz"),
        "threads": arguments.threads,
        "group_size": arguments.group_size,
        "max_tokens": LONGEST,
        "per_device_batch": arguments.per_device_batch,
        "learning_rate": LEARNING_RATE,
        "updates": 1,
        "rounds": arguments.rounds + 1,
    }


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    save_model(folder / "model")
    groups = make_groups(folder / "model", arguments.groups, arguments.group_size, arguments.seed)
    save_groups(groups, folder / "sequences.npz")
    width = padded_width(groups)
    ours = Ours(our_config(folder / "model", arguments, width), groups)
    bare = Bare(folder / "model", ours)
    bare.step()
    with Peer("step.py", threads=arguments.threads) as peer:
        versions = peer.ask(trl_order(folder, arguments))
        first = peer.ask({})
        turns: dict[str, Turn] = {
            "ours": ours.step,
            "trl": lambda: dict(peer.ask({})["took"]),
            "bare": bare.step,
        }
        seconds = take_turns(turns, arguments.rounds)
    tokens = tokens_in(groups)
    medians = {name: statistics.median(taken["wall"]) for name, taken in seconds.items()}
    return {
        "name": "trl_step",
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "sequences": arguments.groups * arguments.group_size,
        "tokens": tokens,
        "micro_batch_tokens": arguments.per_device_batch * width,
        "padded_tokens_ours": sum(given["input_ids"].numel() for given in ours.inputs),
        "padded_tokens_trl": arguments.groups * arguments.group_size * width,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "ours_over_trl": ratio(seconds["trl"]["wall"], seconds["ours"]["wall"]),
        "ours_over_bare": ratio(seconds["bare"]["wall"], seconds["ours"]["wall"]),
        "ours_over_trl_cpu": ratio(seconds["trl"]["cpu"], seconds["ours"]["cpu"]),
        "ours_over_bare_cpu": ratio(seconds["bare"]["cpu"], seconds["ours"]["cpu"]),
        "grad_norm": {"ours": ours.grad_norm, "trl": first["grad_norm"]},
        "versions": {"transformers": version("transformers"), "torch": version("torch")},
        "versions_trl": versions,
    }


def take_turns(turns: dict[str, Turn], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds of each by name; every round begins with another."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in turns}
    names = list(turns)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took = turns[name]()
            for clock, value in took.items():
                seconds[name][clock].append(value)
            print(f"round {number + 1}: {name}, seconds: {took}", file=sys.stderr)
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over the rounds of how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--per-device-batch", type=int, default=8, help="rows of TRL's micro-batch")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="aspo-bench-") as scratch:
        print(json.dumps(measure(Path(scratch), arguments)))


if __name__ == "__main__":
    main()
