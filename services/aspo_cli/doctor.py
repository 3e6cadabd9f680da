"""`aspo doctor`: what is off with a run, in plain words, from the metrics it has left.

    findings = examine(read_run("demo", Path("runs")))      # none for a healthy run

Every rule looks at the run's latest steps, some against its first ones, and names the metric, its figure and
the setting to change. A metric that a run does not have is no finding. The bounds are wide: what is told is
worth a look, and what is not may still be bad.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from aspo.config import LearnerConfig, LossConfig
from aspo_cli.report import Run

WARM_UP = 2  # steps in which the queue fills
SAFE_STALENESS = 16.0  # versions of four updates; in docs/study.md accuracy is far lower at 64
INERT = 1e-3  # how far 98 % of the ratios are from 1, at most, where ASPO does nothing
MISMATCH = 0.01  # k3 in nats a token between sampler and learner at the same version
COLLAPSED, EXPLODED = 0.2, 3.0  # of the entropy of the first steps
MANY_CLIPPED, MANY_DUAL_CLIPPED = 0.3, 0.05  # of a sign's tokens
SPIKE = 20.0  # of the median gradient norm
LONGER, CUT, REPEATED = 1.5, 0.1, 0.25  # of the first steps' length; of completions; of n-grams
WAITING = 0.5  # of the learner's time
ALIKE = 0.8  # of groups with the same reward throughout
FEW_EFFECTIVE = 0.3  # effective sample size, of the tokens
LATE = 0.1  # of the groups that arrive


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is off: what was seen, and what to change."""

    name: str
    metric: str
    value: float
    text: str
    settings: tuple[str, ...]
    advice: str


class History:
    """A run's metrics by name, at its beginning, lately and as a whole."""

    def __init__(self, run: Run) -> None:
        self.steps = run.steps
        self.tail = run.steps[-max(5, len(run.steps) // 4) :]
        self.head = run.steps[: max(3, len(run.steps) // 20)]
        self._settings, self._summary = run.settings, run.summary

    @property
    def loss(self) -> str:
        """The objective's name."""
        return str(self.setting("loss.name") or self._summary.get("objective") or LossConfig().name)

    def setting(self, name: str) -> Any:
        """A setting's value, None where the run does not say."""
        return self._settings.get(name, {}).get("value")

    def lately(self, name: str) -> float:
        """A metric's mean over the latest steps; NaN where none has it, and NaN is no finding."""
        return _mean(self.tail, name)

    def at_first(self, name: str) -> float:
        """A metric's mean over the first steps; NaN where none has it."""
        return _mean(self.head, name)

    def values(self, name: str) -> list[float]:
        """A metric at every step that has it."""
        return _values(self.steps, name)


def run_doctor(run: Run, *, as_json: bool) -> int:
    """Print what is off, most telling first; 1 if there is anything, else 0."""
    findings = examine(run)
    if as_json:
        typer.echo(json.dumps({"run": run.name, "findings": [asdict(finding) for finding in findings]}))
        return int(bool(findings))
    console = Console(highlight=False)
    for finding in findings:
        console.print(Text(f"{finding.name}: ", style="bold"), Text(finding.text), sep="", soft_wrap=True)
        console.print(Text(f"  {finding.metric} = {finding.value:.4g}; {finding.advice}"), soft_wrap=True)
    if not findings:
        console.print(Text(f"{run.name}: nothing is off in {len(run.steps)} steps"), soft_wrap=True)
    return int(bool(findings))


def examine(run: Run) -> list[Finding]:
    """All findings, in the order of the rules."""
    history = History(run)
    return [finding for rule in RULES for finding in rule(history)]


def _values(steps: list[dict[str, float]], name: str) -> list[float]:
    return [step[name] for step in steps if _is_number(step.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(steps: list[dict[str, float]], name: str) -> float:
    values = _values(steps, name)
    return fmean(values) if values else math.nan


def _not_finite(run: History) -> Iterator[Finding]:
    skipped = max(run.values("skipped_updates"), default=0.0)
    if skipped > 0:
        yield Finding(
            name="gradients that are no numbers",
            metric="skipped_updates",
            value=skipped,
            text=f"{skipped:.0f} updates were skipped because their gradient was not finite.",
            settings=("learner.learning_rate", "learner.precision"),
            advice="lower learner.learning_rate, or set learner.precision = 'fp32'",
        )


def _inert(run: History) -> Iterator[Finding]:
    if run.loss not in ("aspo", "no-is", "response-mean"):
        return
    ratios = [*_values(run.tail, "ratio_p01"), *_values(run.tail, "ratio_p99")]
    if ratios and max(abs(1 - ratio) for ratio in ratios) < INERT:
        advice = "set loss.ratio_reference = 'behavior', or learner.epochs = 2, or lower mini_batch_prompts"
        if run.setting("loss.ratio_reference") == "behavior":
            advice = "set learner.epochs = 2 or lower learner.mini_batch_prompts, so that r moves"
        yield Finding(
            name="ASPO is inert",
            metric="ratio_p99",
            value=run.lately("ratio_p99"),
            text=f"The ratio r is 1 for nearly every token, so {run.loss} is plain policy gradient.",
            settings=("loss.ratio_reference", "learner.epochs", "learner.mini_batch_prompts"),
            advice=advice,
        )


def _stale(run: History) -> Iterator[Finding]:
    lag = run.lately("staleness_mean")
    if lag > SAFE_STALENESS:
        yield Finding(
            name="too stale",
            metric="staleness_mean",
            value=lag,
            text=f"Rollouts are {lag:.1f} versions old; more than {SAFE_STALENESS:.0f} is far off-policy.",
            settings=("learner.max_staleness", "weights.publish_every"),
            advice="lower learner.max_staleness and weights.publish_every, or add actors",
        )
    dropped, groups = run.lately("stale_groups_dropped"), run.setting("learner.batch_prompts")
    late = dropped / (dropped + groups) if groups else 0.0
    if late > LATE:
        policy = run.setting("learner.staleness_policy") or LearnerConfig().staleness_policy
        yield Finding(
            name="rollouts come too late",
            metric="stale_groups_dropped",
            value=dropped,
            text=f"{late:.0%} of the groups come past learner.max_staleness and are lost ({policy}), "
            "those of long responses most.",
            settings=("learner.max_staleness", "learner.staleness_policy"),
            advice="raise learner.max_staleness, or set learner.staleness_policy = 'decay'",
        )


def _mismatch(run: History) -> Iterator[Finding]:
    fresh = [step["mismatch_k3"] for step in run.steps if _is_fresh(step)]
    if fresh and median(fresh) > MISMATCH:
        yield Finding(
            name="engine and learner disagree",
            metric="mismatch_k3",
            value=median(fresh),
            text="On rollouts of the current version the sampler's log-probs are not the learner's; "
            "the engine computes another model, or in another precision.",
            settings=("model.dtype", "learner.precision", "loss.ratio_reference"),
            advice="try model.dtype = 'float32', if it is rounding; else loss.ratio_reference = 'proximal'",
        )


def _is_fresh(step: dict[str, float]) -> bool:
    return step.get("staleness_max") == 0 and _is_number(step.get("mismatch_k3"))


def _entropy(run: History) -> Iterator[Finding]:
    first, now = run.at_first("entropy"), run.lately("entropy")
    wrong, best = run.lately("all_wrong_fraction"), max(run.values("reward"), default=math.nan)
    stuck = wrong > 0.2 or run.lately("reward") < 0.8 * best
    if now < COLLAPSED * first and stuck:
        yield Finding(
            name="entropy collapse",
            metric="entropy",
            value=now,
            text=f"Entropy fell from {first:.3g} to {now:.3g} nats a token with problems still unsolved: "
            "the policy no longer tries anything else.",
            settings=("learner.learning_rate", "loss.eps_high", "sampling.group_size"),
            advice="lower learner.learning_rate, raise loss.eps_high or sampling.group_size",
        )
    elif now > EXPLODED * first:
        yield Finding(
            name="the policy falls apart",
            metric="entropy",
            value=now,
            text=f"Entropy rose from {first:.3g} to {now:.3g} nats a token.",
            settings=("learner.learning_rate", "learner.max_staleness"),
            advice="go back to an earlier version; lower learner.learning_rate or learner.max_staleness",
        )


def _length(run: History) -> Iterator[Finding]:
    growth = run.lately("response_length") / (run.at_first("response_length") or math.nan)
    gain = run.lately("reward") - run.at_first("reward")
    truth = run.lately("accuracy") - run.at_first("accuracy")
    repeats = run.lately("repetition_correct")
    hollow = (gain > 0.05 and truth < gain / 4) or repeats > REPEATED
    if growth > LONGER and hollow:
        seen = (
            f"held-out accuracy by {truth:+.2f}" if truth == truth else f"{repeats:.0%} of it is repetition"
        )
        yield Finding(
            name="reward hacked by length",
            metric="response_length",
            value=run.lately("response_length"),
            text=f"Responses grew {growth:.1f}-fold and the reward by {gain:+.2f}, but {seen}.",
            settings=("reward.function", "sampling.max_tokens"),
            advice="mend the reward function, or lower sampling.max_tokens",
        )
    cut = run.lately("truncated_fraction")
    if cut > CUT:
        yield Finding(
            name="responses are cut",
            metric="truncated_fraction",
            value=cut,
            text=f"{cut:.0%} of the completions end at sampling.max_tokens, right or wrong.",
            settings=("sampling.max_tokens", "groups.truncated"),
            advice="raise sampling.max_tokens, or set groups.truncated = 'mask'",
        )


def _clipping(run: History) -> Iterator[Finding]:
    for sign, words in (("pos", "good"), ("neg", "bad")):
        clipped = run.lately(f"clip_fraction_{sign}")
        if clipped > MANY_CLIPPED and run.loss != "gspo":  # which clips whole sequences, and many
            yield Finding(
                name="much is clipped",
                metric=f"clip_fraction_{sign}",
                value=clipped,
                text=f"{clipped:.0%} of the tokens of {words} answers are clipped and teach nothing.",
                settings=("learner.learning_rate", "learner.epochs", "learner.max_staleness"),
                advice="lower learner.learning_rate, learner.epochs or learner.max_staleness",
            )
        dual = run.lately(f"dual_clip_fraction_{sign}")
        if dual > MANY_DUAL_CLIPPED:
            yield Finding(
                name="weights are at their cap",
                metric=f"dual_clip_fraction_{sign}",
                value=dual,
                text=f"{dual:.0%} of the tokens of {words} answers have a weight beyond the dual clip.",
                settings=("learner.max_staleness", "loss.ratio_reference"),
                advice="lower learner.max_staleness, or set loss.ratio_reference = 'proximal'",
            )


def _spikes(run: History) -> Iterator[Finding]:
    norms = run.values("grad_norm_max")
    peak = max(norms) / median(norms) if norms and median(norms) > 0 else 0.0
    if peak > SPIKE:
        yield Finding(
            name="gradient spikes",
            metric="grad_norm_max",
            value=max(norms),
            text=f"The largest gradient is {peak:.0f} times the median one.",
            settings=("learner.learning_rate", "learner.max_grad_norm", "loss.dual_clip_neg"),
            advice="lower learner.learning_rate or learner.max_grad_norm; keep the dual clips on",
        )


def _effective(run: History) -> Iterator[Finding]:
    share = run.lately("ess_fraction")
    if share < FEW_EFFECTIVE:
        yield Finding(
            name="few tokens decide",
            metric="ess_fraction",
            value=share,
            text=f"The weights are so uneven that {share:.0%} of the tokens count.",
            settings=("learner.max_staleness", "loss.behavior_correction"),
            advice="lower learner.max_staleness, or set loss.behavior_correction = 'truncate'",
        )


def _groups(run: History) -> Iterator[Finding]:
    alike = run.lately("uninformative_fraction")
    if alike > ALIKE:
        right, wrong = run.lately("all_right_fraction"), run.lately("all_wrong_fraction")
        kind = "solved" if right > wrong else "unsolved"
        yield Finding(
            name="nothing to learn from",
            metric="uninformative_fraction",
            value=alike,
            text=f"{alike:.0%} of the groups have one reward throughout; most are {kind}.",
            settings=("data.path", "sampling.group_size", "groups.refill"),
            advice=f"use {'harder' if right > wrong else 'easier'} prompts, or raise sampling.group_size",
        )


def _starving(run: History) -> Iterator[Finding]:
    steady = run.steps[WARM_UP:][-len(run.tail) :]
    waited = sum(_values(steady, "wait_seconds"))
    worked = sum(sum(_values(steady, f"{name}_seconds")) for name in ("train", "publish", "checkpoint"))
    share = waited / (waited + worked) if waited + worked else 0.0
    if share > WAITING:
        yield Finding(
            name="the learner starves",
            metric="wait_seconds",
            value=waited / len(steady),
            text=f"It waits for rollouts {share:.0%} of the time.",
            settings=("actor.engine.max_num_seqs", "learner.max_staleness"),
            advice="add actors, raise actor.engine.max_num_seqs, or learner.max_staleness",
        )


def _faults(run: History) -> Iterator[Finding]:
    failed, aside = run.lately("reward_failed_fraction"), run.lately("ended_quarantined")
    if failed > 0:
        yield Finding(
            name="the reward function fails",
            metric="reward_failed_fraction",
            value=failed,
            text=f"It raised, hung or gave no number for {failed:.1%} of the samples.",
            settings=("reward.function", "reward.timeout_s"),
            advice="the actors' logs say where; mend it or raise reward.timeout_s",
        )
    if aside > 0:
        yield Finding(
            name="groups were set aside",
            metric="ended_quarantined",
            value=max(run.values("ended_quarantined")),
            text="Rollouts came that could not be used.",
            settings=(),
            advice="aspo quarantine ls says why",
        )


RULES: tuple[Callable[[History], Iterator[Finding]], ...] = (
    _not_finite,
    _faults,
    _mismatch,
    _inert,
    _stale,
    _entropy,
    _length,
    _clipping,
    _spikes,
    _effective,
    _groups,
    _starving,
)
