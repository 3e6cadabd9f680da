"""`aspo eval` of published versions, by a vLLM engine of its own, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.schemas import PolicyVersion
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from models import save_model
from project import make_project
from services import Service

pytestmark = [pytest.mark.vllm, pytest.mark.faults]
SETS = """
[[eval.sets]]
name = "greedy"
path = "questions.parquet"
[[eval.sets]]
name = "drawn"
path = "questions.parquet"
k = 4
temperature = 1.0
"""


def greedy_answers(folder: Path) -> list[str]:
    """Transformers' greedy answers to the project's questions."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    texts = []
    for i in range(10, 26):
        ids = tokenizer(f"{i}+{i}=", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            answer = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    return texts


def test_an_older_version_is_evaluated_by_an_engine_of_its_own(tmp_path: Path) -> None:
    make_project(tmp_path, "redis://127.0.0.1:1/0", run="sevens")
    config = (tmp_path / "my.toml").read_text()
    old = '[eval]\npath = "questions.parquet"\nevery = 4\nmax_prompts = 8\n'
    assert old in config
    (tmp_path / "my.toml").write_text(config.replace(old, "") + SETS)
    files = {
        path.name: path.read_bytes()
        for path in (tmp_path / "start").iterdir()
        if path.suffix != ".safetensors"
    }
    store, auth = WeightStore(tmp_path / "weights"), AuthConfig()
    save_model(tmp_path / "newer", seed=5, hidden_size=64, layers=2, init_scale=0.05)
    for step, name in enumerate(("start", "newer")):
        tensors = load_file(tmp_path / name / "model.safetensors")
        store.put(PolicyVersion(epoch=1, step=step, run="sevens"), tensors, files)
    app = create_app("learner", auth=auth, ready=lambda: None, registry=CollectorRegistry())
    app.include_router(blob_routes(store.blobs))
    app.include_router(weight_routes(store, Leases()))
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        command = ["eval", "-c", "my.toml", "--learner", server.url, "--json"]
        older = Service(tmp_path, *command, "--version", "sevens/1/0")
        assert older.wait(250) == 0, older.text
    result = json.loads((tmp_path / "runs/sevens/evaluations/1-0/results.json").read_text())
    assert json.loads(older.text.strip().splitlines()[-1]) == result
    assert (result["versions"], result["sampled_by"]) == (["sevens/1/0"], "engine")
    rows = [
        json.loads(line)
        for line in (tmp_path / "runs/sevens/evaluations/1-0/answers.jsonl").read_text().splitlines()
    ]
    texts = [text for row in rows if row["set"] == "greedy" for text in row["completions"]]
    assert texts == greedy_answers(tmp_path / "start") != greedy_answers(tmp_path / "newer")
    drawn = result["sets"]["drawn"]["figures"]
    assert list(drawn) == ["avg@4", "pass@1", "pass@2", "pass@4", "majority@4"]
    shares = [r for row in rows if row["set"] == "drawn" for r in row["rewards"]]
    assert len(shares) == 64
    assert drawn["avg@4"]["value"] == pytest.approx(sum(shares) / 64)
    assert drawn["avg@4"]["value"] > 0
