"""Logging, and the metrics of both services: one table each, from which the Prometheus gauges are made."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from rich.logging import RichHandler

from aspo.text import printable

_MAX_LINE = 4000

# A name `x/y` stands for a value for each y, written x/<its y>: a gauge with the label y.
LEARNER_METRICS = {
    "step": "Rollout batches trained on",
    "reward": "Mean reward of the batch's samples",
    "reward_part/part": "Mean of one part of the reward, before weighting, over samples that were scored",
    "set_reward/set": "Mean reward of the batch's samples that are of one data set",
    "set_groups/set": "Groups of the batch that are of one data set",
    "prompts_read/set": "Rows read of a data set; of one that is streamed, in this pass",
    "prompts_skipped/set": "Those of them left out because their prompt is too long",
    "accuracy": "Held-out mean reward at the last evaluation, averaged over sets",
    "set_accuracy/set": "Held-out mean reward of a set at the last evaluation (avg@k)",
    "set_pass/set": "Share of its prompts with a right answer among k (pass@k), where k > 1",
    "evaluation_tokens": "Completion tokens of the last evaluation",
    "loss": "Mean loss per update (a handle for autograd: read surrogate instead)",
    "surrogate": "Mean of advantage x correction x weight per token",
    "entropy": "Mean entropy of the policy per completion token, nats",
    "kl_reference": "K3 KL to the initial policy per token, nats",
    "grad_norm": "Gradient norm before clipping, mean over updates",
    "grad_norm_max": "Gradient norm before clipping, largest update",
    "learning_rate": "Learning rate of the last update",
    "updates": "Optimizer updates in the step",
    "skipped_updates": "Updates skipped for a non-finite gradient, since the start",
    "ratio_mean": "Mean importance ratio r",
    "ratio_mean_pos": "Mean r of tokens with positive advantage",
    "ratio_mean_neg": "Mean r of tokens with negative advantage",
    "ratio_p01": "1 % quantile of r",
    "ratio_p50": "Median of r",
    "ratio_p99": "99 % quantile of r",
    "ratio_max": "Largest r",
    "weight_mean_pos": "Mean final weight k*w of positive tokens",
    "weight_mean_neg": "Mean final weight k*w of negative tokens",
    "clip_fraction_pos": "Hard-clipped share of positive tokens",
    "clip_fraction_neg": "Hard-clipped share of negative tokens",
    "dual_clip_fraction_pos": "Dual-clipped share of positive tokens",
    "dual_clip_fraction_neg": "Dual-clipped share of negative tokens",
    "approx_kl_k1": "k1 estimate of KL between r's denominator and the policy, nats per token",
    "approx_kl_k3": "k3 estimate of the same",
    "mismatch_k1": "k1 between the batch-start policy and the sampler, nats per token",
    "mismatch_k3": "k3 of the same",
    "mismatch_ratio_p01": "1 % quantile of s = batch-start policy / sampler",
    "mismatch_ratio_p50": "Median of s",
    "mismatch_ratio_p99": "99 % quantile of s",
    "mismatch_ratio_max": "Largest s",
    "ess_fraction": "Effective sample size of correction x weight, as a share of the tokens",
    "correction_ess_fraction": "Effective sample size of the behaviour correction, as a share of the tokens",
    "staleness_mean": "Mean versions by which the batch's groups lag",
    "staleness_max": "Largest lag of a group in the batch, versions",
    "staleness_groups/lag": "Groups of the batch by how many versions they lag; more is beyond max_staleness",
    "stale_groups_dropped": "Groups dropped for staleness since the batch before",
    "stale_tokens_masked": "Tokens of the batch masked for staleness",
    "stale_tokens_decayed": "Tokens of the batch whose weight was decayed for staleness",
    "uninformative_fraction": "Share of groups whose rewards are all equal; they are not trained on",
    "all_right_fraction": "Share of groups, those replaced included, whose rewards are the same and above 0",
    "all_wrong_fraction": "The same of rewards that are 0 or less",
    "refilled_groups": "Groups replaced as uninformative since the batch before",
    "reward_failed_fraction": "Share of samples whose reward function failed",
    "truncated_fraction": "Share of completions cut at max_tokens",
    "response_length": "Mean completion length, tokens of the model",
    "response_length_arrived": "The same over batch and groups dropped for staleness since the one before",
    "response_length_bias": "Mean length by token weight over response_length_arrived, less 1",
    "repetition_correct": "Share of repeated 4-grams in completions rewarded above the group's mean",
    "repetition_wrong": "Share of repeated 4-grams in completions rewarded at or below the group's mean",
    "tokens": "Completion tokens in the batch that the model sampled",
    "turns": "Mean turns of the model in a conversation with an environment",
    "environment_tokens": "Tokens in the batch that an environment said; they are not trained on",
    "wait_seconds": "Time the learner waited for this batch",
    "train_seconds": "Time of the forward, backward and optimizer work",
    "publish_seconds": "Time to copy the new version out; storing goes on beside the next step",
    "weights_bytes": "Size of the cheapest way to the last version stored, bytes",
    "weights_changed_fraction": "Share of the weights that the last step changed, as published",
    "checkpoint_seconds": "Time of the durable checkpoint, when there was one",
    "queue_tasks": "Tasks waiting or being worked on",
    "queue_rollouts": "Rollout groups stored and not yet acknowledged",
    "tracker_failures": "Steps that a tracker was not told since the start",
    "actors": "Actors alive",
    "ended_stale": "Groups dropped for staleness since the start",
    "ended_duplicate": "Groups seen twice since the start",
    "ended_uninformative": "Groups replaced as uninformative since the start",
    "ended_quarantined": "Groups set aside as unusable since the start",
}
ACTOR_METRICS = {
    "groups": "Rollout groups stored since the start",
    "tokens": "Completion tokens sampled since the start",
    "tokens_per_second": "Sampling rate over the last seconds",
    "groups_in_flight": "Groups being sampled or scored",
    "weight_step": "Step of the policy version being run",
    "weight_syncs": "Weight updates applied since the start",
    "weight_patches": "Updates that wrote only what had changed",
    "weight_repairs": "Times a damaged engine was brought back by loading its weights whole",
    "weight_versions_behind": "Steps by which the actor lagged when it fetched the last version",
    "weight_bytes": "Bytes of weights fetched since the start",
    "weight_bytes_from_peers": "Those of them that other actors or relays sent",
    "weight_retries": "Requests for weights that had to be repeated",
    "weight_pull_seconds": "Time to fetch and verify the last version",
    "weight_apply_seconds": "Time to stage, write and check the last version in the engine",
    "weight_pause_seconds": "Time generation stood still for the last update",
    "reward_failures": "Samples whose reward function raised, hung or gave no number",
    "environment_failures": "Conversations that ended because the environment raised, hung or made no sense",
}


# What the names of metrics say of their unit, first match first; anything else is a plain number.
_UNITS = (
    (r"tokens_per_second", "tokens/s"),
    (r"_seconds$", "seconds"),
    (r"bytes", "bytes"),
    (r"fraction|^accuracy|^repetition_|_bias$", "share"),
    (r"^entropy|^kl_|_k[13]$", "nats/token"),
    (r"(^|_)tokens|^response_length", "tokens"),
    (r"groups|^queue_rollouts|^ended_", "groups"),
    (r"^staleness_|_behind$", "versions"),
)


def unit_of(name: str) -> str:
    """The unit of a metric; 1 for a plain number."""
    return next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "1")


class Gauges:
    """Prometheus gauges `aspo_<service>_<name>` for one table of metrics, and `process_*` of this process."""

    def __init__(self, service: str, table: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._gauges: dict[str, Gauge] = {}
        for entry, text in table.items():
            name, _, label = entry.partition("/")
            labels = [label] if label else []
            self._gauges[name] = Gauge(f"aspo_{service}_{name}", text, labels, registry=self.registry)

    def set(self, values: Mapping[str, float]) -> None:
        """Set the gauges of all values; a name outside the table is an error."""
        for entry, value in values.items():
            name, _, label = entry.partition("/")
            gauge = self._gauges[name]
            (gauge.labels(label) if label else gauge).set(value)


class PrintableFormatter(logging.Formatter):
    """Escapes control characters, so that no name, reason or answer from outside can forge a line.

    Only a traceback has several lines, all of them indented.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), _MAX_LINE)

    def formatException(self, info: Any) -> str:
        lines = super().formatException(info).split("\n")
        return "\n".join(f"  {printable(line, _MAX_LINE)}" for line in lines)


def setup_logging() -> None:
    """Log to standard error: coloured on a terminal, one plain line each elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console

        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
        handler.setFormatter(PrintableFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "vllm", "datasets", "filelock", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
