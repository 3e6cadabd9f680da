"""The study's cells with the full service: every part a process, as `aspo up` runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aspo.config import load_config
from aspo_study import confirm
from aspo_study.cells import LOSSES
from aspo_study.tasks import TASKS
from aspo_study.trial import config_of

RATES = dict.fromkeys(LOSSES, 1e-4)


def test_the_service_gets_the_cells_settings(tmp_path: Path) -> None:
    (cell, *others) = confirm.confirmations(1, RATES)
    assert {(c.loss, c.staleness) for c in (cell, *others)} == {("aspo", 0), ("aspo", 4), ("grpo", 4)}
    config = load_config(confirm.write_config(cell, tmp_path / "model", tmp_path))
    own = config_of(cell, tmp_path / "model")
    assert config.loss == own.loss
    assert config.sampling == own.sampling
    plain = {"port", "threads", "checkpoint_every"}  # where it runs, not what it learns
    assert config.learner.model_dump(exclude=plain) == own.learner.model_dump(exclude=plain)
    assert config.reward.function == "aspo_cli.demo_task:correct_sum"
    held_out = set((tmp_path / "held_out.jsonl").read_text().splitlines())
    assert held_out.isdisjoint((tmp_path / "train.jsonl").read_text().splitlines())


@pytest.mark.vllm
@pytest.mark.faults
def test_a_small_confirmation_starts_ends_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "addition", replace(TASKS["addition"], warm_steps=60))
    cells = list(confirm.confirmations(1, RATES, steps=3))[1:2]
    (row,) = confirm.confirm(cells, tmp_path)
    assert row["steps"] == 3
    assert 0 <= row["accuracy_after"] <= 1
    assert row["staleness_max"] <= 4
    assert not list(confirm.confirm(cells, tmp_path))
