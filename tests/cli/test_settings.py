"""`aspo config`: where each setting comes from, what is never shown, and the schema for editors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from aspo.effective import effective
from aspo_cli.demo import write_config
from aspo_cli.main import app
from aspo_cli.settings import config_schema

TOML = """\
[run]
name = "sums"
[model]
path = "model"
[data]
path = "questions.jsonl"
[redis]
url = "rediss://learner:hunter2@redis:6379/0?password=hunter2"
[reward]
options = { api_key = "hunter2", max_tokens = 8, nested = { auth_token = "hunter2" }, apikey = "hunter2" }
[environment]
options = { headers = { Authorization = "hunter2" } }
[trackers]
wandb = { anonymous_key = "hunter2" }
[auth]
reader_token_file = "reader"
[learner]
steps = 7
warmup_updates = 3
"""
VARIABLES = {
    "ASPO_LEARNER__STEPS": "8",
    "ASPO_AUTH__ACTOR_TOKEN": "hunter2",
    "ASPO_WEIGHTS": '{"keep": 9}',
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reader").write_text("hunter2")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "my.toml"
    path.write_text(TOML)
    return path


def test_each_setting_says_where_it_comes_from(config: Path) -> None:
    found = {s.name: (s.value, s.source) for s in effective(config, ["learner.epochs=2"])}
    assert found["run.name"] == ("sums", "my.toml")
    assert found["learner.warmup_updates"] == (3, "my.toml")
    assert found["learner.steps"] == (8, "ASPO_LEARNER__STEPS")
    assert found["weights.keep"] == (9, "ASPO_WEIGHTS")
    assert found["learner.epochs"] == (2, "--set")
    assert found["loss.name"] == ("aspo", "default")
    assert found["auth.reader_token"] == ("***", "my.toml")
    assert found["auth.actor_token"] == ("***", "ASPO_AUTH__ACTOR_TOKEN")
    assert found["auth.operator_token"] == (None, "default")
    assert found["reward.options.max_tokens"] == (8, "my.toml")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--changed"]])
def test_no_secret_is_shown(config: Path, arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, ["config", "show", "--config", str(config), *arguments])
    assert shown.exit_code == 0
    assert "hunter2" not in shown.output
    assert "rediss://***@redis:6379/0" in shown.output
    assert ("sampling.temperature" in shown.output) == (arguments != ["--changed"])


def test_a_sound_config_is_said_to_be(config: Path) -> None:
    told = CliRunner().invoke(app, ["config", "check", "-c", str(config), "--json"])
    assert json.loads(told.output)["ok"] is True
    broken = CliRunner().invoke(app, ["config", "check", "-c", str(config), "--set", "learner.stepps=1"])
    assert "did you mean 'steps'?" in str(broken.exception)


def test_the_schema_takes_what_the_code_takes(tmp_path: Path) -> None:
    write_config(tmp_path, seed=0)
    text = (tmp_path / "config.toml").read_text()
    validator = Draft202012Validator(config_schema())
    validator.check_schema(config_schema())
    assert list(validator.iter_errors(tomllib.loads(text))) == []
    for old, new in (("group_size", "group_sise"), ("temperature = 1.0", "temperature = 9.0")):
        assert list(validator.iter_errors(tomllib.loads(text.replace(old, new)))), new
