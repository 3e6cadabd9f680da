"""`aspo doctor`: nothing on a healthy run; on a sick one what is wrong, the figure and the setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aspo.config import Config
from aspo_cli.doctor import examine
from aspo_cli.main import app
from aspo_cli.report import Run

HEALTHY = Path(__file__).parents[1] / "golden" / "healthy-run.jsonl"  # of a demo, every third step
Step = dict[str, float]
Change = Callable[[Step, float], Step]  # a step and how far the run has come, 0 to 1


def healthy() -> list[Step]:
    return [json.loads(line) for line in HEALTHY.read_text().splitlines()]


def run_with(change: Change, **settings: Any) -> Run:
    """The healthy run with its steps changed."""
    steps = healthy()
    changed = [step | change(step, i / (len(steps) - 1)) for i, step in enumerate(steps)]
    known = {name: {"value": value, "source": "my.toml"} for name, value in settings.items()}
    return Run("sick", Path("sick"), changed, known, {}, [])


def always(**values: float) -> Change:
    return lambda step, done: values


SICK: dict[str, tuple[Change, str, str]] = {
    "gradients that are no numbers": (always(skipped_updates=2.0), "skipped_updates", "learner.precision"),
    "the reward function fails": (
        always(reward_failed_fraction=0.01),
        "reward_failed_fraction",
        "reward.function",
    ),
    "groups were set aside": (always(ended_quarantined=3.0), "ended_quarantined", ""),
    "engine and learner disagree": (
        lambda step, done: {"mismatch_k3": 0.05, "staleness_max": 0.0, "staleness_mean": 0.0},
        "mismatch_k3",
        "model.dtype",
    ),
    "ASPO is inert": (
        always(ratio_p01=1.0, ratio_p50=1.0, ratio_p99=1.0, ratio_max=1.0),
        "ratio_p99",
        "loss.ratio_reference",
    ),
    "too stale": (always(staleness_mean=40.0, staleness_max=64.0), "staleness_mean", "learner.max_staleness"),
    "rollouts come too late": (
        always(stale_groups_dropped=16.0),
        "stale_groups_dropped",
        "learner.staleness_policy",
    ),
    "entropy collapse": (
        lambda step, done: {"entropy": 0.5 * 0.01**done, "all_wrong_fraction": 0.5, "reward": 0.4},
        "entropy",
        "learner.learning_rate",
    ),
    "the policy falls apart": (
        lambda step, done: {"entropy": 0.1 + 2 * done},
        "entropy",
        "learner.learning_rate",
    ),
    "reward hacked by length": (
        lambda step, done: {"response_length": 30 + 200 * done, "reward": done, "accuracy": 0.2},
        "response_length",
        "reward.function",
    ),
    "responses are cut": (always(truncated_fraction=0.4), "truncated_fraction", "sampling.max_tokens"),
    "much is clipped": (always(clip_fraction_neg=0.5), "clip_fraction_neg", "learner.epochs"),
    "weights are at their cap": (
        always(dual_clip_fraction_pos=0.2),
        "dual_clip_fraction_pos",
        "loss.ratio_reference",
    ),
    "gradient spikes": (
        lambda step, done: {"grad_norm_max": 90.0} if done == 1 else {},
        "grad_norm_max",
        "learner.max_grad_norm",
    ),
    "few tokens decide": (always(ess_fraction=0.1), "ess_fraction", "loss.behavior_correction"),
    "nothing to learn from": (
        always(uninformative_fraction=0.95, all_wrong_fraction=0.9, all_right_fraction=0.05),
        "uninformative_fraction",
        "data.path",
    ),
    "the learner starves": (always(wait_seconds=30.0), "wait_seconds", "actor.engine.max_num_seqs"),
}


def test_a_healthy_run_has_no_findings() -> None:
    assert examine(run_with(always())) == []
    assert examine(run_with(always(), **{"learner.batch_prompts": 32, "loss.name": "aspo"})) == []


@pytest.mark.parametrize("name", SICK)
def test_each_fault_is_told_alone_with_its_metric_and_setting(name: str) -> None:
    change, metric, setting = SICK[name]
    (finding,) = examine(run_with(change, **{"learner.batch_prompts": 32}))
    assert (finding.name, finding.metric) == (name, metric)
    assert not setting or setting in finding.settings
    assert finding.text.endswith(".")
    for each in finding.settings:
        fields: Any = Config.model_fields
        for part in each.split("."):
            assert part in fields, each
            fields = getattr(fields[part].annotation, "model_fields", {})


def test_a_run_with_few_metrics_is_examined_too() -> None:
    bare = Run("bare", Path("bare"), [{"step": 1.0}], {}, {"objective": "grpo"}, [])
    assert examine(bare) == []
    names = {name for step in healthy() for name in step}
    for name in sorted(names - {"step"}):  # whatever a metric is, or is not, in a file
        for odd in (None, "much", float("nan"), 0.0):
            steps: list[Any] = [step | {name: odd} for step in healthy()]
            partial = [{k: v for k, v in step.items() if k != name} for step in steps[:3]]
            examine(Run("odd", Path("odd"), partial + steps, {}, {}, []))


def test_a_loss_that_does_not_flip_is_never_called_inert() -> None:
    change = SICK["ASPO is inert"][0]
    assert examine(run_with(change, **{"loss.name": "grpo"})) == []
    (finding,) = examine(run_with(change, **{"loss.name": "aspo", "loss.ratio_reference": "behavior"}))
    assert "learner.epochs" in finding.advice
    assert "ratio_reference" not in finding.advice


def test_the_command_tells_a_script_by_its_exit_code(tmp_path: Path) -> None:
    for name, run in (("well", run_with(always())), ("sick", run_with(always(truncated_fraction=0.4)))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in run.steps))
    told = CliRunner().invoke(app, ["doctor", "well", "--runs", str(tmp_path)])
    assert (told.exit_code, told.output.strip()) == (0, "well: nothing is off in 24 steps")
    told = CliRunner().invoke(app, ["doctor", "sick", "--runs", str(tmp_path)])
    assert told.exit_code == 1
    assert "responses are cut: 40% of the completions end at sampling.max_tokens" in told.output
    assert "truncated_fraction = 0.4; raise sampling.max_tokens" in told.output
    told = CliRunner().invoke(app, ["doctor", "sick", "--runs", str(tmp_path), "--json"])
    assert told.exit_code == 1
    (finding,) = json.loads(told.output)["findings"]
    assert finding["value"] == pytest.approx(0.4)
    assert "sampling.max_tokens" in finding["settings"]
