"""What becomes of rollouts past the staleness bound, decided from policy versions and never from clocks.

    rule = StalenessRule(max_staleness=4, policy="decay", decay=0.5)
    if rule.admits(group, current):
        weights = rule.weights(group, current)      # one a token: what it counts for in the loss

A token's lag is the number of versions between the one that sampled it and the learner's; the dispatcher's
pacing keeps it within `max_staleness` unless others overtake the group, as after a partition. Past it:

- `drop`: the group goes as soon as one of its tokens is past the bound.
- `mask`: such tokens have weight 0, each by its own version; a group with none within the bound goes.
- `decay`: such tokens have weight `decay ** (lag - max_staleness)`; no group goes.

Advantages are always computed over the whole group: a reward belongs to its whole response, whichever tokens
are still trained on. Weights multiply the correction b of `losses`; the KL term is masked, but not decayed.
They are normalised so:

1. A masked token is as though it were not there: it has no part in the denominator (`token-mean`), and a
   response without a kept token is no response (`seq-mean-*`). This is rejection: what is left is a smaller
   batch of full weight, as with `drop` and as verl and slime do it (verl #3915, slime #657).
2. A decayed token counts in full in the denominator, as a token with an importance weight does. A token of
   weight d then adds d times the gradient that it would on time, whatever shares its batch (a learning rate
   by staleness, arXiv 1511.05950). Were weights divided by their sum, they would cancel in a batch that is
   late as a whole, which is what a partition leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aspo.config import LearnerConfig, StalenessPolicy
from aspo.schemas import FloatArray, IntArray, PolicyVersion, RolloutGroup

_LEAST_WEIGHT = np.finfo(np.float32).tiny  # a decayed token never counts as a masked one


@dataclass(frozen=True, slots=True)
class StalenessRule:
    """How far a token may lag, in versions, and what happens to those that lag further.

    `branch` is the step at which the current epoch began: what an earlier epoch did beyond it is on a
    timeline that was lost, and lags from the branch.
    """

    max_staleness: int
    policy: StalenessPolicy = "drop"
    decay: float = 0.5
    branch: int = 0

    @classmethod
    def of(cls, config: LearnerConfig, *, branch: int) -> StalenessRule:
        """A run's, in an epoch that began at step `branch`."""
        return cls(
            max_staleness=config.max_staleness,
            policy=config.staleness_policy,
            decay=config.staleness_decay,
            branch=branch,
        )

    def staleness_of(self, group: RolloutGroup, current: PolicyVersion) -> int:
        """How many versions the group's oldest token lags behind `current`."""
        return max(self._lags(group, current).values())

    def admits(self, group: RolloutGroup, current: PolicyVersion) -> bool:
        """Whether the group is trained on at all."""
        lags = self._lags(group, current).values()
        deciding = {"drop": max(lags), "mask": min(lags), "decay": 0}
        return deciding[self.policy] <= self.max_staleness

    def weights(self, group: RolloutGroup, current: PolicyVersion) -> FloatArray:
        """What each token of an admitted group counts for, in [0, 1]; float32 [sum(lengths)]."""
        excess = self.token_lags(group, current) - self.max_staleness
        if self.policy == "decay":
            decayed = self.decay ** np.maximum(excess, 0).astype(np.float64)
            return np.maximum(decayed, _LEAST_WEIGHT).astype(np.float32)
        return (excess <= 0).astype(np.float32)

    def token_lags(self, group: RolloutGroup, current: PolicyVersion) -> IntArray:
        """How many versions each token lags behind `current`; int32 [sum(lengths)]."""
        lags = self._lags(group, current)
        spans = [span for sample in group.spans for span in sample]
        found = np.array([lags[span.version] for span in spans], dtype=np.int32)
        return found.repeat([span.length for span in spans])

    def _lags(self, group: RolloutGroup, current: PolicyVersion) -> dict[str, int]:
        names = {span.version for sample in group.spans for span in sample}
        return {name: self.lag(PolicyVersion.parse(name), current) for name in names}

    def lag(self, version: PolicyVersion, current: PolicyVersion) -> int:
        """How many versions `version` lags behind `current`."""
        step = version.step if version.epoch == current.epoch else min(version.step, self.branch)
        return current.step - step


def describe_staleness(
    rule: StalenessRule,
    groups: Sequence[RolloutGroup],
    weights: Sequence[FloatArray],
    dropped: Sequence[IntArray],
    current: PolicyVersion,
) -> dict[str, float]:
    """What the rule did in one step: lags, counts by reason, and the bias in length that it caused.

    `groups` are the batch and `weights` its tokens', of which those of the model count; `dropped` holds the
    [G] response lengths of each group dropped since the batch before. With n a response's tokens and e its
    mean token weight, the mean length of what is trained is sum(e * n) / sum(e) over the batch, that of what
    arrived is the mean of n over batch and dropped groups alike, and the bias is the first over the second,
    less 1: 0 where nothing was stale.
    """
    staleness = [rule.staleness_of(group, current) for group in groups]
    lengths = np.concatenate([group.model_lengths for group in groups])
    tokens = np.concatenate([own[group.by_model] for group, own in zip(groups, weights, strict=True)])
    effective = np.add.reduceat(tokens.astype(np.float64), np.cumsum(lengths) - lengths)
    arrived = float(np.concatenate([lengths, *dropped]).mean())
    trained = float(effective.sum() / (effective / lengths).sum())
    return {
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(max(staleness)),
        **_histogram(rule, staleness),
        "stale_groups_dropped": float(len(dropped)),
        "stale_tokens_masked": float((tokens == 0).sum()),
        "stale_tokens_decayed": float(((tokens > 0) & (tokens < 1)).sum()),
        "response_length_arrived": arrived,
        "response_length_bias": trained / arrived - 1,
    }


def _histogram(rule: StalenessRule, staleness: Sequence[int]) -> dict[str, float]:
    """How many groups lag by how many versions; those beyond the bound together."""
    lags = range(rule.max_staleness + 1)
    counts = {f"staleness_groups/{lag}": float(staleness.count(lag)) for lag in lags}
    return counts | {"staleness_groups/more": float(sum(lag > rule.max_staleness for lag in staleness))}
