"""The Kubernetes manifests render, are valid, and mean what the design says; no cluster is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import SecretStr
from redis.exceptions import NoPermissionError
from typer.testing import CliRunner

import aspo_actor.app
import manifests
from aspo.config import AuthConfig
from aspo.http import Server, listen
from aspo.presence import ActorStatus
from aspo.queue import connect
from aspo.telemetry import ACTOR_METRICS, Gauges
from aspo.weights.blobs import BlobStore
from aspo_cli import demo_model
from aspo_cli.demo import write_config
from aspo_cli.main import app
from aspo_cli.processes import find_redis_server
from edges import Object
from kustomize import KUBECTL, build, render
from manifests import containers, main, pod, workload
from overlays import (
    ACTOR,
    CHECKS,
    DOCS,
    EDGES,
    KUBERNETES,
    LEARNER,
    OVERLAYS,
    SCRAPING,
    findings,
    rendered,
    secrets,
)
from services import redis_server

_DIGEST = re.compile(r'(?<=")(run|aspo-dashboard)-[a-z0-9]{10}(?=")')


@pytest.mark.parametrize(("check", "overlay"), CHECKS)
def test_an_overlay_passes(check: str, overlay: str, tmp_path: Path) -> None:
    assert findings(check, overlay, rendered(overlay), tmp_path) == []


@pytest.mark.skipif(
    KUBECTL is None, reason="kubectl is not installed; the overlays are rendered by kustomize.py"
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlays_render_alike_without_kubectl(overlay: str) -> None:
    def comparable(objects: list[Object]) -> list[str]:
        return sorted(_DIGEST.sub(r"\1", json.dumps(each, sort_keys=True)) for each in objects)

    assert comparable(build(KUBERNETES / "overlays" / overlay)) == comparable(rendered(overlay))


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed, and kustomize.py cannot rename images")
def test_the_overlay_of_the_docs_renders_and_passes(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES.parent, tmp_path / "deploy")
    mine = tmp_path / "deploy" / "kubernetes" / "overlays" / "mine"
    shutil.copytree(mine.with_name("gpu-pool"), mine)
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (mine / "kustomization.yaml").write_text(example)
    objects = render(mine)
    assert main(objects, ACTOR)["image"] == "registry.example/aspo-actor:0.1.0-cuda"
    for check in ("schema", "selectors", "settings", "references", "security", "gpu_pool", "queries"):
        assert findings(check, "external-redis", objects, tmp_path) == [], check
    assert list(manifests.check_edges(objects, EDGES["external-redis"] | SCRAPING)) == []


def test_the_docs_name_every_overlay() -> None:
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", DOCS.read_text(), re.MULTILINE)) == sorted(OVERLAYS)
    assert sorted(path.name for path in (KUBERNETES / "overlays").iterdir()) == sorted(OVERLAYS)


def test_yaml_is_clean() -> None:
    rules = "{extends: default, rules: {line-length: {max: 110}, document-start: disable}}"
    command = [sys.executable, "-m", "yamllint", "--strict", "-d", rules, str(KUBERNETES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_learner_takes_no_gpu_and_no_cuda_image_in_the_demo() -> None:
    for each in manifests.workloads(rendered("cpu-demo")):
        for container in containers(pod(each)):
            assert container["image"] in ("aspo-learner:cpu", "aspo-actor:cpu", "redis:7.4.2-bookworm")
            assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_the_demo_trains_as_aspo_demo_does(tmp_path: Path) -> None:
    write_config(tmp_path, 0)
    ours = tomllib.loads((KUBERNETES / "overlays/cpu-demo/aspo.toml").read_text())
    theirs = tomllib.loads((tmp_path / "config.toml").read_text())
    del theirs["learner"]["threads"], theirs["learner"]["port"]
    for section in ("sampling", "reward", "loss", "learner"):
        assert ours[section] == theirs[section], section
    assert ours["actor"]["engine"] == theirs["actor"]["engine"]
    assert {**ours["eval"], "path": theirs["eval"]["path"]} == theirs["eval"]


def test_the_demo_makes_the_files_that_its_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (init,) = pod(workload(rendered("cpu-demo"), LEARNER))["initContainers"]
    monkeypatch.setattr(demo_model, "DEMO", replace(demo_model.DEMO, steps=1))
    arguments = [each.replace("/models", str(tmp_path)) for each in init["command"][1:]]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    settings = tomllib.loads((KUBERNETES / "overlays/cpu-demo/aspo.toml").read_text())
    for path in (settings["model"]["path"], settings["data"]["path"], settings["eval"]["path"]):
        assert (tmp_path / Path(path).relative_to("/models")).exists(), path


class Draining(SimpleNamespace):
    drained = False

    def start_drain(self) -> None:
        self.drained = True

    def not_ready(self) -> None: ...

    def status(self) -> ActorStatus:
        return ActorStatus(id="a", run="r", url="", state="sampling", version="", groups_in_flight=3)


def test_the_hook_drains_a_real_actor(tmp_path: Path) -> None:
    command = pod(workload(rendered("gpu-pool"), ACTOR))["containers"][0]["lifecycle"]["preStop"]["exec"][
        "command"
    ]
    assert command[:2] == ["python", "-c"]
    (tmp_path / "operator").write_text("secret\n")
    auth, actor = AuthConfig(operator_token=SecretStr("secret")), Draining()
    app = aspo_actor.app.build_app(actor, BlobStore(tmp_path), Gauges("actor", ACTOR_METRICS), auth)
    with Server(app, listen("127.0.0.1", 0, auth)) as server:
        code = command[2].replace("http://127.0.0.1:8001", server.url)
        code = code.replace("/run/secrets/aspo", str(tmp_path))
        subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert actor.drained


def redis_major() -> int:
    text = subprocess.run(
        [find_redis_server(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return int(re.findall(r"v=(\d+)\.", text)[0])


@pytest.mark.skipif(redis_major() < 7, reason="users-7.acl needs Redis 7 or newer")
def test_the_secrets_open_redis_for_each_role_and_no_other(tmp_path: Path) -> None:
    made = secrets()
    (tmp_path / "users.acl").write_text(made["redis-users"]["users.acl"])
    with redis_server(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as url:
        here = url.removeprefix("redis://")
        for role, shown in made["redis-urls"].items():
            with connect(shown.replace("redis:6379/0", here)) as client:
                assert client.ping()
                if role == ACTOR:
                    with pytest.raises(NoPermissionError):
                        client.set("aspo:r:epoch", 9)


def test_an_actor_holds_no_token_of_the_learners_operator() -> None:
    (tokens,) = (
        v["secret"] for v in pod(workload(rendered("gpu-pool"), ACTOR))["volumes"] if v["name"] == "tokens"
    )
    assert "operator" not in {item["key"] for item in tokens["items"]}
    assert len(set(secrets()["tokens"].values())) == 4
