"""Dockerfiles and the compose file agree with each other, with the settings and with their formats."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import composition
from composition import CHECKS, Check, Composition

ROOT = Path(__file__).parents[2]
COMPOSE, ENV, DEMO = "deploy/compose/compose.yaml", "deploy/compose/.env.example", "deploy/compose/demo.toml"
LEARNER, ACTOR = "deploy/docker/learner.Dockerfile", "deploy/docker/actor.Dockerfile"
PROMETHEUS = "deploy/compose/prometheus.yml"


@dataclass(frozen=True)
class Mutant:
    """A mistake in a file, and the check that must see it."""

    check: Check
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(composition.unlinted_dockerfiles, LEARNER, "python:${PYTHON} AS tools", "python:latest AS tools"),
    Mutant(composition.unlinted_dockerfiles, ACTOR, "libnuma1=2.0.16-*", "libnuma1"),
    Mutant(composition.unlinted_yaml, PROMETHEUS, "  scrape_interval", "   scrape_interval"),
    Mutant(
        composition.broken_schema,
        COMPOSE,
        "learner: {condition: service_healthy}",
        "learner: {condition: healthy}",
    ),
    Mutant(composition.broken_schema, COMPOSE, "stop_grace_period", "grace_period"),
    Mutant(composition.unknown_settings, COMPOSE, "DATA_PARALLEL_SIZE", "DATA_PARALLEL"),
    Mutant(composition.unknown_settings, LEARNER, "ASPO_RUN__DIR", "ASPO_RUNS__DIR"),
    Mutant(composition.unknown_settings, DEMO, "max_staleness", "staleness"),
    Mutant(composition.another_task, DEMO, "learning_rate = 1e-4", "learning_rate = 1e-3"),
    Mutant(composition.another_task, DEMO, 'dtype = "float32"\n', ""),
    Mutant(composition.wrong_addresses, DEMO, "http://learner:8000", "http://leaner:8000"),
    Mutant(composition.wrong_addresses, DEMO, "http://learner:8000", "http://learner:8001"),
    Mutant(composition.wrong_addresses, PROMETHEUS, "port: 8001", "port: 8000"),
    Mutant(composition.wrong_addresses, COMPOSE, "networks: [weights, metrics]", "networks: [metrics]"),
    Mutant(composition.wrong_ports, DEMO, "port = 8001", "port = 8002"),
    Mutant(composition.wrong_ports, ACTOR, "127.0.0.1:8001", "127.0.0.1:8000"),
    Mutant(composition.wrong_ports, LEARNER, "EXPOSE 8000", "EXPOSE 8001"),
    Mutant(composition.wrong_ports, COMPOSE, "${LEARNER_PORT:-8000}:8000", "${LEARNER_PORT:-8000}:80"),
    Mutant(composition.wrong_probes, ACTOR, "/readyz", "/health"),
    Mutant(
        composition.wrong_probes,
        COMPOSE,
        "    healthcheck:\n      test: [CMD, promtool",
        "    x-off:\n      test: [CMD, promtool",
    ),
    Mutant(composition.wrong_probes, COMPOSE, 'restart: "no"', "restart: always"),
    Mutant(composition.told_secrets, DEMO, "redis://redis", "redis://learner:hunter2@redis"),
    Mutant(
        composition.told_secrets,
        COMPOSE,
        "READER_TOKEN_FILE: /run/secrets/reader_token",
        "READER_TOKEN: hunter2",
    ),
    Mutant(composition.told_secrets, COMPOSE, "secrets: [grafana_password]", "secrets: []"),
    Mutant(composition.told_secrets, COMPOSE, "file: secrets/operator_token", "file: secrets/operator"),
    Mutant(composition.too_many_rights, COMPOSE, "read_only: true\n  init", "init"),
    Mutant(composition.too_many_rights, COMPOSE, 'user: "472:0"', 'user: "0:0"'),
    Mutant(composition.too_many_rights, COMPOSE, "cap_drop: [ALL]", "cap_drop: [SYS_ADMIN]"),
    Mutant(composition.too_many_rights, COMPOSE, "no-new-privileges:true", "no-new-privileges:false"),
    Mutant(
        composition.too_many_rights,
        COMPOSE,
        'user: "999:999"',
        'user: "999:999"\n    ports: ["127.0.0.1:6379:6379"]',
    ),
    Mutant(composition.too_many_rights, COMPOSE, '"127.0.0.1:${GRAFANA', '"${GRAFANA'),
    Mutant(composition.too_many_rights, COMPOSE, "queue: {internal: true}", "queue: {internal: false}"),
    Mutant(
        composition.too_many_rights,
        COMPOSE,
        "secrets: [reader_token, actor_token]",
        "secrets: [actor_token, operator_token]",
    ),
    Mutant(composition.missing_limits, COMPOSE, ', memory: "${ACTOR_MEMORY:-6g}"', ""),
    Mutant(composition.missing_limits, COMPOSE, "restart: unless-stopped", "x-restart: unless-stopped"),
    Mutant(
        composition.nowhere_to_write, COMPOSE, "source: runs, target: /runs", "source: runs, target: /run"
    ),
    Mutant(composition.nowhere_to_write, COMPOSE, '"/cache:size=256m', '"/home:size=256m'),
    Mutant(
        composition.nowhere_to_write,
        COMPOSE,
        "{type: volume, target: /runs}",
        "{type: volume, source: runs, target: /runs}",
    ),
    Mutant(composition.missing_folders, LEARNER, "/models /project", "/project"),
    Mutant(composition.nothing_to_mount, COMPOSE, "./prometheus.yml", "./prometheus.yaml"),
    Mutant(composition.clumsy_images, LEARNER, "USER 10001:10001", "USER root"),
    Mutant(composition.clumsy_images, ACTOR, 'ENTRYPOINT ["aspo", "actor"]', "ENTRYPOINT aspo actor"),
    Mutant(composition.clumsy_images, ACTOR, 'version="0.1.0"', 'version="0.0.9"'),
    Mutant(composition.missing_context, ".dockerignore", "!constraints.txt\n", ""),
    Mutant(composition.missing_context, ".dockerignore", "!shared", "!shared\n!runs"),
    Mutant(composition.untold_variables, ENV, "REDIS_MAXMEMORY=768mb\n", ""),
    Mutant(composition.untold_variables, COMPOSE, "LEARNER_MEMORY:-4g", "LEARNER_MEMORY:-8g"),
    Mutant(composition.wrong_variants, COMPOSE, "image: aspo-actor:cuda", "image: aspo-actor:cpu"),
    Mutant(composition.wrong_variants, COMPOSE, "${ACTOR_GPUS:-1}", "${ACTOR_GPUS:-0}"),
    Mutant(composition.wrong_variants, COMPOSE, "        reservations:\n", "        x-reservations:\n"),
)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is shipped, with secrets made."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("secrets", ".env"))
    for name in (".dockerignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run([folder / "deploy/compose/secrets.sh"], check=True)
    return folder


@pytest.fixture
def tree(shipped: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(shipped, tmp_path / "tree")


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_shipped_is_sound(check: Check, tree: Path) -> None:
    assert list(check(Composition(tree))) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.check.__name__}-{m.new[:30]}")
def test_each_check_sees_a_mistake(mutant: Mutant, tree: Path) -> None:
    text = (tree / mutant.file).read_text()
    assert mutant.old in text, "the mutant is of a former file"
    (tree / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    assert list(mutant.check(Composition(tree)))


def test_every_check_has_a_mutant() -> None:
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize(
    ("profile", "more"),
    [("none", set()), ("gpu", {"learner-gpu", "actor-gpu"}), ("observability", {"prometheus", "grafana"})],
)
def test_the_real_parser_takes_it(profile: str, more: set[str], tree: Path) -> None:
    shutil.copy(tree / ENV, tree / "deploy/compose/.env")
    command = ["docker-compose", "--file", str(tree / COMPOSE), "--profile", profile, "config", "--services"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"redis", "demo", "learner", "actor"} | more
