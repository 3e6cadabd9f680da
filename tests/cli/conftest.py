"""Fixtures of runs with faults: a project to disturb, and the outcome of one left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crashing import Outcome, Project, run_undisturbed


@pytest.fixture
def project(tmp_path: Path, redis_url: str, run: str) -> Iterator[Project]:
    """A project on the session's Redis."""
    with Project(tmp_path / "disturbed", redis_url, run) as project:
        yield project


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Outcome:
    """The outcome of the same run without a fault; it depends on nothing else."""
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), redis_url)
