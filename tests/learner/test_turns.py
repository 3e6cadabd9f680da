"""Conversations with an environment: whose tokens are trained on and counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from aspo.schemas import PolicyVersion, RolloutGroup
from aspo_learner.batching import micro_batches, sequences_of
from aspo_learner.policy import Policy
from aspo_learner.report import describe_batch
from aspo_learner.staleness import StalenessRule
from aspo_learner.trainer import Trainer
from models import save_model
from rollouts import make_group, make_plain_group, write_config

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", hidden_size=64, layers=2)


def converse(group: RolloutGroup) -> RolloutGroup:
    """The same group, of whose samples the second and the third last tokens are an environment's."""
    turns = tuple((n - 3, 2, 1) if n > 3 else (n,) for n in group.lengths.tolist())
    spoken = dataclasses.replace(group, turns=turns)
    assert not spoken.by_model.all()
    return dataclasses.replace(
        spoken, behavior_logprobs=np.where(spoken.by_model, group.behavior_logprobs, 0).astype(np.float32)
    )


def test_runs_say_whose_a_token_is() -> None:
    group = make_plain_group([[("test/1/0", 6)], [("test/1/0", 2)]])
    assert group.by_model.all()
    assert group.model_lengths.tolist() == [6, 2]
    group = dataclasses.replace(group, turns=((1, 2, 1, 1, 1), (2,)))
    assert group.by_model.tolist() == [True, False, False, True, False, True, True, True]
    assert group.model_lengths.tolist() == [3, 2]


def test_an_environments_tokens_have_no_part_in_the_gradient(model: Path, tmp_path: Path) -> None:
    """The loss reads no logit that predicts one: not one row of the gradient before the head, but theirs."""
    policy = Policy(write_config(tmp_path, model=model).model, CPU)
    group = converse(make_group(policy.model, seed=1))
    seen: list[torch.Tensor] = []

    def keep(module: object, given: object, output: object) -> None:
        hidden = output.last_hidden_state  # type: ignore[attr-defined]
        hidden.retain_grad()
        seen.append(hidden)

    policy.model.base_model.register_forward_hook(keep)
    [batch] = micro_batches(
        list(sequences_of(group, [1.0, -1.0, 0.5, 2.0], 0)), range(4), max_tokens=10_000, device=CPU
    )
    logprobs, entropy = policy.score(batch, 1.0)
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    touched = (seen[0].grad[0] != 0).any(-1).tolist()  # type: ignore[index]
    expected = []
    for row in batch.indices:
        by_model = np.split(group.by_model, group.offsets[1:-1])[row].tolist()
        expected += [*[False] * (len(group.prompt_ids) - 1), *by_model, False]
    assert touched == expected
    assert int(batch.mask.sum()) == group.by_model.sum()
    assert not entropy[~batch.mask].any()


@pytest.mark.parametrize("reference", ["behavior", "proximal"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_update_is_that_of_the_models_tokens_alone(
    model: Path, tmp_path: Path, reference: str, aggregation: str
) -> None:
    overrides = [f"loss.ratio_reference={reference}", f"loss.aggregation={aggregation}"]
    config = write_config(tmp_path, model=model, overrides=[*overrides, "loss.kl_coefficient=0.1"])
    found = []
    for known in (True, False):
        trainer = Trainer(Policy(config.model, CPU), config)
        groups = [converse(make_group(trainer.policy.model, seed=seed)) for seed in range(4)]
        weights = [group.by_model.astype(np.float32) for group in groups]
        if known:
            metrics = trainer.train_step(groups)
        else:  # what was said in between is masked by hand
            metrics = trainer.train_step([dataclasses.replace(group, turns=()) for group in groups], weights)
        parameters = [parameter.detach().flatten() for parameter in trainer.policy.model.parameters()]
        found.append((torch.cat(parameters), metrics))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_only_the_models_tokens_are_counted() -> None:
    versions = [[("test/1/3", 3), ("test/1/0", 3)], [("test/1/3", 4)]]
    group = dataclasses.replace(make_plain_group(versions), turns=((2, 3, 1), (4,)))
    rule = StalenessRule(max_staleness=2, policy="mask")
    current = PolicyVersion(run="test", epoch=1, step=3)
    metrics = describe_batch(rule, [group], [rule.weights(group, current)], [], current)
    assert metrics["tokens"] == 7
    assert metrics["response_length"] == metrics["response_length_arrived"] == 3.5
    assert metrics["stale_tokens_masked"] == 1
    assert metrics["turns"] == 1.5
    assert metrics["environment_tokens"] == 3
    single = dataclasses.replace(group, turns=())
    assert "turns" not in describe_batch(rule, [single], [rule.weights(single, current)], [], current)
