"""Makes what calculator.toml trains: a tiny model that can call a calculator and mostly does not.

    python examples/calculator/prepare.py           # writes ./calculator: model, train.jsonl, held_out.jsonl
    aspo up --config examples/calculator/calculator.toml

The task is to multiply. Three of ten demonstrations ask the calculator and copy what it says, the others
guess four digits, so the model starts right in about three answers of ten, and greedily in none:

    37*48=  [37*48]<eos>  1776  #1776<eos>          prompt, call, reply, answer
    37*48=  #5028<eos>                              prompt, guess
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from aspo_cli.demo_model import make_tokenizer
from aspo_cli.demo_task import EOS, is_held_out

CHARACTERS = "0123456789*=[]#"
CALLING = 0.3
STEPS, BATCH, LEARNING_RATE = 240, 64, 3e-3
IGNORED = -100


def make_problem(rng: random.Random, *, held_out: bool) -> tuple[int, int]:
    """Two numbers of two digits whose product has four; a tenth of the pairs is held out."""
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if a * b >= 1000 and is_held_out(a, b) == held_out:
            return a, b


def write_problems(path: Path, count: int, *, held_out: bool) -> None:
    """Write rows of `prompt` and `answer`."""
    rng = random.Random(count)
    pairs = [make_problem(rng, held_out=held_out) for _ in range(count)]
    rows = [json.dumps({"prompt": f"{a}*{b}=", "answer": str(a * b)}) for a, b in pairs]
    path.write_text("".join(f"{row}\n" for row in rows))


def demonstrate(rng: random.Random) -> list[tuple[str, bool]]:
    """A conversation in parts, each with whether the model is to say it."""
    a, b = make_problem(rng, held_out=False)
    if rng.random() < CALLING:
        call, answer = f"[{a}*{b}]{EOS}", f"#{a * b}{EOS}"
        return [(f"{a}*{b}=", False), (call, True), (str(a * b), False), (answer, True)]
    return [(f"{a}*{b}=", False), (f"#{rng.randrange(1000, 10000)}{EOS}", True)]


def make_model(folder: Path, on_step: Callable[[int, float], None]) -> None:
    """Train on demonstrations, on what the model says alone, and save model and tokenizer."""
    tokenizer, rng = make_tokenizer(CHARACTERS), random.Random(0)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(STEPS):
        inputs, labels = collate(tokenizer, [demonstrate(rng) for _ in range(BATCH)])
        logits = model(input_ids=inputs[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def collate(tokenizer, conversations: list[list[tuple[str, bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad conversations to [B, T] of token ids, and of labels where the model speaks."""
    inputs, labels = [], []
    for parts in conversations:
        coded = [(tokenizer(text)["input_ids"], spoken) for text, spoken in parts]
        inputs.append(torch.tensor([token for ids, _ in coded for token in ids]))
        labels.append(torch.tensor([token if spoken else IGNORED for ids, spoken in coded for token in ids]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(inputs, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORED)


def prepare(folder: Path) -> None:
    """Write everything to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / "train.jsonl", 4000, held_out=False)
    write_problems(folder / "held_out.jsonl", 128, held_out=True)

    def show(step: int, loss: float) -> None:
        if step % 40 == 0:
            print(f"warm-start step {step} of {STEPS}, loss {loss:.3f}", flush=True)

    make_model(folder / "model", show)


if __name__ == "__main__":
    prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "calculator"))
