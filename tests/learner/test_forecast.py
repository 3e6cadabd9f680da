"""What a learner says of its memory: before it loads anything, and once it trains."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from aspo.config import ConfigError
from aspo_learner.forecast import MemoryForecast, memory_of, resident
from aspo_learner.policy import load_policy
from aspo_learner.ranks import ALONE, Ranks
from aspo_learner.trainer import Trainer
from models import save_model
from rollouts import make_group, write_config

CPU = torch.device("cpu")


def test_what_cannot_fit_ends_before_any_weight_is_loaded(tmp_path: Path) -> None:
    huge = Qwen3Config(hidden_size=32768, intermediate_size=131072, num_hidden_layers=96)
    huge.save_pretrained(tmp_path / "huge")  # and no weights, which would be missed
    with pytest.raises(
        ConfigError, match=r"weights, gradients and optimizer of .* GiB; cpu has .* learner\.lora"
    ):
        load_policy(write_config(tmp_path, model=tmp_path / "huge"), ALONE)


@pytest.mark.parametrize("setting", ["activation_checkpointing=true", "lora.rank=4", "epochs=1"])
def test_what_may_not_fit_is_said_with_what_to_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    folder = save_model(tmp_path / "model", hidden_size=64, layers=2)
    overrides = ["learner.micro_batch_tokens=1000000000", f"learner.{setting}"]
    forecast = MemoryForecast.foresee(write_config(tmp_path, model=folder, overrides=overrides), ALONE)
    assert forecast is not None
    free, total = memory_of(CPU)
    assert forecast.predicted > total > free > resident() > 2**20
    [said] = caplog.messages
    assert "lower learner.micro_batch_tokens (1000000000)" in said
    assert ("set learner.activation_checkpointing" in said) == ("checkpointing" not in setting)
    assert ("train adapters" in said) == ("lora" not in setting)
    assert "learner.offload" not in said  # there is no other memory than the CPU's


def test_the_peak_is_said_beside_what_was_predicted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, model=save_model(tmp_path / "model", hidden_size=64, layers=2))
    trainer = Trainer(load_policy(config, Ranks(CPU)), config)
    assert not caplog.messages  # there is room enough
    with caplog.at_level(logging.INFO, "aspo_learner.forecast"):
        for _ in range(3):
            trainer.train_step([make_group(trainer.policy.model, seed=seed) for seed in range(4)])
    [said] = [message for message in caplog.messages if "peak memory" in message]
    predicted, measured = map(float, re.findall(r"([\d.]+) GiB", said))
    forecast = trainer.policy.forecast
    assert forecast is not None
    assert predicted == pytest.approx(forecast.predicted / 2**30, rel=0.01)
    assert measured == pytest.approx(forecast.measured / 2**30, rel=0.1)


def test_a_model_that_cannot_be_sized_is_for_the_loading_to_say(tmp_path: Path) -> None:
    odd = Qwen3Config(hidden_act="nonesuch")
    odd.save_pretrained(tmp_path / "odd")
    assert MemoryForecast.foresee(write_config(tmp_path, model=tmp_path / "odd"), ALONE) is None


def test_a_model_that_is_not_there_is_for_the_loading_to_say(tmp_path: Path) -> None:
    assert MemoryForecast.foresee(write_config(tmp_path, model=tmp_path / "none"), ALONE) is None
