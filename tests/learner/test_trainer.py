"""Scoring, batching and the training step, against plain transformers and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aspo.config import Config, ConfigError, LearnerConfig, LossConfig
from aspo_learner.batching import micro_batches, repetition, sequences_of
from aspo_learner.optimizer import DivergedError, Updater
from aspo_learner.policy import Policy
from aspo_learner.trainer import Trainer, build_loss
from models import save_model
from rollouts import make_group, write_config

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", tied=request.param, hidden_size=64, layers=2)


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", hidden_size=64, layers=2)


def make_trainer(config: Config) -> Trainer:
    return Trainer(Policy(config.model, CPU), config)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_the_models_own_log_softmax(
    model_folder: Path, tmp_path: Path, temperature: float
) -> None:
    policy = Policy(write_config(tmp_path, model=model_folder).model, CPU)
    groups = [make_group(policy.model, seed=seed, temperature=temperature) for seed in range(3)]
    sequences = [s for n, g in enumerate(groups) for s in sequences_of(g, [1.0] * len(g), n)]
    seen = []
    for batch in micro_batches(sequences, range(len(sequences)), max_tokens=40, device=CPU):
        logprobs, entropy = policy.score(batch, temperature)
        torch.testing.assert_close(
            logprobs[batch.mask], batch.behavior_logprobs[batch.mask], rtol=0, atol=2e-5
        )
        assert (entropy[batch.mask] > 0).all()
        assert not logprobs[~batch.mask].any()
        assert batch.input_ids.numel() <= 40 or len(batch.indices) == 1
        seen += batch.indices
    assert sorted(seen) == list(range(len(sequences)))


def flat(trainer: Trainer) -> Tensor:
    """All weights as one vector [P]."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.model.parameters()])


def test_an_update_does_not_depend_on_the_micro_batches(small_model: Path, tmp_path: Path) -> None:
    runs = []
    for tokens in (12, 10_000):
        overrides = [f"learner.micro_batch_tokens={tokens}", "run.seed=3", "learner.learning_rate=0.5"]
        config = write_config(tmp_path, model=small_model, overrides=overrides)
        trainer = make_trainer(config)
        # The update is the gradient: Adam takes a whole step where a gradient is nothing but rounding.
        trainer.updater.optimizer = torch.optim.SGD(trainer.policy.model.parameters())
        start = flat(trainer)
        metrics = trainer.train_step([make_group(trainer.policy.model, seed=seed) for seed in range(4)])
        runs.append((flat(trainer) - start, metrics))
    (update, metrics), (other_update, other_metrics) = runs
    torch.testing.assert_close(update, other_update, rtol=1e-4, atol=1e-6)
    assert float((update - other_update).norm() / update.norm()) < 1e-5
    for name, value in metrics.items():
        assert value == pytest.approx(other_metrics[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.ratio_reference=proximal"],
        ["loss.ratio_reference=proximal", "loss.behavior_correction=mask", "loss.correction_level=sequence"],
        ["loss.kl_coefficient=0.01", "learner.epochs=3"],
        ["loss.entropy_split_clip=true"],
        *[[f"groups.advantage={name}"] for name in ("dr-grpo", "rloo", "reinforce++")],
        *[
            [f"loss.name={name}"]
            for name in ("no-is", "response-mean", "ratio", "grpo", "dapo", "cispo", "gspo")
        ],
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_training_raises_the_probability_of_rewarded_completions(
    small_model: Path, tmp_path: Path, overrides: Sequence[str]
) -> None:
    trainer = make_trainer(
        write_config(tmp_path, model=small_model, overrides=["learner.epochs=2", *overrides])
    )
    groups = [make_group(trainer.policy.model, seed=seed) for seed in range(4)]
    metrics = trainer.train_step(groups)
    better, worse = [], []
    for group in groups:
        after = rescore(trainer, group)
        gain = after - group.behavior_logprobs
        rewarded = np.repeat(group.rewards > 0, group.lengths)
        better.append(gain[rewarded].mean())
        worse.append(gain[~rewarded].mean())
    assert np.mean(better) > np.mean(worse)
    assert metrics["updates"] == 2 * trainer._config.epochs
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize(
    ("overrides", "negative", "positive"),
    [
        ([], [1.1, 0.9, 0.0, 3.0], [1 / 1.1, 1 / 0.9, 2.0, 0.0]),
        (["loss.name=ratio"], [1.1, 0.9, 0.0, 3.0], [1.1, 0.9, 0.5, 0.0]),
        (["loss.aggregation=seq-mean-token-mean"], [1.1, 0.9, 0.0, 3.0], [1 / 1.1, 1 / 0.9, 2.0, 0.0]),
        (["loss.name=cispo"], [1.1, 0.9, 0.5, 4.0], [1.1, 0.9, 0.5, 4.0]),
    ],
)
def test_traces_tell_each_tokens_log_prob_and_weight(
    small_model: Path, tmp_path: Path, overrides: Sequence[str], negative: list[float], positive: list[float]
) -> None:
    """Against the closed form, of ratios that are known: 1.1, 0.9, 0.5 and 4 by turns."""
    overrides = [*overrides, "learner.mini_batch_prompts=4", "learner.micro_batch_tokens=20"]
    trainer = make_trainer(write_config(tmp_path, model=small_model, overrides=overrides))
    groups, expected = [], {}
    for seed in range(5):
        group = make_group(trainer.policy.model, uid=f"test:train:{seed}", seed=seed)
        turns = np.arange(len(group.token_ids)) % 4
        shift = np.log([1.1, 0.9, 0.5, 4.0]).astype(np.float32)[turns]
        groups.append(dataclasses.replace(group, behavior_logprobs=group.behavior_logprobs - shift))
        by_sign = np.array([negative, positive])[
            np.repeat((group.rewards > 0).astype(int), group.lengths), turns
        ]
        for sample, (start, stop) in enumerate(itertools.pairwise(group.offsets)):
            expected[group.uid, sample] = group.behavior_logprobs[start:stop], by_sign[start:stop]
    ignored = np.ones(len(groups[0].token_ids), dtype=np.float32)
    ignored[-1] = 0.0
    expected[groups[0].uid, 3][1][-1] = np.nan
    assert groups[0].lengths[3] > 1
    trainer.train_step(groups, [ignored, *[np.ones_like(g.behavior_logprobs) for g in groups[1:]]])
    assert trainer.token_traces.keys() == {key for key in expected if key[0] != groups[4].uid}, "four groups"
    for key, trace in trainer.token_traces.items():
        logprobs, weights = expected[key]
        trained = ~np.isnan(weights)
        np.testing.assert_allclose(trace.weights, weights, rtol=1e-3)
        np.testing.assert_allclose(trace.logprobs[trained], logprobs[trained], atol=1e-4)
        assert np.isnan(trace.logprobs[~trained]).all()
        assert trace.weights.base.nbytes == 8 * len(weights), "none of the micro-batch's padding is kept"
        assert trace.advantage == pytest.approx(0.866 * (1 if key[1] % 2 else -1), abs=0.2)


def rescore(trainer: Trainer, group: object) -> np.ndarray:
    sequences = list(sequences_of(group, [0.0] * 4, 0))  # type: ignore[arg-type]
    scores: dict[int, np.ndarray] = {}
    for batch in micro_batches(sequences, range(4), max_tokens=10_000, device=CPU):
        with torch.no_grad():
            logprobs, _ = trainer.policy.score(batch, 1.0)
        scores |= {i: logprobs[row][batch.mask[row]].numpy() for row, i in enumerate(batch.indices)}
    return np.concatenate([scores[i] for i in range(4)])


def test_groups_that_teach_nothing_leave_the_weights_alone(small_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(write_config(tmp_path, model=small_model))
    before = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    metrics = trainer.train_step([make_group(trainer.policy.model, rewards=[1.0] * 4)])
    assert metrics["uninformative_fraction"] == 1
    for name, tensor in trainer.policy.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_group_without_a_token_to_train_on_makes_no_update(small_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(write_config(tmp_path, model=small_model))
    groups = [make_group(trainer.policy.model, seed=seed) for seed in range(2)]
    weights = [np.full(group.lengths.sum(), number, np.float32) for number, group in enumerate(groups)]
    metrics = trainer.train_step(groups, weights)
    assert (metrics["updates"], metrics["uninformative_fraction"]) == (1, 0.5)


def test_a_fresh_batch_with_one_update_is_reported_as_inert(
    small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(
        tmp_path,
        model=small_model,
        overrides=[
            "loss.ratio_reference=proximal",
            "learner.batch_prompts=2",
            "learner.mini_batch_prompts=2",
        ],
    )
    trainer = make_trainer(config)
    with caplog.at_level(logging.WARNING):
        trainer.train_step([make_group(trainer.policy.model, seed=seed) for seed in range(2)])
    assert "equals plain policy gradient" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        stale = [make_group(trainer.policy.model, seed=seed) for seed in range(2, 4)]
        trainer.train_step(stale)
        trainer._loss_config = trainer._loss_config.model_copy(update={"ratio_reference": "behavior"})
        caplog.clear()
        trainer.train_step(stale)
    assert "equals plain policy gradient" not in caplog.text


def test_staleness_shows_in_the_ratio_and_the_mismatch(small_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(write_config(tmp_path, model=small_model))
    stale = [make_group(trainer.policy.model, seed=seed) for seed in range(4)]
    trainer.train_step([make_group(trainer.policy.model, seed=seed) for seed in range(10, 14)])
    metrics = trainer.train_step(stale)
    assert metrics["ratio_p01"] < 0.999
    assert metrics["ratio_max"] > 1.001
    assert metrics["mismatch_k3"] > 0


def test_a_non_finite_gradient_skips_the_update(small_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(write_config(tmp_path, model=small_model))
    with torch.no_grad():
        next(trainer.policy.model.parameters())[0, 0] = float("inf")
    groups = [
        make_group(Policy(trainer_config(tmp_path, small_model).model, CPU).model, seed=s) for s in (0, 1)
    ]
    metrics = trainer.train_step(groups)
    assert metrics["skipped_updates"] == 2
    assert trainer.updater.updates == 0


def test_a_run_of_non_finite_gradients_ends(small_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        write_config(tmp_path, model=small_model, overrides=["learner.max_skipped_updates=3"])
    )
    groups = [make_group(trainer.policy.model, seed=seed) for seed in range(4)]
    weight = next(trainer.policy.model.parameters())
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("inf")
    trainer.train_step(groups[:2])
    with torch.no_grad():
        weight.copy_(whole)
    trainer.train_step(groups[:2])
    state = trainer.state()
    assert state["skipped"] == 2
    assert state["skipped_in_a_row"] == 0
    with torch.no_grad():
        weight[0, 0] = float("inf")
    trainer.train_step(groups[:2])
    with pytest.raises(DivergedError, match="3 gradients in a row were not finite"):
        trainer.train_step(groups)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_warms_up_and_then_stays_or_falls(schedule: str) -> None:
    config = LearnerConfig(
        learning_rate=1.0,
        warmup_updates=4,
        schedule=schedule,
        steps=10,
        batch_prompts=4,
        mini_batch_prompts=2,
    )
    updater = Updater([torch.nn.Parameter(torch.zeros(1))], config)
    rates = []
    for updater.updates in range(22):
        rates.append(updater.learning_rate())
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    if schedule == "constant":
        assert set(rates[4:]) == {1.0}
    else:
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5), "half way"
        assert rates[19:] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_loglinear_proximal_lies_between_sampler_and_policy(
    small_model: Path, tmp_path: Path, lag: int
) -> None:
    overrides = ["loss.ratio_reference=proximal", "loss.proximal_source=loglinear", "learner.epochs=1"]
    trainer = make_trainer(write_config(tmp_path, model=small_model, overrides=overrides))
    group = make_group(trainer.policy.model)
    later = dataclasses.replace(group, behavior_logprobs=group.behavior_logprobs - np.float32(0.3))
    metrics = trainer.train_step([later], lags=[np.full(group.offsets[-1], lag, dtype=np.int32)])
    # All tokens are 0.3 nats more likely than when sampled: r has the part of it after the start, s the rest.
    start = lag / (lag + 1)
    assert metrics["ratio_p50"] == pytest.approx(np.exp(0.3 * (1 - start)), rel=1e-3)
    assert metrics["mismatch_ratio_p50"] == pytest.approx(np.exp(0.3), rel=1e-3)


def test_activation_checkpointing_changes_no_gradient(small_model: Path, tmp_path: Path) -> None:
    config, found = write_config(tmp_path, model=small_model), []
    for checkpointed in (False, True):
        trainer = Trainer(Policy(config.model, CPU, checkpoint_activations=checkpointed), config)
        groups = [make_group(trainer.policy.model, seed=seed) for seed in range(4)]
        calls = count_layer_calls(trainer)
        metrics = trainer.train_step(groups)
        found.append((metrics["grad_norm"], flat(trainer), len(calls)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][2] == 2 * found[0][2], "each layer runs once more in backward"


def count_layer_calls(trainer: Trainer) -> list[object]:
    calls: list[object] = []
    layer = trainer.policy.model.base_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *call: calls.append(call[0]))
    return calls


def test_bf16_products_stay_near_fp32(small_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model=small_model)
    group = make_group(Policy(config.model, CPU).model)
    sequences = list(sequences_of(group, [1.0] * 4, 0))
    (batch,) = micro_batches(sequences, range(4), max_tokens=10_000, device=CPU)
    with torch.no_grad():
        exact, half = (Policy(config.model, CPU, precision=p).score(batch, 1.0)[0] for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


def trainer_config(tmp_path: Path, model: Path) -> Config:
    return write_config(tmp_path, model=model)


def test_settings_that_a_loss_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss.dual_clip_pos: the loss 'gspo' has no such setting"):
        build_loss(LossConfig(name="gspo", dual_clip_pos=2.0))
    with pytest.raises(ConfigError, match="split clip"):
        build_loss(LossConfig(name="cispo", entropy_split_clip=True))


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    config = write_config(tmp_path, model=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"model.path .* cannot be loaded") as caught:
        Policy(config.model, CPU)
    assert "\n" not in str(caught.value)


def test_repetition_counts_repeated_four_grams() -> None:
    assert repetition(np.arange(10, dtype=np.int32)) == 0
    assert repetition(np.array([1, 2, 3], dtype=np.int32)) == 0
    assert repetition(np.zeros(13, dtype=np.int32)) == pytest.approx(0.9)


def test_the_parts_of_a_step_are_timed_if_asked_for_and_make_it_up(small_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model=small_model, overrides=["loss.kl_coefficient=0.1"])
    trainer = make_trainer(config)
    groups = [make_group(trainer.policy.model, seed=seed) for seed in range(4)]
    trainer.train_step(groups)
    assert trainer.phases.seconds is None
    trainer.phases.seconds = {}
    began = time.perf_counter()
    trainer.train_step(groups)
    took = time.perf_counter() - began
    parts = trainer.phases.seconds
    assert set(parts) == {"advantages", "packing", "forward", "loss", "backward", "optimizer", "metrics"}
    assert 0.5 * took < sum(parts.values()) <= took  # no part is counted twice
