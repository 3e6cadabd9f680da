"""The whole loop in real processes, on another task than the demo's: Redis, learner, vLLM actor, HTTP."""

from __future__ import annotations

import functools
import json
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aspo_cli.status import fetch_status
from project import aspo_weights, learner_url, make_project, metrics_of, post, step_of
from services import Service, wait_until

STEPS = 24
# The project's one set and one reward, as a mixture that is streamed and a sum of two.
TASK = {
    'path = "questions.parquet"\nprompt_column': """streaming = true
shuffle_block = 8
sets = [
  { path = "questions.parquet" },
  { path = "more.jsonl", columns = { messages = "text" }, weight = 0.5 },
]
prompt_column""",
    'function = "my_reward:sevens"': """parts = [
  { function = "my_reward:sevens" },
  { function = "aspo_actor.rewards:overlong_penalty", name = "length", weight = 0.01, options.buffer = 4 },
]""",
}
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"), redis_url, run="sevens")
    rows = [{"text": f"{i}+1", "wanted": "7"} for i in range(5)]
    (folder / "more.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = (folder / "my.toml").read_text()
    for plain, mixed in TASK.items():
        assert plain in config
        config = config.replace(plain, mixed, 1)
    (folder / "my.toml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def url(project: Path) -> str:
    return learner_url(project)


@pytest.fixture(scope="module")
def finished(project: Path, url: str) -> Iterator[tuple[Service, Service, Path]]:
    """A finished run: its ended learner, its living actor, and a version exported on the way."""
    traced = ("--set", "trackers.traces=file", "--set", "trackers.traces_share=1.0")
    learner = Service(project, "learner", "--config", "my.toml", "--set", f"learner.steps={STEPS}", *traced)
    actor = Service(project, "actor", "--config", "my.toml", *traced)
    try:
        wait_until(lambda: step_of(url) >= 2, 200, (learner, actor))
        post(f"{url}/v1/pause")  # lest the run end before the export has begun
        exported = Service(project, "export", "exported", "--learner", url)
        assert exported.wait(60) == 0, exported.text
        post(f"{url}/v1/resume")
        assert learner.wait(120) == 0, learner.text
        yield learner, actor, project / "exported"
    finally:
        learner.kill()
        actor.kill()


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def test_the_policy_learns_and_the_data_is_stale(
    finished: tuple[Service, Service, Path], project: Path
) -> None:
    summary = json.loads((project / "runs/sevens/summary.json").read_text())
    steps = metrics_of(project, "sevens")
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert summary["steps"] == STEPS
    assert summary["accuracy_after"] > summary["accuracy_before"]
    first, last = (sum(m["reward"] for m in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last > first + 0.3
    assert 0 < summary["staleness_mean"] <= summary["staleness_max"] <= 2
    assert summary["weight_version"] == f"sevens/1/{STEPS}"
    assert summary["weight_syncs"] >= STEPS // 2
    assert summary["rollouts"] == STEPS * 4 * 8
    assert 0 <= summary["learner_idle_fraction"] < 1
    assert (project / "runs/sevens/curves.png").read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((project / "runs/sevens/config.json").read_text())
    assert settings["run.name"]["value"] == "sevens"
    assert '"aspo_learner.learner"' in (project / "runs/sevens/events.jsonl").read_text()


def test_a_trace_leads_from_the_actor_to_the_published_version(
    finished: tuple[Service, Service, Path], project: Path
) -> None:
    def whole_traces() -> list[set[str]]:
        names: dict[str, set[str]] = defaultdict(set)
        for path in (project / "runs/sevens/traces").iterdir():
            for line in path.read_text().splitlines():
                span = json.loads(line)
                names[span["context"]["trace_id"]].add(span["name"])
        return [found for found in names.values() if {"task", "sample", "score", "train", "publish"} <= found]

    wait_until(lambda: len(whole_traces()) >= STEPS * 4, 30, (finished[1],))


def test_sets_are_mixed_and_the_parts_of_the_reward_are_told(
    finished: tuple[Service, Service, Path], project: Path
) -> None:
    steps = metrics_of(project, "sevens")
    for m in steps:
        parts = m["reward_part/sevens"] + 0.01 * m["reward_part/length"]
        assert m["reward"] == pytest.approx(parts, abs=1e-5)
        sets = [name.partition("/")[2] for name in m if name.startswith("set_groups/")]
        assert sum(m[f"set_groups/{name}"] for name in sets) == 4
        shares = (m[f"set_reward/{name}"] * m[f"set_groups/{name}"] / 4 for name in sets)
        assert sum(shares) == pytest.approx(m["reward"])
    assert {name for m in steps for name in m if "set_" in name} == {
        "set_accuracy/questions",  # of the held-out set, which is greedy: no set_pass
        *(f"{metric}/{name}" for metric in ("set_groups", "set_reward") for name in ("questions", "more")),
    }
    assert all(m["set_accuracy/questions"] == m["accuracy"] for m in steps)


def test_behaviour_log_probs_match_the_learners_own(
    finished: tuple[Service, Service, Path], project: Path
) -> None:
    """Fresh rollouts differ from the learner's log-probs by rounding alone."""
    fresh = [m for m in metrics_of(project, "sevens") if m["staleness_max"] == 0]
    assert fresh
    for m in fresh:
        assert m["mismatch_ratio_max"] < 1.01
        assert m["mismatch_ratio_p01"] > 0.99


def test_models_load_with_from_pretrained(finished: tuple[Service, Service, Path], project: Path) -> None:
    for folder in (project / "runs/sevens/model", finished[2]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.num_parameters() > 0
        assert tokenizer.decode(tokenizer("12+3=")["input_ids"]).replace(" ", "") == "12+3="


def actor_url(actor: Service) -> str:
    found = re.search(r"serves on (http://\S+)", actor.text)
    assert found, actor.text
    return found[1]


def test_openai_clients_try_the_live_policy(finished: tuple[Service, Service, Path], project: Path) -> None:
    """Token by token and log-prob by log-prob what transformers makes of the published model."""
    model = AutoModelForCausalLM.from_pretrained(project / "runs/sevens/model")
    tokenizer = AutoTokenizer.from_pretrained(project / "runs/sevens/model")
    prompt = tokenizer("12+12=")["input_ids"]
    ids = torch.tensor([prompt])
    expected = model.generate(ids, do_sample=False, max_new_tokens=6)[0, len(prompt) :].tolist()
    scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    with openai.OpenAI(base_url=f"{actor_url(finished[1])}/v1", api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == ["sevens"]
        ask = functools.partial(client.completions.create, model="sevens", prompt=prompt, temperature=0)
        answer = ask(max_tokens=6, echo=True, logprobs=1, extra_body={"return_token_ids": True})
        assert answer.choices[0].token_ids == expected
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        found = answer.choices[0].logprobs.token_logprobs[1 : len(prompt)]
        assert found == pytest.approx(scores.tolist(), abs=1e-3)
        assert answer.system_fingerprint == f"sevens/1/{STEPS}"
        text = ask(max_tokens=6).choices[0].text
        chunks = list(ask(max_tokens=6, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert {chunk.system_fingerprint for chunk in chunks} == {f"sevens/1/{STEPS}"}
        scored = ask(prompt=["1+1=", "2+2="], max_tokens=0, echo=True, logprobs=1)  # as lm-eval asks
        assert [choice.text.replace(" ", "") for choice in scored.choices] == ["1+1=", "2+2="]
        drawn = [ask(n=4, temperature=1, seed=3).choices for _ in range(2)]
        assert [c.text for c in drawn[0]] == [c.text for c in drawn[1]]
        chat = client.chat.completions.create(
            model="sevens", messages=[{"role": "user", "content": "12+12"}], temperature=0, max_tokens=6
        )
        assert chat.choices[0].message.content == text
        for wrong, words in (
            ({"model": "other"}, "`other` does not exist"),
            ({"suffix": "x"}, "suffix: Extra inputs are not permitted"),
            ({"prompt": [4000]}, "out of vocabulary"),
            ({"max_tokens": 4000}, "max_model_len"),
        ):
            with pytest.raises(openai.APIStatusError, match=words):
                ask(**wrong)


def test_the_live_policy_is_evaluated_by_its_actor(
    finished: tuple[Service, Service, Path], project: Path
) -> None:
    command = ["eval", "-c", "my.toml", "--actor", actor_url(finished[1]), "-k", "4", "--temperature", "1"]
    evaluation = Service(project, *command, "--set", "eval.right_above=0.3", "--out", "found", forked=True)
    assert evaluation.wait(100) == 0, evaluation.text
    result = json.loads((project / "found/results.json").read_text())
    assert (result["versions"], result["sampled_by"]) == ([f"sevens/1/{STEPS}"], "actors")
    figures = result["sets"]["questions"]["figures"]
    assert list(figures) == ["avg@4", "pass@1", "pass@2", "pass@4", "majority@4"]
    rows = [json.loads(line) for line in (project / "found/answers.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(16))
    for row in rows:
        counted = [text.count("7") / max(1, len(text)) for text in row["completions"]]
        assert row["rewards"] == pytest.approx(counted, abs=0.0101)  # but for the penalty on length
    right = [[reward > 0.3 for reward in row["rewards"]] for row in rows]
    assert figures["pass@4"]["value"] == pytest.approx(sum(map(any, right)) / 16)
    assert figures["pass@1"]["value"] == pytest.approx(sum(map(sum, right)) / 64)
    for figure in figures.values():
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert (project / "found/results.png").read_bytes()[:4] == b"\x89PNG"
    assert "pass@2" in evaluation.text


def check_the_weights_commands(project: Path, url: str) -> None:
    """On a paused learner: list, verify, go back with the actor following, and return."""

    def actor_at(version: str) -> bool:
        return all(actor["version"] == version for actor in fetch_status(url)["actors"])

    listed = json.loads(aspo_weights(project, url, "ls", "--json"))
    versions = [version["version"] for version in listed["versions"]]
    newest, older = versions[-1], versions[-3]
    wait_until(lambda: actor_at(newest), 60, ())
    assert f"{newest} is intact" in aspo_weights(project, url, "verify")
    assert "embed_tokens" in aspo_weights(project, url, "show", newest)
    assert f"{older} is live" in aspo_weights(project, url, "rollback", older)
    wait_until(lambda: actor_at(older), 60, ())
    assert fetch_status(url)["held"]
    assert f"{newest} is live" in aspo_weights(project, url, "promote", newest)
    wait_until(lambda: actor_at(newest), 60, ())
    aspo_weights(project, url, "rollback", older, "--continue")


def test_a_restarted_learner_goes_on_and_the_actor_follows(
    finished: tuple[Service, Service, Path], project: Path, url: str
) -> None:
    _, actor, _ = finished
    learner = Service(project, "learner", "--config", "my.toml", "--set", f"learner.steps={STEPS + 6}")
    try:
        wait_until(lambda: step_of(url) > STEPS, 120, (learner, actor))
        post(f"{url}/v1/pause")
        status = fetch_status(url)
        assert status["version"].startswith("sevens/2/")
        [alive] = status["actors"]
        assert alive["state"] == "sampling"
        assert alive["weight_syncs"] >= alive["weight_patches"] > 0
        assert alive["weight_repairs"] == 0
        for service, metric in ((url, "aspo_learner_staleness_mean"), (alive["url"], "aspo_actor_tokens")):
            assert read(f"{service}/livez") == "ok"
            assert read(f"{service}/readyz") == "ok"
            assert f"\n{metric} " in read(f"{service}/metrics")
        assert json.loads(read(f"{alive['url']}/v1/status"))["version"].startswith("sevens/")
        shown = Service(project, "status", "--once", "--learner", url)
        assert shown.wait(30) == 0
        assert "actor-0" in shown.text
        check_the_weights_commands(project, url)
        post(f"{url}/v1/resume")
        assert learner.wait(120) == 0, learner.text
    finally:
        learner.kill()
    assert [m["step"] for m in metrics_of(project, "sevens")] == list(range(1, STEPS + 7))
    store = Service(project, "weights", "verify", "--store", "runs/sevens/state/weights")
    assert store.wait(60) == 0, store.text
    assert f"sevens/3/{STEPS + 6} is live" in store.text, "it went on from the version rolled back to"


def test_sigterm_drains_the_actor(finished: tuple[Service, Service, Path]) -> None:
    """Last in this module: it ends the module's actor."""
    _, actor, _ = finished
    assert actor.stop(timeout_s=40) == 0, actor.text
    assert "Traceback" not in actor.text, actor.text
