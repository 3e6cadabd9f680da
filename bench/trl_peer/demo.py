"""The demo's task learnt by TRL's GRPOTrainer; run by `bench/trl_demo.py` in TRL's environment.

One order comes in: paths, seed and settings. One answer goes out for every evaluation: the updates made, the
seconds since training began and the share of held-out prompts answered rightly.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from channel import Channel
from datasets import Dataset
from settings import COMMON
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from aspo_cli.demo_task import MAX_COMPLETION_TOKENS, correct_sum


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The demo's reward, with TRL's signature."""
    return [correct_sum(text, answer=right) for text, right in zip(completions, answer, strict=True)]


class Evaluation(TrainerCallback):
    """Greedy accuracy after every few updates, beside the clock; stops training at the target."""

    def __init__(self, channel: Channel, order: dict[str, Any]) -> None:
        self._channel, self._every, self._target = channel, order["evaluate_every"], order["target"]
        rows = [json.loads(line) for line in Path(order["held_out"]).read_text().splitlines()]
        self._rows = rows[: order["evaluation_prompts"]]
        self._seconds, self._resumed = 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._resumed = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self._every:
            return
        self._seconds += time.perf_counter() - self._resumed
        accuracy = self._accuracy(given["model"], given["processing_class"])
        self._channel.give(updates=state.global_step, seconds=self._seconds, accuracy=accuracy)
        control.should_training_stop = accuracy >= self._target
        self._resumed = time.perf_counter()

    @torch.no_grad()
    def _accuracy(self, model: Any, tokenizer: Any) -> float:
        prompts = [row["prompt"] for row in self._rows]
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        model.eval()
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_COMPLETION_TOKENS,
        )
        model.train()
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        scores = reward(texts, [row["answer"] for row in self._rows])
        return sum(scores) / len(scores)


def settings(order: dict[str, Any], folder: str) -> GRPOConfig:
    """The demo's settings in TRL's terms; what is not named is TRL's default."""
    micro_batches = order["batch_prompts"] * order["group_size"] // order["per_device_batch"]
    return GRPOConfig(
        output_dir=folder,
        seed=order["seed"],
        num_generations=order["group_size"],
        max_completion_length=MAX_COMPLETION_TOKENS,
        temperature=1.0,
        per_device_train_batch_size=order["per_device_batch"],
        gradient_accumulation_steps=micro_batches,
        num_iterations=order["iterations"],
        use_transformers_continuous_batching=order["generation"] == "continuous",
        learning_rate=order["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=order["warmup_updates"],
        adam_beta1=order["betas"][0],
        adam_beta2=order["betas"][1],
        max_steps=order["max_updates"],
        **COMMON,
    )


def main() -> None:
    channel = Channel()
    logging.disable_progress_bar()
    order = channel.take()
    torch.set_num_threads(order["threads"])
    rows = [json.loads(line) for line in Path(order["train"]).read_text().splitlines()]
    trainer = GRPOTrainer(
        model=order["model"],
        reward_funcs=reward,
        args=settings(order, order["scratch"]),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Evaluation(channel, order)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    channel.give(done=True)


if __name__ == "__main__":
    main()
