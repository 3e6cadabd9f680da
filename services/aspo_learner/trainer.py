"""One training step: advantages, ratios, ASPO, optimizer updates; and what it reports.

    trainer = Trainer(policy, config)
    metrics = trainer.train_step(groups)        # several updates on one batch of rollout groups

Numerators and denominators of the metrics are summed over all micro-batches of the step.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from aspo.codec import encode_group
from aspo.config import Config, ConfigError, LossConfig
from aspo.schemas import FloatArray, IntArray, RolloutGroup
from aspo_learner import losses
from aspo_learner.advantages import batch_advantages
from aspo_learner.batching import MicroBatch, TrainingSequence, micro_batches, sequences_of
from aspo_learner.groups import teaches
from aspo_learner.optimizer import Updater
from aspo_learner.phases import Phases
from aspo_learner.policy import Policy
from aspo_learner.ranks import Forget, Ranks, Resume, Train
from aspo_learner.sharding import sum_over_copies
from aspo_learner.token_traces import TokenTrace, Tracer

log = logging.getLogger(__name__)
INERT_RATIO = 1e-6
QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}


class Trainer:
    """Owns the optimizer; turns batches of rollout groups into weight updates."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy, self._config = policy, config.learner
        self._loss_config, self._temperature = config.loss, config.sampling.temperature
        self._estimator = config.groups.advantage
        self._loss = build_loss(config.loss)
        self._ranks = policy.ranks
        self.phases = Phases(policy.device)
        self._reference = policy.reference() if config.loss.kl_coefficient > 0 else None
        self.updater = Updater(policy.trained(), config.learner)
        self._random = np.random.default_rng([config.run.seed, 1])
        self.token_traces: dict[tuple[str, int], TokenTrace] = {}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the policy's weights."""
        return self.updater.optimizer

    def train_step(
        self,
        groups: Sequence[RolloutGroup],
        weights: Sequence[FloatArray] | None = None,
        lags: Sequence[IntArray] | None = None,
    ) -> dict[str, float]:
        """Train on one batch of groups; uninformative groups (all rewards equal) are left out and counted.

        `weights` and `lags` hold each group's token weights and lags [sum(lengths)], see `staleness`; None is
        1 and 0 for all. Of several ranks each trains on its share, and rank 0 reports on the whole.
        `token_traces` then hold some of the completions, by their group's uid and number in it. Raises
        DivergedError after too many gradients in a row that are not finite.
        """
        if self._ranks.size > 1:
            self._ranks.announce(_order(groups, weights, lags))
        with self.phases("advantages"):
            sequences, informative = self._sequences(groups, weights, lags)
        report = _StepReport(Tracer(sequences))
        if sequences:
            proximal = self._proximal(sequences)
            for mini_batch in self._mini_batches(sequences, len(informative)):
                self._update(sequences, mini_batch, proximal, report)
        if self._ranks.size > 1:
            report = report.joined(self._ranks, Tracer(sequences))
        with self.phases("metrics"):
            self.token_traces = report.tracer.traces(informative)
            metrics = report.summary() | {
                "uninformative_fraction": 1 - len(informative) / max(1, len(groups)),
                "learning_rate": self.updater.learning_rate(),
                "skipped_updates": float(self.updater.skipped),
            }
        self._warn_if_inert(metrics)
        if self.policy.forecast is not None:
            self.policy.forecast.compare(self.updater.updates)
        return metrics

    def _sequences(
        self,
        groups: Sequence[RolloutGroup],
        weights: Sequence[FloatArray] | None,
        lags: Sequence[IntArray] | None,
    ) -> tuple[list[TrainingSequence], list[str]]:
        """What is trained on, with its advantages, and the uids of the groups that it is of."""
        none: list[Any] = [None] * len(groups)
        advantages = batch_advantages([torch.tensor(group.rewards) for group in groups], self._estimator)
        informative = [
            (group, own.tolist(), weight, lag)
            for group, own, weight, lag in zip(groups, advantages, weights or none, lags or none, strict=True)
            if teaches(group) and (weight is None or weight.any())
        ]
        sequences = [
            sequence
            for number, (group, own, weight, lag) in enumerate(informative)
            for sequence in sequences_of(group, own, number, weight, lag)
        ]
        return sequences, [group.uid for group, *_ in informative]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer tensors."""
        state = self.updater.state() | {"random": self._random.bit_generator.state}
        digest = self.policy.base_digest()
        return state if digest is None else state | {"base": digest, "scaling": self.policy.scaling}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned; raises ConfigError if adapters were those of another base."""
        if state.get("base") != self.policy.base_digest():
            raise ConfigError(
                "the checkpoint's adapters are of other weights than those of model.path; set it back, or "
                "choose another run.name"
            )
        if state.get("scaling", self.policy.scaling) != self.policy.scaling:
            raise ConfigError(
                f"the checkpoint's adapters count {state['scaling']:g} times, which learner.lora.alpha / "
                "rank no longer is; set learner.lora.alpha back, or choose another run.name"
            )
        self._ranks.announce(Resume(json.dumps(state)))
        self.updater.load_state(state)
        self._random.bit_generator.state = state["random"]

    def forget_moments(self) -> None:
        """Begin with an optimizer that has seen nothing."""
        self._ranks.announce(Forget())
        self.optimizer.state.clear()

    def _mini_batches(self, sequences: Sequence[TrainingSequence], groups: int) -> Iterator[list[int]]:
        """Yield the indices of each update's sequences: whole groups, dealt evenly, shuffled every epoch."""
        updates = min(groups, math.ceil(self._config.batch_prompts / self._config.mini_batch_prompts))
        for _ in range(self._config.epochs):
            for part in np.array_split(self._random.permutation(groups), updates):
                chosen = set(part.tolist())
                yield [i for i, sequence in enumerate(sequences) if sequence.group in chosen]

    def _split(self, sequences: Sequence[TrainingSequence], indices: Sequence[int]) -> Iterator[MicroBatch]:
        batches = micro_batches(
            sequences,
            indices,
            max_tokens=self._config.micro_batch_tokens,
            device=self.policy.device,
            rank=self._ranks.rank,
            ranks=self._ranks.size,
        )
        while True:
            with self.phases("packing"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @torch.no_grad()
    def _proximal(self, sequences: Sequence[TrainingSequence]) -> list[Tensor] | None:
        """The log-probs [C] at the batch's start, by sequence, when they are to be computed."""
        if (
            self._loss_config.ratio_reference == "behavior"
            or self._loss_config.proximal_source != "recompute"
        ):
            return None
        lengths = [len(sequence.completion_ids) for sequence in sequences]
        found = torch.zeros(sum(lengths), device=self.policy.device)
        by_sequence = list(torch.split(found, lengths))
        for batch in self._split(sequences, range(len(sequences))):
            with self.phases("forward"):
                logprobs, _ = self.policy.score(batch, self._temperature)
            for row, index in enumerate(batch.indices):
                by_sequence[index].copy_(logprobs[row, : lengths[index]])
        self._ranks.add_up(found)  # a sequence's are zero everywhere but at the rank that had it
        return by_sequence

    def _update(
        self,
        sequences: Sequence[TrainingSequence],
        indices: Sequence[int],
        proximal: list[Tensor] | None,
        report: _StepReport,
    ) -> None:
        """One optimizer update; the loss is normalised over the mini-batch, whatever the micro-batches."""
        report.tracer.choose(indices)
        tokens = float(sum(sequences[i].trained_tokens for i in indices))
        by_token = inspect.signature(self._loss).parameters["aggregation"].default == "token-mean"
        for batch, following in pairwise(chain(self._split(sequences, indices), [None])):
            assert batch is not None
            sum_over_copies(self.policy.scorer, following is None)
            loss = self._micro_loss(batch, proximal, tokens if by_token else float(len(indices)), report)
            with self.phases("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        with self.phases("optimizer"):
            norm = self.updater.update()
        report.finish_update(norm)

    def _micro_loss(
        self, batch: MicroBatch, proximal: list[Tensor] | None, normalizer: float, report: _StepReport
    ) -> Tensor:
        with self.phases("forward"):
            logprobs, entropy = self.policy.score(batch, self._temperature)
            reference = self._score_reference(batch)
        with self.phases("loss"):
            loss, metrics, old, correction = self._loss_of(
                batch, logprobs, entropy, proximal, normalizer, report.tracer
            )
            if reference is not None:
                loss = loss + self._kl_term(batch, logprobs, reference, normalizer, metrics)
        with self.phases("metrics"):
            report.add(metrics, loss, logprobs.detach(), old, correction, batch)
        return loss

    def _loss_of(
        self,
        batch: MicroBatch,
        logprobs: Tensor,
        entropy: Tensor,
        proximal: list[Tensor] | None,
        normalizer: float,
        tracer: Tracer,
    ) -> tuple[Tensor, losses.Metrics, Tensor, Tensor | None]:
        """The loss and its metrics, and the old log-probs and corrections [B, T] that went into it."""
        old, correction = batch.behavior_logprobs, None
        if self._loss_config.ratio_reference == "proximal":
            old = self._proximal_of(batch, logprobs.detach(), proximal)
            correction = losses.behavior_correction(
                old,
                batch.behavior_logprobs,
                batch.mask,
                mode=self._loss_config.behavior_correction,
                level=self._loss_config.correction_level,
            )
        weights = batch.weights if correction is None else batch.weights * correction
        options: dict[str, Any] = {"correction": weights, "normalizer": normalizer}
        if self._loss_config.entropy_split_clip:
            options["clip_low_entropy_mask"] = losses.entropy_split_mask(entropy, batch.mask)
        loss, metrics = self._loss(logprobs, old, batch.advantages, batch.mask, **options)
        metrics["entropy"] = losses.Mean(entropy.sum(), batch.mask.sum())
        tracer.add(self._loss, logprobs.detach(), old, batch, options)
        return loss, metrics, old, correction

    @staticmethod
    def _proximal_of(batch: MicroBatch, logprobs: Tensor, known: list[Tensor] | None) -> Tensor:
        """The log-probs [B, T] of the policy at the batch's start: computed then, or taken to lie between.

        A token d versions late is d versions from the batch's start and d + 1 from the one being made, so on
        the straight line from its sampler to the policy the start lies at d / (d + 1).
        """
        if known is None or not batch.indices:
            start = batch.lags / (batch.lags + 1)
            return torch.lerp(batch.behavior_logprobs, logprobs, start)
        rows = [known[index] for index in batch.indices]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @torch.no_grad()
    def _score_reference(self, batch: MicroBatch) -> Tensor | None:
        if self._reference is None:
            return None
        logprobs, _ = self.policy.score(batch, self._temperature, self._reference)
        return logprobs

    def _kl_term(
        self,
        batch: MicroBatch,
        logprobs: Tensor,
        reference: Tensor,
        normalizer: float,
        metrics: losses.Metrics,
    ) -> Tensor:
        """K3 KL to the initial policy, normalised as the loss is."""
        kl = losses.k3_kl(logprobs, reference, batch.mask)
        metrics["kl_reference"] = losses.Mean(kl.detach().sum(), batch.mask.sum())
        aggregation = inspect.signature(self._loss).parameters["aggregation"].default
        return self._loss_config.kl_coefficient * losses.aggregate(kl, batch.mask, aggregation, normalizer)

    def _warn_if_inert(self, metrics: dict[str, float]) -> None:
        spread = max(abs(metrics.get("ratio_p01", 0.0) - 1), abs(metrics.get("ratio_max", 0.0) - 1))
        if spread < INERT_RATIO and self._loss_config.name == "aspo":
            log.warning(
                "the ratio r is 1 for the whole batch, so ASPO equals plain policy gradient; use "
                "loss.ratio_reference = 'behavior', more epochs or smaller mini-batches"
            )


def build_loss(config: LossConfig) -> losses.Loss:
    """Bind the loss to its settings; raises ConfigError for a setting that the loss does not have."""
    loss = losses.LOSSES[config.name]
    names = ("eps_low", "eps_high", "dual_clip_pos", "dual_clip_neg", "aggregation")
    chosen = {name: value for name in names if (value := getattr(config, name)) is not None}
    known = inspect.signature(loss).parameters
    if config.entropy_split_clip and "clip_low_entropy_mask" not in known:
        raise ConfigError(f"loss.entropy_split_clip: the loss {config.name!r} has no split clip; unset it")
    for name in chosen:
        if name not in known:
            raise ConfigError(f"loss.{name}: the loss {config.name!r} has no such setting; unset it")
    return partial(loss, **chosen)


class _StepReport:
    """Gathers one step's metrics with global numerators and denominators."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self._means: list[losses.Metrics] = []
        self._update_losses: list[float] = [0.0]
        self._norms: list[float] = []
        self._log_ratios: list[Tensor] = []
        self._corrections: list[Tensor] = []
        self._mismatch: list[Tensor] = []

    def add(
        self,
        metrics: losses.Metrics,
        loss: Tensor,
        logprobs: Tensor,
        old: Tensor,
        correction: Tensor | None,
        batch: MicroBatch,
    ) -> None:
        self._means.append(metrics)
        self._update_losses[-1] += float(loss.detach())
        self._log_ratios.append((logprobs - old)[batch.mask])
        if correction is not None:
            self._corrections.append(correction[batch.mask])
        if not self._norms:
            # Until the first update of a batch the policy still is the proximal one: s for free.
            self._mismatch.append((logprobs - batch.behavior_logprobs)[batch.mask])

    def finish_update(self, norm: float) -> None:
        self._norms.append(norm)
        self._update_losses.append(0.0)

    def joined(self, ranks: Ranks, tracer: Tracer) -> _StepReport:
        """The report on all ranks' shares; an empty one at all but rank 0."""
        means = {
            name: (float(mean.numerator), float(mean.denominator))
            for name, mean in losses.merge_metrics(self._means).items()
        }
        tokens = [_content(part) for part in (self._log_ratios, self._corrections, self._mismatch)]
        share = _Share(means, self._update_losses, self._norms, self.tracer.encoded(), *tokens)
        whole = _StepReport(tracer)
        for reply in ranks.gather(msgspec.msgpack.encode(share)):
            whole._take(msgspec.msgpack.decode(reply, type=_Share))
        return whole

    def _take(self, share: _Share) -> None:
        self._means.append({name: losses.Mean(*mean) for name, mean in share.means.items()})
        before = self._update_losses if self._norms else [0.0] * len(share.update_losses)
        self._update_losses = [a + b for a, b in zip(before, share.update_losses, strict=True)]
        self._norms = share.norms
        self.tracer.take(share.traces)
        for mine, theirs in (
            (self._log_ratios, share.log_ratios),
            (self._corrections, share.corrections),
            (self._mismatch, share.mismatch),
        ):
            if theirs:
                mine.append(torch.frombuffer(bytearray(theirs), dtype=torch.float32))

    def summary(self) -> dict[str, float]:
        """Values over all updates of the step; empty when there was nothing to train on."""
        if not self._norms:
            return {}
        metrics = {name: float(mean) for name, mean in losses.merge_metrics(self._means).items()}
        squares = metrics.pop("corrected_weight_square_mean")
        mean = metrics.pop("corrected_weight_mean")
        metrics["ess_fraction"] = mean**2 / squares if squares else 0.0
        metrics |= _quantiles("ratio", torch.cat(self._log_ratios))
        mismatch = torch.cat(self._mismatch)
        metrics |= _quantiles("mismatch_ratio", mismatch)
        metrics["mismatch_k1"] = float(-mismatch.mean())
        metrics["mismatch_k3"] = float((mismatch.expm1() - mismatch).mean())
        if self._corrections:
            b = torch.cat(self._corrections)
            metrics["correction_ess_fraction"] = float(
                b.sum() ** 2 / b.square().sum().clamp(min=1e-12) / len(b)
            )
        metrics["loss"] = float(np.mean(self._update_losses[: len(self._norms)]))
        metrics["grad_norm"] = float(np.mean(self._norms))
        metrics["grad_norm_max"] = float(np.max(self._norms))
        metrics["updates"] = float(len(self._norms))
        return metrics


class _Share(msgspec.Struct, frozen=True):
    """One rank's part of a step's report; by token, float32."""

    means: dict[str, tuple[float, float]]
    update_losses: list[float]
    norms: list[float]
    traces: dict[int, bytes]
    log_ratios: bytes
    corrections: bytes
    mismatch: bytes


def _content(parts: Sequence[Tensor]) -> bytes:
    return torch.cat([torch.empty(0), *(part.cpu() for part in parts)]).numpy().tobytes()


def _order(
    groups: Sequence[RolloutGroup], weights: Sequence[FloatArray] | None, lags: Sequence[IntArray] | None
) -> Train:
    return Train(
        [encode_group(group) for group in groups],
        None if weights is None else [array.astype(np.float32).tobytes() for array in weights],
        None if lags is None else [array.astype(np.int32).tobytes() for array in lags],
    )


def _quantiles(name: str, log_ratio: Tensor) -> dict[str, float]:
    ordered = np.quantile(log_ratio.exp().double().cpu().numpy(), list(QUANTILES.values()))
    return {f"{name}_{label}": float(value) for label, value in zip(QUANTILES, ordered, strict=True)}
