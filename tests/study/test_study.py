"""The study: its tasks, its sampler's exact staleness, runs that repeat and go on, tables and plots."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from aspo.config import ConfigError, ModelConfig
from aspo.schemas import RolloutGroup
from aspo_cli.main import app
from aspo_learner.batching import micro_batches, sequences_of
from aspo_learner.policy import Policy
from aspo_study import summary, trial
from aspo_study.cells import LOSSES, PHASES, SEEDS, STALENESS, Cell, best_rates, plan
from aspo_study.page import BEGIN, END, renew, tables_of
from aspo_study.run import read_results, run_cells
from aspo_study.sampler import StaleSampler
from aspo_study.tasks import TASKS, Task
from aspo_study.trial import warm_start


class Careful(random.Random):
    """The chance of a slip never comes."""

    def random(self) -> float:
        return 1.0


RATES = dict.fromkeys(LOSSES, 1e-4)


def rewards(completion: str, *, answer: str) -> float:
    """What a model that knows nothing is sometimes right about."""
    return float(completion.count("a") % 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models that have hardly begun to learn, in place of the study's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "sorting", replace(TASKS["sorting"], warm_steps=2, reward=rewards))
        patch.setattr(trial, "HELD_OUT", 8)
        patch.setattr(trial, "EXAM_PROMPTS", 4)
        patch.setattr(trial, "EVALUATE_EVERY", 1)
        yield tmp_path_factory.mktemp("study") / "models"


@pytest.fixture
def policy(models: Path) -> Policy:
    path = str(warm_start("sorting", models))
    return Policy(ModelConfig(path=path, dtype="float32"), torch.device("cpu"))


def cell(**settings: Any) -> Cell:
    return Cell(task="sorting", steps=2, learning_rate=1e-3, **settings)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_careful_teacher_is_right_and_a_careless_one_often_is_not(task: Task) -> None:
    rng = random.Random(0)
    problems = task.problems(200, seed=1, held_out=False)
    careless = [task.demonstrate(p["prompt"], rng) for p in problems]
    scores = [task.reward(text, answer=p["answer"]) for text, p in zip(careless, problems, strict=True)]
    assert 0.2 < np.mean(scores) < 0.6
    careful = [task.demonstrate(p["prompt"], Careful()) for p in problems]
    assert all(task.reward(text, answer=p["answer"]) for text, p in zip(careful, problems, strict=True))
    assert {*"".join(careless), *"".join(p["prompt"] for p in problems)} <= {*task.characters}
    assert max(map(len, careless)) < task.max_tokens


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_is_held_out_is_never_trained_on(task: Task) -> None:
    held_out = {p["prompt"] for p in task.problems(200, seed=1, held_out=True)}
    assert held_out.isdisjoint(p["prompt"] for p in task.problems(2000, seed=2, held_out=False))


def scored(policy: Policy, groups: list[RolloutGroup]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs by the policy, and by who sampled."""
    sequences = [s for n, g in enumerate(groups) for s in sequences_of(g, [0.0] * len(g), n)]
    (batch,) = micro_batches(sequences, range(len(sequences)), max_tokens=10**6, device=policy.device)
    found = policy.score(batch, 1.0)[0].detach()
    return found[batch.mask].numpy(), batch.behavior_logprobs[batch.mask].numpy()


def test_samples_are_of_the_version_so_many_steps_ago(policy: Policy) -> None:
    sampler = StaleSampler(policy.model.config, policy.tokenizer, TASKS["sorting"], staleness=2, seed=0)
    for step in range(5):
        sampler.publish(policy)
        groups = sampler.sample(4, 4)
        sampled_by = max(0, step - 2)
        assert {span.version for g in groups for s in g.spans for span in s} == {f"study/1/{sampled_by}"}
        assert sampler.lag == step - sampled_by
        late, own = scored(policy, groups)
        assert np.allclose(late, own, atol=1e-4) == (step == sampled_by)
        examined, own = scored(
            policy, sampler.examine(TASKS["sorting"].problems(4, seed=0, held_out=True), 2)
        )
        np.testing.assert_allclose(examined, own, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.05)


def test_a_cell_gives_the_same_result_again_and_its_results_are_not_made_twice(models: Path) -> None:
    cells = [cell(staleness=0), cell(staleness=2, loss="grpo", reference="proximal", updates=1)]
    folder = models.parent
    first = next(run_cells(cells, folder))
    (second,) = run_cells(cells, folder)
    assert read_results(folder) == [first, second]
    assert first["mismatch_k3"] < 1e-6 < second["mismatch_k3"]
    assert first["accuracies"][0] == second["accuracies"][0] == first["accuracy_start"]
    assert len(first["accuracies"]) == 3
    assert first["kl_start"] > 0
    assert not list(run_cells(cells, folder))
    assert trial.Trial(cells[1], models).run() == second


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("hello\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl is no study's"):
        read_results(tmp_path)


def test_a_plan_is_balanced_and_its_last_phase_covers_the_others() -> None:
    plans = {phase: list(plan(phase, list(TASKS), RATES)) for phase in PHASES}
    everything = set(plans.pop("full"))
    tuning = plans.pop("tune")
    assert {c.loss for c in tuning} == set(LOSSES)
    assert len({sum(c.loss == loss for c in tuning) for loss in LOSSES}) == 1  # the same budget
    assert all(set(cells) <= everything for cells in plans.values())
    main = {(c.task, c.loss, c.staleness, c.seed) for c in everything if c.updates == 4 and c.dual_clip}
    assert len(main) == len(TASKS) * len(LOSSES) * len(STALENESS) * len(SEEDS)
    for cells in plans.values():
        seeds = [c.seed for c in cells]
        assert seeds == sorted(seeds)  # so that it may end after any seed
        assert len({seeds.count(seed) for seed in SEEDS}) == 1


def test_the_learning_rate_of_the_best_tuning_runs_is_taken() -> None:
    rows = [
        {"loss": "aspo", "learning_rate": rate, "seed": seed, "accuracies": [0.0, found]}
        for rate, seed, found in [(1e-4, 100, 0.5), (1e-4, 101, 0.6), (3e-4, 100, 0.9), (3e-4, 101, 0.1)]
    ]
    assert best_rates(rows) == {"aspo": 1e-4}


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_intervals_are_students(count: int) -> None:
    freedom = count - 1
    x = np.linspace(-summary.T_95[count], summary.T_95[count], 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    assert scale * np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-4)
    values = [1.0, 2.0, 3.0, 4.0, 5.0][:count]
    error = math.sqrt(sum((v - sum(values) / count) ** 2 for v in values) / freedom / count)
    assert summary.interval(values) == pytest.approx((sum(values) / count, summary.T_95[count] * error))


def test_differences_are_taken_seed_by_seed() -> None:
    left, right = {0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.6, 2: 0.8}
    assert summary.difference(left, right) == "**+0.100 ± 0.000, d = +0.5** (n = 3)"
    assert summary.difference(left, {0: 0.9, 1: 0.7, 2: 0.5}) == "+0.000 ± 0.994, d = +0.0 (n = 3)"
    assert summary.difference(left, {0: 0.9}) == ""


def made_up_rows() -> Iterator[dict[str, Any]]:
    """Results of a plan in which ASPO is better by 0.1, and worse without its dual clip."""
    figures = dict.fromkeys(
        [name for name, _ in summary.FIGURES.values() if not name.startswith("norm_")], 0.25
    )
    norms = {"grad_norm_median": 2.0, "grad_norm_p99": 4.0, "grad_norm_max": 6.0}
    for made in (c for phase in ("tune", "core", "dual") for c in plan(phase, list(TASKS), RATES)):
        right = 0.5 + 0.1 * (made.loss == "aspo") - 0.3 * (not made.dual_clip) + 0.001 * made.seed
        ends = {"accuracies": [0.3, right], "accuracy_final": right, "accuracy_best": right}
        yield asdict(made) | figures | norms | ends


def test_tables_of_a_csv_say_what_the_runs_did(tmp_path: Path) -> None:
    rows = list(made_up_rows())
    summary.write_csv(rows, tmp_path / "results.csv")
    text = summary.summary(summary.read_csv(tmp_path / "results.csv"))
    assert text == summary.summary(rows)
    assert "| aspo | 0.60 ± 0.00 | 0.60 ± 0.00 | 0.60 ± 0.00 |" in text
    assert "| aspo | **+0.100 ± 0.000" in text
    assert "| addition | aspo | 64 | 0.30 ± 0.00 | **-0.300 ± 0.000" in text


def test_a_page_keeps_its_text_and_gets_new_tables(tmp_path: Path) -> None:
    page, data, rows = tmp_path / "study.md", tmp_path / "results.csv", list(islice(made_up_rows(), 100))
    page.write_text(f"# A study\n{BEGIN}old\n{END}The end.\n")
    summary.write_csv(rows, data)
    renew(page, data)
    assert page.read_text().startswith("# A study\n")
    assert page.read_text().endswith("The end.\n")
    assert tables_of(page) == summary.summary(rows)
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="lacks the lines"):
        renew(page, data)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--phase", "tunes"], "--phase 'tunes': there are tune, core"),
        (["run", "--task", "chess"], "--task 'chess': there are addition, sorting"),
        (["summary", "--data", "none.csv"], "none.csv holds no results of a study"),
        (["publish", "--folder", "none"], "no results in none; aspo study run makes them"),
    ],
)
def test_what_cannot_be_studied_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["study", *arguments])
    assert words in str(told.exception)


def test_results_are_published_with_plots_and_summarised_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = list(made_up_rows())
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    served = asdict(Cell(task="addition")) | {"accuracy_after": 0.62, "staleness_mean": 2.5}
    (tmp_path / "confirmed.jsonl").write_text(f"{json.dumps(served)}\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/study.md").write_text(f"{BEGIN}{END}")
    assert CliRunner().invoke(app, ["study", "publish", "--folder", "."]).exit_code == 0
    plots = {path.name: path.stat().st_size for path in (tmp_path / "docs/study").glob("*.png")}
    assert plots.keys() == {"accuracy.png", "curves.png", "figures.png"}
    assert all(10_000 < size < 200_000 for size in plots.values())
    told = CliRunner().invoke(app, ["study", "summary"])
    assert told.output == tables_of(tmp_path / "docs/study.md")
    assert "| aspo | 4 | 2.5 | 0.62 (n = 1) | 0.60 ± 0.00 | +0.018 ± 0.002 |" in told.output
    told = CliRunner().invoke(app, ["study", "summary", "--json"])
    found = {(f["task"], f["loss"], f["staleness"], f["dual_clip"]): f for f in json.loads(told.output)}
    assert found["addition", "grpo", 4, True]["accuracy_final"] == pytest.approx([0.502, 0.00196], abs=1e-4)
    assert found["addition", "grpo", 4, True]["seeds"] == 5
