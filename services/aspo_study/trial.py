"""One cell's run: the service's trainer on rollouts of known age, and what it comes to.

    row = Trial(Cell(task="sorting", staleness=16), Path("runs/study/models")).run()      # a flat dict

The same cell gives the same row, on the same machine and with the same number of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from aspo.config import Config, DataConfig, LearnerConfig, LossConfig, ModelConfig, SamplingConfig
from aspo.schemas import PolicyVersion, RolloutGroup
from aspo_cli.demo_model import make_model
from aspo_learner.batching import micro_batches, repetition, sequences_of
from aspo_learner.losses import Mean, k3_kl
from aspo_learner.optimizer import DivergedError
from aspo_learner.policy import Policy
from aspo_learner.staleness import StalenessRule
from aspo_learner.trainer import Trainer
from aspo_study.cells import GROUP_SIZE, PROMPTS, Cell, Row
from aspo_study.sampler import RUN, StaleSampler
from aspo_study.tasks import TASKS

HELD_OUT, HELD_OUT_SEED = 256, 7
EVALUATE_EVERY = 16  # steps
EXAM_PROMPTS, EXAM_SAMPLES = 64, 2
NO_DUAL_CLIP = 1e6  # a cap that no ratio reaches
MEANS = (
    "weight_mean_pos",
    "weight_mean_neg",
    "clip_fraction_pos",
    "clip_fraction_neg",
    "dual_clip_fraction_pos",
    "dual_clip_fraction_neg",
    "ratio_p99",
    "mismatch_k3",
    "ess_fraction",
    "uninformative_fraction",
)  # of the second half of a run


class Trial:
    """A cell about to be run, from the model that a careless teacher has warm-started."""

    def __init__(self, cell: Cell, models: Path) -> None:
        self._cell, self._task = cell, TASKS[cell.task]
        folder = warm_start(cell.task, models)
        torch.manual_seed(cell.seed)
        config = config_of(cell, folder)
        self._policy = Policy(config.model, torch.device("cpu"))
        self._start = self._policy.reference()
        self._trainer = Trainer(self._policy, config)
        self._sampler = StaleSampler(
            self._policy.model.config,
            self._policy.tokenizer,
            self._task,
            staleness=cell.staleness,
            seed=cell.seed,
        )
        self._rule = StalenessRule(cell.staleness)
        self._held_out = self._task.problems(HELD_OUT, seed=HELD_OUT_SEED, held_out=True)

    def run(self) -> Row:
        """Train to the end and say what came of it; one that diverges ends there, as `steps_done` says."""
        history: list[dict[str, float]] = []
        accuracies = list[float]()
        for step in range(self._cell.steps + 1):
            self._sampler.publish(self._policy)
            if step % EVALUATE_EVERY == 0:
                accuracies.append(self._sampler.accuracy(self._held_out))
            if step < self._cell.steps:
                try:
                    history.append(self._step())
                except DivergedError:
                    break
        ends = {"steps_done": len(history), "accuracies": accuracies}
        return asdict(self._cell) | ends | summarize(history, accuracies) | self._examine()

    def _step(self) -> dict[str, float]:
        groups = self._sampler.sample(PROMPTS, GROUP_SIZE)
        current = PolicyVersion(1, self._sampler.current, RUN)
        weights = [self._rule.weights(group, current) for group in groups]
        lags = [self._rule.token_lags(group, current) for group in groups]
        return self._trainer.train_step(groups, weights, lags)

    @torch.no_grad()
    def _examine(self) -> dict[str, float]:
        """What the last version samples at temperature 1: reward, entropy, repetition, KL to the start."""
        problems = self._held_out[:EXAM_PROMPTS]
        groups = self._sampler.examine(problems, EXAM_SAMPLES)
        kl, entropy = self._score(groups)
        answers = [part for g in groups for part in np.split(g.token_ids, g.offsets[1:-1])]
        return {
            "reward_end": float(np.mean([group.rewards.mean() for group in groups])),
            "entropy_end": entropy,
            "kl_start": kl,
            "repetition": float(np.mean([repetition(answer, n=2) for answer in answers])),
            "response_length": float(np.mean([len(answer) for answer in answers])),
        }

    def _score(self, groups: Sequence[RolloutGroup]) -> tuple[float, float]:
        """K3 estimate of KL(policy || start) and the entropy, both nats a token."""
        none = [0.0] * EXAM_SAMPLES
        sequences = [s for n, group in enumerate(groups) for s in sequences_of(group, none, n)]
        kl, entropy = Mean(0.0, 0.0), Mean(0.0, 0.0)
        everything = range(len(sequences))
        for batch in micro_batches(sequences, everything, max_tokens=16384, device=self._policy.device):
            now, spread = self._policy.score(batch, 1.0)
            then, _ = self._policy.score(batch, 1.0, self._start)
            tokens = batch.mask.sum()
            kl += Mean(k3_kl(now, then, batch.mask).sum(), tokens)
            entropy += Mean(spread.sum(), tokens)
        return float(kl), float(entropy)


def summarize(history: Sequence[dict[str, float]], accuracies: Sequence[float]) -> dict[str, float]:
    """What a run's steps come to; the final accuracy is the mean of the last two evaluations."""
    norms = np.array([step["grad_norm_max"] for step in history if "grad_norm_max" in step])
    norms = norms if len(norms) else np.array([np.nan])
    entropies = [step["entropy"] for step in history if "entropy" in step]
    later = history[len(history) // 2 :]
    means = {name: [step[name] for step in later if np.isfinite(step.get(name, np.nan))] for name in MEANS}
    return {
        "accuracy_start": accuracies[0],
        "accuracy_final": float(np.mean(accuracies[-2:])),
        "accuracy_best": max(accuracies),
        "entropy_least": min(entropies, default=float("nan")),
        **{name: float(np.mean(values)) if values else float("nan") for name, values in means.items()},
        "grad_norm_median": float(np.median(norms)),
        "grad_norm_p99": float(np.quantile(norms, 0.99)),
        "grad_norm_max": float(norms.max()),
        "skipped_updates": history[-1]["skipped_updates"] if history else 0.0,
    }


def config_of(cell: Cell, folder: Path) -> Config:
    """The learner's config of a cell: as in the demo, but for what is studied."""
    clip = {} if cell.dual_clip else {"dual_clip_neg": NO_DUAL_CLIP}
    if not cell.dual_clip and cell.loss == "aspo":
        clip["dual_clip_pos"] = NO_DUAL_CLIP
    epochs = max(1, cell.updates // 4)
    return Config(
        model=ModelConfig(path=str(folder), dtype="float32"),
        data=DataConfig(path="drawn"),
        sampling=SamplingConfig(group_size=GROUP_SIZE, max_tokens=TASKS[cell.task].max_tokens),
        loss=LossConfig(name=cell.loss, ratio_reference=cell.reference, **clip),
        learner=LearnerConfig(
            device="cpu",
            steps=cell.steps,
            batch_prompts=PROMPTS,
            mini_batch_prompts=PROMPTS * epochs // cell.updates,
            epochs=epochs,
            learning_rate=cell.learning_rate,
            warmup_updates=10,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            max_staleness=cell.staleness,
        ),
    )


def warm_start(task: str, models: Path) -> Path:
    """The folder of the model that every cell of a task begins with; it is made whole or not at all."""
    folder = models / task
    if not folder.exists():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as unfinished:
            made = Path(unfinished) / task
            make_model(made, 0, lambda step, loss: None, TASKS[task].recipe)
            made.rename(folder)
    return folder
