"""What becomes of late rollouts: weights against per-token loops, and the updates they lead to."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aspo.schemas import PolicyVersion, RolloutGroup, VersionSpan
from aspo_learner.policy import Policy
from aspo_learner.staleness import StalenessRule, describe_staleness
from aspo_learner.trainer import Trainer
from models import save_model
from rollouts import make_group, make_plain_group, write_config

CPU = torch.device("cpu")
POLICIES = ["drop", "mask", "decay"]
NOW = PolicyVersion(epoch=2, step=12, run="test")
BRANCH = 10

quick = settings(max_examples=200, deadline=None, database=None)
versions = st.builds("test/{}/{}".format, st.just(2), st.integers(BRANCH, NOW.step)) | st.builds(
    "test/{}/{}".format, st.just(1), st.integers(0, 20)
)
samples = st.lists(st.tuples(versions, st.integers(1, 4)), min_size=1, max_size=3)
groups = st.lists(samples, min_size=2, max_size=4).map(make_plain_group)
rules = st.builds(
    StalenessRule,
    max_staleness=st.integers(0, 6),
    policy=st.sampled_from(POLICIES),
    decay=st.floats(0.1, 0.9),
    branch=st.just(BRANCH),
)


def oracle_lags(group: RolloutGroup) -> list[int]:
    """Each token's lag, token by token, as the documentation defines it."""
    lags = []
    for sample in group.spans:
        for span in sample:
            for _ in range(span.length):
                _, epoch, step = span.version.split("/")
                reached = int(step) if int(epoch) == NOW.epoch else min(int(step), BRANCH)
                lags.append(NOW.step - reached)
    return lags


def oracle_weights(group: RolloutGroup, rule: StalenessRule) -> list[float] | None:
    """Each token's weight, None for a group that goes."""
    lags = oracle_lags(group)
    late = [lag > rule.max_staleness for lag in lags]
    if rule.policy == "decay":
        return [rule.decay ** (lag - rule.max_staleness) if lag > rule.max_staleness else 1.0 for lag in lags]
    if (rule.policy == "drop" and any(late)) or all(late):
        return None
    return [0.0 if is_late else 1.0 for is_late in late]


@quick
@given(groups, rules)
def test_each_token_is_weighted_by_its_own_version(group: RolloutGroup, rule: StalenessRule) -> None:
    want = oracle_weights(group, rule)
    assert rule.staleness_of(group, NOW) == max(oracle_lags(group))
    assert rule.token_lags(group, NOW).tolist() == oracle_lags(group)
    assert rule.admits(group, NOW) == (want is not None)
    if want is not None:
        got = rule.weights(group, NOW)
        assert got.dtype == np.float32
        assert got.tolist() == pytest.approx(want)


def test_a_lag_is_counted_from_the_branch_within_its_epoch_and_never_negative_in_weight() -> None:
    rule = StalenessRule(max_staleness=1, policy="decay", branch=BRANCH)
    for version, lag in (("2/11", 1), ("1/15", 2), ("1/10", 2), ("1/7", 5), ("2/13", -1)):
        group = make_plain_group([[(f"test/{version}", 2)], [("test/2/12", 1)]])
        assert rule.token_lags(group, NOW).tolist() == [lag, lag, 0]
        assert rule.weights(group, NOW).tolist() == [0.5 ** max(0, lag - 1)] * 2 + [1.0]
    continued = dataclasses.replace(rule, branch=12)  # the learner went on from older weights, at step 12
    later = PolicyVersion(epoch=3, step=13, run="test")
    assert continued.staleness_of(make_plain_group([[("test/2/12", 1)], [("test/3/12", 1)]]), later) == 1


def test_however_late_a_decayed_token_is_not_a_masked_one() -> None:
    rule = StalenessRule(max_staleness=0, policy="decay", decay=0.01)
    weights = rule.weights(make_plain_group([[("test/2/0", 1)]]), PolicyVersion(2, 10**6, "test"))
    assert 0 < weights[0] < 1e-30


@quick
@given(st.lists(groups, min_size=1, max_size=4), rules)
def test_the_bias_in_length_is_as_documented(arrived: Sequence[RolloutGroup], rule: StalenessRule) -> None:
    batch = [group for group in arrived if rule.admits(group, NOW)]
    gone = [group for group in arrived if not rule.admits(group, NOW)]
    if not batch:
        return
    weights = [rule.weights(group, NOW) for group in batch]
    got = describe_staleness(rule, batch, weights, [group.lengths for group in gone], NOW)
    masked = decayed = 0
    shares, lengths = [], []
    for group, of_group in zip(batch, weights, strict=True):
        masked += sum(w == 0 for w in of_group)
        decayed += sum(0 < w < 1 for w in of_group)
        at = 0
        for length in group.lengths.tolist():
            shares.append(sum(of_group[at : at + length].tolist()) / length)
            lengths.append(length)
            at += length
    mean = statistics.fmean(int(n) for group in arrived for n in group.lengths)
    trained = sum(e * n for e, n in zip(shares, lengths, strict=True)) / sum(shares)
    assert got["response_length_arrived"] == pytest.approx(mean)
    assert got["response_length_bias"] == pytest.approx(trained / mean - 1, abs=1e-6)
    counts = [got[f"stale_{name}"] for name in ("groups_dropped", "tokens_masked", "tokens_decayed")]
    assert counts == [len(gone), masked, decayed]
    assert got["staleness_max"] == max(max(oracle_lags(group)) for group in batch)


@pytest.mark.parametrize(
    ("policy", "bias"), [("drop", 2 / 3 - 1), ("mask", 2 / 3 - 1), ("decay", 2.4 / 3 - 1)]
)
def test_losing_the_long_responses_shows_as_a_negative_bias(policy: str, bias: float) -> None:
    """Two of length 2 on time, two of length 4 two versions past the bound: 3 on average."""
    rule = StalenessRule(max_staleness=2, policy=policy, decay=0.5)  # type: ignore[arg-type]
    on_time = make_plain_group([[("test/2/12", 2)]] * 2)
    late = make_plain_group([[("test/2/8", 4)]] * 2)  # weight 0.25 under decay
    batch = [group for group in (on_time, late) if rule.admits(group, NOW)]
    dropped = [group.lengths for group in (on_time, late) if not rule.admits(group, NOW)]
    weights = [rule.weights(group, NOW) for group in batch]
    found = describe_staleness(rule, batch, weights, dropped, NOW)
    assert found["response_length_bias"] == pytest.approx(bias)


def with_spans(group: RolloutGroup, rng: np.random.Generator) -> RolloutGroup:
    """The group with versions that change within its samples, from past the bound to fresh."""
    spans = []
    for length in group.lengths.tolist():
        steps = np.sort(rng.integers(6, 13, size=length))
        spans.append(tuple(VersionSpan(f"test/2/{step}", 1) for step in steps))
    return dataclasses.replace(group, spans=tuple(spans))


def oracle_loss(
    model: torch.nn.Module, batch: Sequence[RolloutGroup], weights: Sequence[np.ndarray], aggregation: str
) -> torch.Tensor:
    """ASPO within its clips, one sequence and one token at a time; masked tokens are passed over."""
    total, tokens, sequences = torch.zeros(()), 0, 0
    for group, of_group in zip(batch, weights, strict=True):
        rewards = group.rewards.tolist()
        mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
        for i, (begin, end) in enumerate(zip(group.offsets[:-1], group.offsets[1:], strict=True)):
            advantage = (rewards[i] - mean) / (std + 1e-6)
            completion = group.token_ids[begin:end]
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion]).astype(np.int64))
            scores = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
            terms = []
            for t, token in enumerate(completion.tolist()):
                weight = float(of_group[begin + t])
                if weight > 0:
                    logprob = scores[len(group.prompt_ids) + t - 1, token]
                    r = float(torch.exp(logprob.detach() - float(group.behavior_logprobs[begin + t])))
                    terms.append(-advantage * weight * (1 / r if advantage >= 0 else r) * logprob)
            if terms:
                each = torch.stack(terms).sum()
                total = total + (each / len(terms) if aggregation == "seq-mean-token-mean" else each)
                tokens, sequences = tokens + len(terms), sequences + 1
    return total / (tokens if aggregation == "token-mean" else sequences)


@pytest.mark.parametrize("micro_batch_tokens", [12, 10_000])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("reference", ["behavior", "proximal"])
@pytest.mark.parametrize("policy", ["mask", "decay"])
def test_the_update_is_that_of_the_loss_without_masked_and_with_decayed_tokens(
    tmp_path: Path, policy: str, reference: str, aggregation: str, micro_batch_tokens: int
) -> None:
    overrides = [
        "learner.mini_batch_prompts=4",
        "learner.learning_rate=0.5",
        "learner.max_grad_norm=1e9",
        f"learner.micro_batch_tokens={micro_batch_tokens}",
        f"loss.aggregation={aggregation}",
        f"loss.ratio_reference={reference}",
    ]
    model = save_model(tmp_path / "model", hidden_size=64, layers=1)
    config = write_config(tmp_path, model=model, overrides=overrides)
    trainer = Trainer(Policy(config.model, CPU), config)
    trainer.updater.optimizer = torch.optim.SGD(
        trainer.policy.model.parameters(), lr=0.5
    )  # the update is the gradient
    rng = np.random.default_rng(1)
    rewards = [1.0, 0.0, 0.25, 0.0]
    made = [make_group(trainer.policy.model, seed=seed, rewards=rewards) for seed in range(6)]
    rule = StalenessRule(max_staleness=2, policy=policy, decay=0.5)  # type: ignore[arg-type]
    batch = [group for group in (with_spans(group, rng) for group in made) if rule.admits(group, NOW)]
    weights = [rule.weights(group, NOW) for group in batch]
    gone = [w for group, of in zip(batch, weights, strict=True) for w in np.split(of, group.offsets[1:-1])]
    assert policy == "decay" or any(not w.any() for w in gone), "a response masked from end to end"
    assert 0 < sum((w < 1).sum() for w in weights) < sum(w.size for w in weights)

    twin = Policy(config.model, CPU).model
    oracle_loss(twin, batch, weights, aggregation).backward()
    metrics = trainer.train_step(batch, weights)
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for got, want in zip(trainer.policy.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want - 0.5 * want.grad, rtol=1e-4, atol=2e-6)


def test_a_batch_late_as_a_whole_moves_the_policy_as_much_less(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", hidden_size=64, layers=1)
    config = write_config(tmp_path, model=model, overrides=["learner.mini_batch_prompts=4"])
    norms = []
    for weight in (1.0, 0.25):
        trainer = Trainer(Policy(config.model, CPU), config)
        batch = [make_group(trainer.policy.model, seed=seed) for seed in range(2)]
        weights = [np.full(len(group.token_ids), weight, dtype=np.float32) for group in batch]
        norms.append(trainer.train_step(batch, weights)["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-4)
