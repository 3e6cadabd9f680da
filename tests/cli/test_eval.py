"""What `aspo eval` makes of answers: files, table and plot; and actors that are busy for a while."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from aspo.config import AuthConfig, ConfigError, EvalSet
from aspo.http import ApiError, Server, create_app, listen
from aspo_actor.completion import Completion
from aspo_actor.openai_routes import Asked, openai_routes
from aspo_cli import eval as evaluation
from aspo_cli.eval_report import Report, SetResult, require_writable, table_of, write_report
from aspo_learner.data import Prompt
from models import char_tokenizer
from services import Service


def result(name: str, k: int, chance: float, prompts: int = 40) -> SetResult:
    """A set's result, by a policy that is right with some chance, which differs from prompt to prompt."""
    rng = np.random.default_rng(len(name))
    rows = []
    for row, own in enumerate(rng.beta(2 * chance, 2 - 2 * chance, size=prompts)):
        right = rng.random(k) < own
        answers = ["7" if ok else str(rng.integers(3)) for ok in right]
        rewards = right.astype(float).tolist()
        rows.append(
            {"row": row, "rewards": rewards, "failed": [False] * k, "tokens": [5] * k, "answers": answers}
        )
    chosen = EvalSet(path=f"{name}.jsonl", k=k, temperature=0.6 if k > 1 else 0.0)
    return SetResult.of(chosen, rows, right_above=0.5)


@pytest.fixture
def report() -> Report:
    sets = [result("gsm8k", 1, 0.8, 200), result("aime-2024-and-2025", 16, 0.3), result("sums", 8, 0.95)]
    return Report("r", ["r/1/40", "r/1/42"], "actors", sets, 12.5)


def test_all_of_it_is_written_and_the_table_fits_80_columns(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(report, tmp_path / "out", as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out/results.json").read_text())
    assert said["versions"] == ["r/1/40", "r/1/42"]
    assert list(said["sets"]) == ["gsm8k", "aime-2024-and-2025", "sums"]
    figure = said["sets"]["sums"]["figures"]["pass@8"]
    assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == ["gsm8k"] * 200 + ["aime-2024-and-2025"] * 40 + ["sums"] * 40
    assert (tmp_path / "out/results.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of(report))
    assert "…" not in capture.get()
    for words in ("r/1/40 to r/1/42", "majority@16", f"{figure['low']:.3f} .. {figure['high']:.3f}"):
        assert words in capture.get()
    with pytest.raises(ConfigError, match=r"cannot write to .* name another with --out"):
        write_report(report, tmp_path / "out/results.json/x", as_json=True)
    with pytest.raises(ConfigError, match=r"cannot write to .* name another with --out"):
        require_writable(tmp_path / "out/results.json/x")


class Moody:
    """A host that is being repaired at first."""

    version = "r/1/7"

    def __init__(self, refusal: ApiError) -> None:
        self._refusals, self.asked = [refusal], list[Asked]()

    def models(self) -> dict[str, object]:
        return {"data": [{"max_model_len": 64}]}

    async def answer(self, asked: Asked) -> tuple[str, str]:
        self.asked.append(asked)
        if self._refusals:
            raise self._refusals.pop()
        choice = {"token_ids": [2 + asked.seed % 5], "finish_reason": "length"}
        answer = {"system_fingerprint": "r/1/7..r/1/8", "choices": [choice]}
        return json.dumps(answer), self.version

    async def stream(self, asked: Asked) -> AsyncGenerator[str]:
        yield ""


async def drawn(host: Moody) -> tuple[list[Completion], set[str]]:
    app = create_app("actor", auth=AuthConfig(), ready=lambda: None, registry=CollectorRegistry())
    app.include_router(openai_routes(lambda: host))
    with Server(app, listen("127.0.0.1", 0, AuthConfig())) as server:
        async with aiohttp.ClientSession() as session:
            sampler = evaluation.ActorSampler(session, [server.url], "r", char_tokenizer())
            chosen = EvalSet(path="a", k=8, temperature=0.5)
            return await sampler.draw(Prompt([2, 3], {}), chosen, 6, seed=1), sampler.versions


async def test_an_actor_under_repair_is_asked_again_and_each_answer_has_its_seed() -> None:
    host = Moody(ApiError(503, "engine", "the engine is damaged", "wait"))
    answers, versions = await drawn(host)
    assert len(answers) == 8
    assert all(answer.text == str(answer.token_ids[0] - 2) for answer in answers)
    assert versions == {"r/1/7", "r/1/8"}
    assert len(host.asked) == 9
    assert len({asked.seed for asked in host.asked}) == 8
    assert {(asked.temperature, asked.max_tokens, asked.model) for asked in host.asked} == {(0.5, 6, "r")}


async def test_a_refusal_ends_the_evaluation() -> None:
    with pytest.raises(ConfigError, match="no such model; see /v1/models"):
        await drawn(Moody(ApiError(404, "refused", "no such model", "see /v1/models")))


def test_results_lie_in_a_folder_named_for_what_was_evaluated() -> None:
    assert evaluation._folder_name(["sums/1/40", "sums/1/42"]) == "1-42"
    assert evaluation._folder_name(["./runs/sums/model"]) == "runs-sums-model"


CONFIG = '[model]\npath = "m"\n[data]\npath = "d.jsonl"\n[actor]\nlearner_url = "http://127.0.0.1:1"\n'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version", "r/1/1", "--live"], "exclude each other; give one"),
        ([], "no held-out set; set eval.path or eval.sets"),
        (["-s", "eval.path=d.jsonl", "-k", "4"], "k is 4, and greedy answers are all the same"),
        (["-s", "eval.path=d.jsonl", "--model", "nowhere"], "no model at nowhere"),
        (
            ["-s", "eval.path=d.jsonl", "-s", "environment.function=m:E", "--live"],
            "single turns, without the environment; leave out --live",
        ),
        (["-s", "eval.path=d.jsonl", "--live"], "no learner answers at http://127.0.0.1:1"),
        (
            ["-s", "eval.path=d.jsonl", "--actor", "http://127.0.0.1:1"],
            "no actor answers at http://127.0.0.1:1",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "my.toml").write_text(CONFIG)
    command = Service(tmp_path, "eval", "-c", "my.toml", *arguments, forked=True)
    code = command.wait(60)
    assert code == (1 if "--actor" in arguments else 2), command.text
    lines = [line for line in command.text.splitlines() if line.strip()]
    assert words in lines[-1], command.text
    assert lines[-1].startswith("aspo: error: ")
    assert "Traceback" not in command.text
