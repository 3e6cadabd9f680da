"""Every example's config is sound: settings, reward functions, environment, and what `aspo check` asks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from aspo.config import CodeConfig, load_config
from aspo_actor.environments.host import EnvironmentHost
from aspo_actor.rewards.calls import load_reward_function
from aspo_actor.rewards.sandbox import Sandbox
from aspo_cli.check import run_check
from aspo_learner.trainer import build_loss

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_config_is_sound(
    path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.chdir(path.parent)
    config = load_config(path)
    for part in config.reward.terms:
        load_reward_function(part, config.data.reward_columns)
    build_loss(config.loss)
    if config.environment.function is not None:
        with EnvironmentHost(config.environment):
            pass
    overrides = [f"redis.url={redis_url}", f"run.dir={tmp_path}"]
    assert run_check(path, "learner", overrides) == 0


def test_there_are_examples_and_the_readme_names_each() -> None:
    assert len(CONFIGS) == 4
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.relative_to(EXAMPLES)})" in readme for path in CONFIGS)


def function(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES / folder)
    module, _, function = name.partition(":")
    __import__(module)
    return getattr(sys.modules[module], function)


def test_the_papers_rewards_read_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    maths = function("paper", "paper_rewards:maths", monkeypatch)
    right = {"ground_truth": ["10", "$x^2+1$"]}
    assert maths("<think>9</think> It is \\boxed{1+x^2}.", reward_model=right) == 1
    assert maths("<think>\\boxed{10}</think> It is \\boxed{9}.", reward_model=right) == 0
    assert maths("\\boxed{10}", reward_model={"ground_truth": "10"}) == 1
    code = function("paper", "paper_rewards:code", monkeypatch)
    sandbox = Sandbox(CodeConfig(sandbox="none"))
    program = "<think>?</think>\n```python\nprint(int(input()) + 1)\n```"
    for outputs, reward in ((["2", "3"], 1), (["2", "4"], 0)):
        truth = {"ground_truth": f'{{"inputs": ["1", "2"], "outputs": {outputs}}}'.replace("'", '"')}
        assert code(program, reward_model=truth, sandbox=sandbox) == reward
    functional = {"ground_truth": '{"functional": "assert f(1) == 2"}'}
    assert code("```python\ndef f(x):\n    return x + 1\n```", reward_model=functional, sandbox=sandbox) == 1


def test_the_own_reward_gives_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = function("own-task", "my_rewards:digits", monkeypatch)
    for completion, share in (("1+1,#522", 1), ("#422", 2 / 3), ("#22", 2 / 3), ("522", 0), ("#0522", 0)):
        assert digits(completion, answer=522) == share
