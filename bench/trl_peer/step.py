"""TRL's half of `bench/trl_step.py`, run in TRL's environment: GRPOTrainer on prepared completions.

TRL's own `train()` runs, unpatched. Its hook for custom generation, `rollout_func`, waits for an order and
returns the prepared completions at once; the clock runs from there to the end of the last optimizer step on
them. Every answer is one such pass.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from channel import Channel, Moment
from datasets import Dataset
from settings import COMMON
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list[str], given: list[float], **_: Any) -> list[float]:
    """The prepared rewards, which came with the completions."""
    return given


class Prepared:
    """Completions from a file, handed out by prompt in place of generation."""

    def __init__(self, path: str, group_size: int, channel: Channel) -> None:
        arrays = np.load(path)
        prompts = _cut(arrays["prompt_ids"], arrays["prompt_lengths"])
        self._channel = channel
        self._prompts = [prompt for prompt in prompts for _ in range(group_size)]
        self._completions = _cut(arrays["token_ids"], arrays["lengths"])
        self._logprobs = _cut(arrays["behavior_logprobs"], arrays["lengths"])
        self._rewards = arrays["rewards"].tolist()
        self._size = group_size
        self.groups = len(prompts)
        self.began = Moment.now()

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Answer TRL's request for completions; a prompt's text is its number."""
        seen: dict[str, int] = defaultdict(int)
        chosen = []
        for prompt in prompts:
            chosen.append(int(prompt) * self._size + seen[prompt])
            seen[prompt] += 1
        answer = {
            "prompt_ids": [self._prompts[i] for i in chosen],
            "completion_ids": [self._completions[i] for i in chosen],
            "logprobs": [self._logprobs[i] for i in chosen],
            "given": [self._rewards[i] for i in chosen],
        }
        self._channel.take()
        self.began = Moment.now()
        return answer


def _cut(flat: Any, lengths: Any) -> list[list[Any]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


class Clock(TrainerCallback):
    """Answers how long the updates on a batch of completions took."""

    def __init__(self, prepared: Prepared, updates: int, channel: Channel) -> None:
        self._prepared, self._updates, self._channel = prepared, updates, channel
        self._took: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._took = Moment.now().since(self._prepared.began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if state.global_step % self._updates == 0 and "grad_norm" in logs:
            self._channel.give(took=self._took, grad_norm=logs["grad_norm"])


def settings(order: dict[str, Any], sequences: int) -> GRPOConfig:
    """The step's settings in TRL's terms; what is not named is TRL's default."""
    return GRPOConfig(
        output_dir=str(Path(order["folder"]) / "trl"),
        num_generations=order["group_size"],
        max_completion_length=order["max_tokens"],
        per_device_train_batch_size=order["per_device_batch"],
        gradient_accumulation_steps=sequences // order["per_device_batch"],
        num_iterations=order["updates"],
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        learning_rate=order["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=order["rounds"] * order["updates"],
        logging_steps=1,
        **COMMON,
    )


def main() -> None:
    channel = Channel()
    logging.disable_progress_bar()
    order = channel.take()
    torch.set_num_threads(order["threads"])
    prepared = Prepared(order["sequences"], order["group_size"], channel)
    trainer = GRPOTrainer(
        model=order["model"],
        reward_funcs=reward,
        args=settings(order, prepared.groups * order["group_size"]),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(prepared.groups)]}),
        rollout_func=prepared,
        callbacks=[Clock(prepared, order["updates"], channel)],
    )
    trainer.remove_callback(PrinterCallback)
    channel.give(**{name: version(name) for name in ("trl", "transformers", "torch")})
    trainer.train()


if __name__ == "__main__":
    main()
