"""docs/reference is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from aspo.telemetry import unit_of
from aspo_cli.reference import pages

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


def test_the_reference_is_what_the_code_says() -> None:
    made = pages()
    assert {path.name for path in FOLDER.iterdir()} == made.keys()
    for name, text in made.items():
        assert (FOLDER / name).read_text() == text, f"{name} is stale; run: aspo docs docs/reference"


def test_the_pages_say_scopes_bounds_and_secrets_rightly() -> None:
    made = pages()
    for line in (
        "| `POST /v1/drain` | operator |",
        "| `GET /v1/status` | reader |",
        "| `GET /livez` | none |",
        "| `GET /v1/weights/{version}` | actor |",
    ):
        assert line in made["http.md"]
    assert "| `temperature` | float ≥ 0.01, ≤ 2 | `1.0` |" in made["config.md"]
    assert "| `path` | string | required | Model folder" in made["config.md"]
    assert "| `--seed` | Seeds model, data, sampling and training. | `0` |" in made["cli.md"]
    assert "`aspo_learner_set_reward{set}`" in made["metrics.md"]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("wait_seconds", "seconds"),
        ("weights_bytes", "bytes"),
        ("weight_bytes_from_peers", "bytes"),
        ("entropy", "nats/token"),
        ("clip_fraction_pos", "share"),
        ("stale_tokens_masked", "tokens"),
        ("tokens_per_second", "tokens/s"),
        ("staleness_max", "versions"),
        ("queue_rollouts", "groups"),
        ("ratio_mean", "1"),
    ],
)
def test_a_metric_has_a_unit(name: str, unit: str) -> None:
    assert unit_of(name) == unit
