"""Run in TRL's environment: train a tiny model by TRL's loss and by ASPO's; tells both in a line of JSON.

python trl_trainers.py MODEL FOLDER
"""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "library" / "trl_aspo.py"
ASPOTrainer = runpy.run_path(str(EXAMPLE))["ASPOTrainer"]


def reward(completions: list[str], **_: Any) -> list[float]:
    """A number that any change of a text changes."""
    return [hashlib.sha256(text.encode()).digest()[0] / 255 for text in completions]


def train(
    kind: Any, model: str, folder: Path, **settings: Any
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """The weights after two batches of completions, as one vector, and what was logged."""
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        weight_decay=0.0,
        loss_type="dapo",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1,
        gradient_checkpointing=False,
        **settings,
    )
    prompts = Dataset.from_dict({"prompt": ["1+2=", "3+4=", "5+6=", "7+8="]})
    trainer = kind(model=model, reward_funcs=reward, args=args, train_dataset=prompts)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return weights, trainer.state.log_history


def main(model: str, folder: Path) -> None:
    """On-policy the two losses have one gradient; off-policy they part."""
    start, _ = train(ASPOTrainer, model, folder, max_steps=1, num_iterations=1)
    answer = {}
    for name, settings in (
        ("on_policy", {"max_steps": 2, "num_iterations": 1}),
        ("off_policy", {"max_steps": 4, "num_iterations": 2}),
    ):
        theirs, _ = train(GRPOTrainer, model, folder, **settings)
        ours, logs = train(ASPOTrainer, model, folder, **settings)
        moved = (ours - start).norm().item()
        answer[name] = {
            "apart": (ours - theirs).norm().item() / moved,
            "moved": moved,
            "spread": [entry["aspo/approx_kl_k3"] for entry in logs if "aspo/approx_kl_k3" in entry],
            "logged": sorted({key for entry in logs for key in entry}),
        }
    for unfit in ({"beta": 0.1}, {"top_entropy_quantile": 0.5}):
        try:
            train(ASPOTrainer, model, folder, max_steps=1, **unfit)
        except ValueError as error:
            answer[f"refuses {min(unfit)}"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
