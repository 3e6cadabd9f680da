"""The plan of the steps: it only grows, outlives a crash in the middle of a line, and is kept to."""

from __future__ import annotations

from pathlib import Path

import pytest

from aspo_learner.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.jsonl"


def test_a_plan_is_there_after_a_restart(path: Path) -> None:
    journal = Journal(path)
    journal.write(1, [0, 2])
    journal.write(2, [1, 3])
    again = Journal(path)
    assert (again.planned(1), again.planned(2), again.planned(3), again.last) == ([0, 2], [1, 3], None, 2)
    again.write(2, [1, 3])
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_plan_is_never_changed_and_has_no_gaps(path: Path, step: int) -> None:
    journal = Journal(path)
    journal.write(1, [0])
    journal.write(2, [1])
    with pytest.raises(ValueError, match=f"step {step} cannot be planned"):
        journal.write(step, [9])
    assert Journal(path).planned(1) == [0]


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_line_cut_short_by_a_crash_is_no_plan(path: Path, cut: int) -> None:
    journal = Journal(path)
    journal.write(1, [0, 2])
    whole = path.read_bytes()
    journal.write(2, [1, 3])
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert again.last == 1
    assert path.read_bytes() == whole
    again.write(2, [4, 5])
    assert Journal(path).planned(2) == [4, 5]


def test_what_cannot_be_kept_to_is_given_up(path: Path) -> None:
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write(step, [step])
    journal.forget_from(2)
    journal.forget_from(7)
    assert Journal(path).last == journal.last == 1
    journal.write(2, [9])
    assert Journal(path).planned(2) == [9]
