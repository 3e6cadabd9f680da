"""Run as a program: the memory that a real learner's training takes at its peak, as JSON.

python tests/peak.py MODEL TOKENS     # a model folder; tokens of the one micro-batch

Once as it is by default, once with the activations checkpointed, once with adapters.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from aspo_learner.policy import load_policy
from aspo_learner.ranks import ALONE
from aspo_learner.trainer import Trainer
from rollouts import make_plain_group, write_config

LENGTH = 128  # tokens of a sequence
VARIANTS = {
    "peak": (),
    "checkpointed": ("learner.activation_checkpointing=true",),
    "lora": ("learner.lora.rank=8",),
}


def resident(which: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at its peak since the last reset (VmHWM)."""
    found = re.findall(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[0]) * 1024


def train(model: str, tokens: int, steps: int, more: Sequence[str] = ()) -> int:
    """Train on micro-batches of so many tokens; gives the model's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        settings = (f"micro_batch_tokens={tokens}", "mini_batch_prompts=1", "batch_prompts=1")
        overrides = [*(f"learner.{each}" for each in settings), *more]
        config = write_config(Path(folder), model=model, overrides=overrides)
    trainer = Trainer(load_policy(config, ALONE), config)
    samples = tokens // LENGTH
    spans = [[("test/1/0", LENGTH - 2)]] * samples  # and two tokens of prompt
    groups = [make_plain_group(spans, rewards=[float(i % 2) for i in range(samples)])]
    for _ in range(steps):
        trainer.train_step(groups)
    return sum(parameter.numel() for parameter in trainer.policy.model.parameters())


def main(model: str, tokens: int) -> None:
    torch.set_num_threads(1)
    train(model, 2 * LENGTH, 1, VARIANTS["lora"])  # loads what is loaded once
    found: dict[str, int] = {}
    for name, more in VARIANTS.items():
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        # The first step makes the optimizer's states.
        parameters = train(model, tokens, 2, more)
        found.setdefault("parameters", parameters)
        found[name] = resident("VmHWM") - before
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
