"""The demo's model: a small Qwen3 with a character tokenizer, warm-started by a careless teacher.

The teacher drops most carries, so after the warm start the model works problems in the right form and gets
about one in four right. What is left to learn, the carry, only the reward can teach.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from aspo_cli.demo_task import CHARACTERS, EOS, PAD, demonstrate, make_problem

FORGET = 0.75
WARM_LEARNING_RATE = 2e-3
WARM_UP, COOL_DOWN, FINAL_SHARE = 10, 60, 0.05
TRAINING_PROBLEMS = 20_000
HELD_OUT_PROBLEMS = 512


def write_problems(folder: Path, seed: int) -> None:
    """Write train.jsonl and held_out.jsonl."""
    rng = random.Random(seed)
    for name, count, held_out in (
        ("train.jsonl", TRAINING_PROBLEMS, False),
        ("held_out.jsonl", HELD_OUT_PROBLEMS, True),
    ):
        rows = (json.dumps(make_problem(rng, held_out=held_out)) for _ in range(count))
        (folder / name).write_text("".join(f"{row}\n" for row in rows))


# Draws so many prompts, and how the teacher works each.
Draw = Callable[[random.Random, int], list[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made and warm-started: its tokenizer's characters, the demonstrations, its size."""

    characters: str
    draw: Draw
    layers: int
    intermediate_size: int
    steps: int
    batch: int


def _draw_sums(rng: random.Random, count: int) -> list[tuple[str, str]]:
    prompts = [make_problem(rng, held_out=False)["prompt"] for _ in range(count)]
    return [(prompt, demonstrate(prompt, rng, forget=FORGET)) for prompt in prompts]


DEMO = Recipe(characters=CHARACTERS, draw=_draw_sums, layers=3, intermediate_size=512, steps=360, batch=32)


def make_model(folder: Path, seed: int, on_step: Callable[[int, float], None], recipe: Recipe = DEMO) -> None:
    """Make, warm-start and save the model and its tokenizer; calls `on_step(step, loss)` after every step.

    With fewer steps than the recipe's it works problems no better than chance, enough to measure speed.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the caller shows its own
    tokenizer = make_tokenizer(recipe.characters)
    torch.manual_seed(seed)
    model = _new_model(tokenizer, recipe)
    for step, loss in enumerate(_warm_start(model, tokenizer, recipe, seed), start=1):
        on_step(step, loss)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(characters: str = CHARACTERS) -> Any:
    """A tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = Split(Regex("."), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD)


def _new_model(tokenizer: Any, recipe: Recipe) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear up, constant, linear down."""
    cooling = max(0.0, (step - (steps - COOL_DOWN)) / COOL_DOWN)
    return min(1.0, (step + 1) / WARM_UP) * (1.0 - (1.0 - FINAL_SHARE) * cooling)


def _warm_start(model: Any, tokenizer: Any, recipe: Recipe, seed: int) -> Iterator[float]:
    """Supervised steps on demonstrations, the loss on the completions alone."""
    rng = random.Random(seed + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=WARM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    for _ in range(recipe.steps):
        drawn = recipe.draw(rng, recipe.batch)
        texts = [prompt + completion + EOS for prompt, completion in drawn]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, (prompt, _) in enumerate(drawn):
            labels[row, : len(prompt)] = -100
        logits = model(input_ids=batch["input_ids"][:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
