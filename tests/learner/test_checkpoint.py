"""Checkpoints: bit-equal resumption, damage noticed before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aspo.config import ConfigError
from aspo.queue import QUARANTINE_LENGTH
from aspo_learner.checkpoint import CheckpointError, Checkpoints
from aspo_learner.ledger import Ledger
from aspo_learner.policy import Policy
from aspo_learner.trainer import Trainer
from models import save_model
from rollouts import make_group, write_config


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return new_trainer(tmp_path)


def new_trainer(tmp_path: Path) -> Trainer:
    folder = tmp_path / "model"
    if not folder.exists():
        save_model(folder, hidden_size=64, layers=2)
    config = write_config(tmp_path, model=folder, overrides=["learner.epochs=2"])
    return Trainer(Policy(config.model, torch.device("cpu")), config)


def train(trainer: Trainer, seeds: range) -> list[float]:
    source = new_groups(trainer, seeds)
    return [trainer.train_step(groups)["loss"] for groups in source]


def new_groups(trainer: Trainer, seeds: range) -> list[list[object]]:
    torch.manual_seed(0)
    return [[make_group(trainer.policy.model, seed=4 * seed + i) for i in range(4)] for seed in seeds]  # type: ignore[misc]


def test_a_resumed_run_goes_on_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    train(trainer, range(2))
    checkpoints.save(2, trainer.policy.model, trainer.optimizer, {"trainer": trainer.state()})
    losses = train(trainer, range(2, 4))

    resumed = new_trainer(tmp_path)
    state = checkpoints.load(resumed.policy.model, resumed.optimizer)
    assert state is not None
    assert state["step"] == 2
    resumed.load_state(state["trainer"])
    assert train(resumed, range(2, 4)) == losses
    for name, tensor in trainer.policy.model.state_dict().items():
        assert torch.equal(tensor, resumed.policy.model.state_dict()[name]), name


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(
    trainer: Trainer, tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    train(trainer, range(1))
    for step in (1, 2):
        checkpoints.save(step, trainer.policy.model, trainer.optimizer, {"trainer": trainer.state()})
    path = tmp_path / "checkpoints" / "step-00000002-0000" / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    state = checkpoints.load(trainer.policy.model, trainer.optimizer)
    assert state is not None
    assert state["step"] == 1
    assert "step-00000002-0000 is damaged" in caplog.text


def test_only_the_newest_are_kept_and_a_half_written_one_is_not_one(trainer: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    (folder / ".partial-00000009").mkdir()
    for step in range(4):
        checkpoints.save(step, trainer.policy.model, trainer.optimizer, {"trainer": trainer.state()})
    assert [path.name for path in sorted(folder.glob("step-*"))] == [
        "step-00000002-0000",
        "step-00000003-0000",
    ]
    state = checkpoints.load(trainer.policy.model, trainer.optimizer)
    assert state is not None
    assert state["step"] == 3


def test_saving_a_step_again_keeps_the_first_until_the_second_is_whole(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(4, trainer.policy.model, trainer.optimizer, {"mark": "first"})

    def no_space(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("aspo_learner.checkpoint.os.replace", no_space)
        with pytest.raises(CheckpointError, match="No space"):
            checkpoints.save(4, trainer.policy.model, trainer.optimizer, {"mark": "second"})
    for mark in ("first", "third"):
        state = checkpoints.load(trainer.policy.model, trainer.optimizer)
        assert state is not None
        assert state["mark"] == mark
        checkpoints.save(4, trainer.policy.model, trainer.optimizer, {"mark": "third"})


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_is_never_the_one_that_goes(trainer: Trainer, tmp_path: Path, keep: int) -> None:
    """However often a step is saved again, and beside damaged checkpoints of later steps."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=keep)
    for step in (15, 20):
        checkpoints.save(step, trainer.policy.model, trainer.optimizer, {"mark": -1})
    for path in folder.glob("step-*/state.json"):
        path.write_text("spoilt")
    assert checkpoints.load(trainer.policy.model, trainer.optimizer) is None
    for mark, step in enumerate((5, 10, 10, 10, 10, 10)):
        checkpoints.save(step, trainer.policy.model, trainer.optimizer, {"mark": mark})
        state = checkpoints.load(trainer.policy.model, trainer.optimizer)
        assert state is not None
        assert state["mark"] == mark
    assert len(list(folder.glob("step-*"))) == keep


def test_a_checkpoint_of_another_model_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, trainer.policy.model, trainer.optimizer, {})
    other = save_model(tmp_path / "other", hidden_size=32, layers=2)
    config = write_config(tmp_path, model=other)
    policy = Policy(config.model, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"is of another model .*; choose another run\.name"):
        checkpoints.load(policy.model, trainer.optimizer)


def test_an_empty_folder_means_a_new_run(trainer: Trainer, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).load(trainer.policy.model, trainer.optimizer) is None


def test_the_ledger_is_a_set_that_stays_small() -> None:
    ledger = Ledger()
    for index in (0, 2, 1, 5, 1):
        ledger.add(index)
    assert [i for i in range(8) if i in ledger] == [0, 1, 2, 5]
    assert len(ledger) == 4
    assert ledger.missing_below(7) == [3, 4, 6]
    assert ledger.state() == {"watermark": 3, "beyond": [5], "set_aside": [], "reopened": []}
    assert Ledger.load(ledger.state()).missing_below(7) == [3, 4, 6]


def test_only_a_task_that_was_set_aside_can_be_reopened_and_only_once() -> None:
    ledger = Ledger()
    ledger.add(0)
    for index in (0, 1, 3):
        ledger.set_aside(index)
    ledger = Ledger.load(ledger.state())
    assert not ledger.reopen(0), "trained before its poison came"
    assert ledger.reopen(1)
    assert not ledger.reopen(1)
    ledger = Ledger.load(ledger.state())
    assert len(ledger) == 2
    assert ledger.missing_below(4) == [1, 2]
    for index in (1, 3):  # 3 was answered well without being reopened: dropped as stale, say
        ledger.add(index)
        assert index in ledger
        assert not ledger.reopen(index)
    assert len(ledger) == 3
    assert ledger.missing_below(4) == [2]


def test_the_ledger_remembers_no_more_than_the_quarantine_holds() -> None:
    ledger = Ledger()
    for index in range(QUARANTINE_LENGTH + 1):
        ledger.set_aside(index)
    assert not ledger.reopen(0)
    assert ledger.reopen(1)
    assert ledger.reopen(QUARANTINE_LENGTH)
