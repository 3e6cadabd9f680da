"""What a run leaves behind: metrics.jsonl, summary.json, curves.png and a loadable model."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aspo.codec import encode_group
from aspo.config import Config
from aspo.presence import ActorStatus
from aspo.schemas import FloatArray, IntArray, PolicyVersion, RolloutGroup
from aspo.weights import adapters
from aspo.weights.adapters import exported_files
from aspo.weights.blobs import write_file
from aspo.weights.manifest import StorageError
from aspo_learner.batching import repetition
from aspo_learner.curves import SUMMARY, draw
from aspo_learner.policy import Policy
from aspo_learner.publisher import Publisher
from aspo_learner.staleness import StalenessRule, describe_staleness
from aspo_learner.trackers import Trackers

log = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
WARMUP_STEPS = 2  # waits of the first steps are the queue's filling, not the steady state


class RunHistory:
    """The figures of a run so far; one line a step in metrics.jsonl."""

    def __init__(self, config: Config) -> None:
        self._folder = config.run.path
        self._folder.mkdir(parents=True, exist_ok=True)
        self._objective = config.loss.name
        self._started = time.monotonic()
        self._steps: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        self.trackers = Trackers(config)
        self.accuracy_before: float | None = None
        self.accuracy: float | None = None
        self.accuracy_after: float | None = None
        self.evaluated: dict[str, float] = {}  # the figures of the last evaluation
        self.weight_version = ""
        self.tokens = 0
        self.rollouts = 0
        self._earlier_seconds = 0.0

    @property
    def steps(self) -> Sequence[Mapping[str, float]]:
        """The figures of the steps so far; it grows."""
        return self._steps

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, restarts included, in seconds."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def idle_fraction(self) -> float:
        """Share of the steady state's time in which the learner waited for rollouts."""
        steady = self._steps[WARMUP_STEPS:]
        waited = sum(m["wait_seconds"] for m in steady)
        worked = sum(m["train_seconds"] + m["publish_seconds"] + m["checkpoint_seconds"] for m in steady)
        return waited / (waited + worked) if steady else 0.0

    def add(self, metrics: dict[str, float], *, rollouts: int) -> None:
        """Take in one step's metrics."""
        self.last = dict(metrics)
        self._steps.append(self.last)
        self.tokens += int(metrics["tokens"])
        self.rollouts += rollouts
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"seconds": round(self.seconds, 3)} | metrics) + "\n")
        self.trackers.log(metrics)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the history."""
        return {
            "steps": len(self._steps),
            "accuracy_before": self.accuracy_before,
            "accuracy": self.accuracy,
            "evaluated": self.evaluated,
            "tokens": self.tokens,
            "rollouts": self.rollouts,
            "seconds": self.seconds,
        }

    def forget(self) -> None:
        """Begin anew: what a run that left no checkpoint wrote is not part of this one."""
        (self._folder / "metrics.jsonl").write_text("")

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`: metrics.jsonl is cut back to the steps that the checkpoint holds."""
        self.accuracy_before, self.accuracy = state["accuracy_before"], state["accuracy"]
        self.evaluated = state.get("evaluated", {})
        self.tokens, self.rollouts, self._earlier_seconds = (
            state["tokens"],
            state["rollouts"],
            state["seconds"],
        )
        path = self._folder / "metrics.jsonl"
        lines = path.read_text().splitlines()[: state["steps"]] if path.exists() else []
        write_file(path, "".join(f"{line}\n" for line in lines).encode())
        self._steps = [json.loads(line) for line in lines]
        self.last = self._steps[-1] if self._steps else {}

    def finish(self, publisher: Publisher, policy: Policy, actors: Sequence[ActorStatus]) -> dict[str, Any]:
        """Write summary.json, curves.png and the final model; returns the summary."""
        model = self._folder / "model"
        tensors: dict[str, Any] = {}
        policy.copy_published(tensors)
        files = policy.published_files()
        save_model(exported_files(files, adapter=False), policy.merged(tensors), model / WEIGHTS)
        if adapters.CONFIG in files:
            folder = self._folder / "adapter"
            save_model(exported_files(files, adapter=True), tensors, folder / adapters.TENSORS)
        staleness = [m["staleness_mean"] for m in self._steps]
        summary: dict[str, Any] = {
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "evaluated": self.evaluated,
            "steps": len(self._steps),
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "weight_version": self.weight_version,
            "weight_syncs": sum(actor.weight_syncs for actor in actors),
            "staleness_mean": sum(staleness) / len(staleness) if staleness else 0.0,
            "staleness_max": max((m["staleness_max"] for m in self._steps), default=0.0),
            "learner_idle_fraction": self.idle_fraction,
            "loss": self.last.get("loss"),
            "objective": self._objective,
            "model": str(model),
        }
        write_file(self._folder / "summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
        if self._steps:
            draw({self._folder.name: self._steps}, SUMMARY, self._folder / "curves.png")
        self.trackers.close()
        return summary


def save_model(files: Mapping[str, bytes], tensors: dict[str, Any], path: Path) -> None:
    """Write weights to `path`, and beside them the files with which `from_pretrained` loads the folder.

    Raises `StorageError` when the disk does not take the weights.
    """
    import safetensors.torch

    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path.parent / name).write_bytes(content)
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise StorageError(f"cannot write {path} ({error}); free some disk") from error


def describe_batch(
    rule: StalenessRule,
    groups: Sequence[RolloutGroup],
    weights: Sequence[FloatArray],
    dropped: Sequence[IntArray],
    current: PolicyVersion,
) -> dict[str, float]:
    """A batch's own figures: reward, length, staleness, repetition."""
    rewards = np.concatenate([group.rewards for group in groups]).astype(np.float64)
    lengths = np.concatenate([group.model_lengths for group in groups])
    better = np.concatenate([group.rewards > group.rewards.mean() for group in groups])
    repeats = np.array(
        [
            repetition(tokens)
            for group in groups
            for tokens in np.split(group.token_ids[group.by_model], np.cumsum(group.model_lengths)[:-1])
        ]
    )
    described = {
        "reward": float(rewards.mean()),
        "reward_failed_fraction": float(np.concatenate([group.failed for group in groups]).mean()),
        "truncated_fraction": float(
            np.mean([r == "length" for group in groups for r in group.finish_reasons])
        ),
        "response_length": float(lengths.mean()),
        "repetition_correct": float(repeats[better].mean()) if better.any() else 0.0,
        "repetition_wrong": float(repeats[~better].mean()) if (~better).any() else 0.0,
        "tokens": float(lengths.sum()),
        **_describe_turns(groups),
    }
    staleness = describe_staleness(rule, groups, weights, dropped, current)
    return described | _reward_parts(groups) | staleness


def _describe_turns(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """How long the conversations with an environment were; nothing where there is none."""
    if not any(group.turns for group in groups):
        return {}
    turns = [(len(sample) + 1) // 2 for group in groups for sample in group.turns]
    replies = sum(int((~group.by_model).sum()) for group in groups)
    return {"turns": float(np.mean(turns)), "environment_tokens": float(replies)}


def describe_sets(groups: Sequence[RolloutGroup], sources: Sequence[str]) -> dict[str, float]:
    """By data set, how many of the batch's groups are of it, and their mean reward."""
    metrics: dict[str, float] = {}
    for source in sorted(set(sources)):
        rewards = [group.rewards for group, own in zip(groups, sources, strict=True) if own == source]
        metrics[f"set_groups/{source}"] = float(len(rewards))
        metrics[f"set_reward/{source}"] = float(np.concatenate(rewards).mean(dtype=np.float64))
    return metrics


def _reward_parts(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """The mean of each part of the reward, over the samples that were scored."""
    values: dict[str, list[FloatArray]] = {}
    for group in groups:
        for name, part in group.reward_parts.items():
            values.setdefault(f"reward_part/{name}", []).append(part[~group.failed])
    scored = {name: np.concatenate(parts) for name, parts in values.items()}
    return {name: float(part.mean(dtype=np.float64)) for name, part in scored.items() if len(part)}


def describe_ended(ended: Counter[str]) -> dict[str, float]:
    """How many groups ended untrained since the learner's start, by reason; any other is a quarantine's."""
    named = {f"ended_{reason}": float(ended[reason]) for reason in ("stale", "duplicate", "uninformative")}
    return named | {"ended_quarantined": ended.total() - sum(named.values())}


def log_step(metrics: Mapping[str, float]) -> None:
    """Say in one line how a step went, and in another what went wrong with it."""
    if metrics.get("reward_failed_fraction", 0.0) > 0:
        log.warning(
            "reward.function failed for %.0f %% of the samples; the actors' logs say where",
            100 * metrics["reward_failed_fraction"],
        )
    log.info(
        "step %d  reward %.3f  entropy %.3f  staleness %.1f  wait %.2f s  train %.2f s",
        metrics["step"],
        metrics.get("reward", float("nan")),
        metrics.get("entropy", float("nan")),
        metrics["staleness_mean"],
        metrics["wait_seconds"],
        metrics["train_seconds"],
    )


def save_batch(folder: Path, groups: Iterable[RolloutGroup]) -> Path:
    """Keep a batch's groups for a look, each as it came over the wire (`aspo.codec.decode_group`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(groups):
        (folder / f"{number:05d}.group").write_bytes(encode_group(group))
    return folder
