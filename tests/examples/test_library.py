"""The examples of library use run, and say what they should."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from aspo.config import AuthConfig
from aspo.http import Server, create_app, listen
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from models import save_model
from versions import FILES, tensors, version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "library"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", r"'surrogate': .*'clip_fraction_neg'"),
        ("head", r"log-prob -\d.*, entropy \d.* nats, gradient \d"),
        ("delta", r"bytes for 2,097,152; equal: True"),
    ],
)
def test_an_example_runs(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"))
    assert re.search(words, capsys.readouterr().out)


def test_the_weight_client_follows_a_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = WeightStore(tmp_path / "weights")
    app = create_app("learner", auth=AuthConfig(), ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, Leases()))
    app.include_router(blob_routes(store.blobs))
    store.put(version(0), tensors(0), FILES)
    with Server(app, listen("127.0.0.1", 0, AuthConfig())) as server:
        monkeypatch.setattr(sys, "argv", ["weights.py", server.url, str(tmp_path / "cache")])
        runpy.run_path(str(FOLDER / "weights.py"))
    assert re.search(r"r/1/0: snapshot of [\d,]+ bytes, 4 tensors", capsys.readouterr().out)


@pytest.mark.faults
@pytest.mark.timeout(1200)  # the first run installs TRL
def test_trl_trains_by_aspo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from trl_peer.environment import python

    model = save_model(tmp_path / "model", hidden_size=64, layers=2)
    done = subprocess.run(
        [python(), ROOT / "tests" / "trl_trainers.py", model, tmp_path / "out"],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "services"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["on_policy"]["moved"] > 1e-3
    assert told["on_policy"]["apart"] < 1e-4  # at ratio 1 both are plain policy gradient
    assert max(told["on_policy"]["spread"]) < 1e-9
    assert told["off_policy"]["apart"] > 1e-3
    assert max(told["off_policy"]["spread"]) > 1e-6
    assert {"entropy", "reward", "aspo/weight_mean_pos", "aspo/clip_fraction_neg"} <= set(
        told["off_policy"]["logged"]
    )
    assert "leave beta" in told["refuses beta"]
    assert "leave beta" in told["refuses top_entropy_quantile"]
