"""Canaries in real processes: a version goes to one actor first, and to the other only after its trial."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aspo.config import ConfigError
from aspo.schemas import PolicyVersion
from aspo_cli.ask import ask
from aspo_cli.status import fetch_status
from project import aspo_weights, learner_url, make_project, metrics_of, post, step_of
from services import Service, wait_until

STEPS = 6
pytestmark = [pytest.mark.faults, pytest.mark.vllm, pytest.mark.timeout(600)]
Actors = tuple[Service, Service]


class Seen(NamedTuple):
    """What was live, and what the canary and the other actor ran, at one moment."""

    live: PolicyVersion
    canary: PolicyVersion
    other: PolicyVersion


def start(project: Path, service: str, *settings: str) -> Service:
    """Start a learner or an actor of a run with a canary; it judges by KL alone unless told otherwise."""
    common = ("canary.enabled=true", "canary.groups=0", "redis.task_lease_s=5", "eval.every=1000")
    options = [part for setting in (*common, *settings) for part in ("--set", setting)]
    return Service(project, service, "--config", "my.toml", *options)


def start_actors(project: Path, *settings: str) -> Actors:
    return start(project, "actor", *settings), start(project, "actor", "actor.id=actor-1", *settings)


def look(url: str) -> Seen | None:
    """Look once; None while the learner does not answer or an actor is not there yet."""
    try:
        found = ask(url, "/v1/weights", None, expect={"live", "versions"})
    except ConfigError:
        return None
    run_by = {actor: entry["version"] for entry in found["versions"] for actor in entry["running"]}
    if not run_by.keys() >= {"actor-0", "actor-1"}:
        return None
    return Seen(*map(PolicyVersion.parse, (found["live"], run_by["actor-0"], run_by["actor-1"])))


def watch(learner: Service, url: str, actors: Actors) -> set[Seen]:
    """Look until the learner ends well."""
    seen: set[Seen] = set()

    def ended() -> bool:
        if found := look(url):
            seen.add(found)
        return learner.process.poll() is not None

    wait_until(ended, 240, actors)
    assert learner.wait(1) == 0, learner.text
    return seen


def says(actor: Service) -> dict[str, Any]:
    """What an actor says of itself, whether or not a learner is there."""
    found = re.search(r"serves on (\S+)", actor.text)
    assert found, actor.text
    return ask(found[1], "/v1/status", None, expect={"version", "weight_syncs"})


def live_on_disk(project: Path, run: str) -> dict[str, Any]:
    return dict(json.loads((project / "runs" / run / "state/weights/live").read_bytes()))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Path:
    return make_project(tmp_path_factory.mktemp("canary"), redis_url, run="canary")


@pytest.fixture(scope="module")
def actors(project: Path) -> Iterator[Actors]:
    """Two actors that outlive the learners of the tests."""
    both = start_actors(project)
    yield both
    for actor in both:
        actor.kill()


@pytest.fixture(scope="module")
def promoted(project: Path, actors: Actors) -> tuple[set[Seen], Service]:
    """A run to its end in which every version passes its trial."""
    learner = start(project, "learner", f"learner.steps={STEPS}", "canary.max_kl=1000")
    try:
        return watch(learner, learner_url(project), actors), learner
    finally:
        learner.kill()


def test_a_version_is_tried_by_one_actor_and_then_given_to_the_other(
    promoted: tuple[set[Seen], Service], project: Path
) -> None:
    seen, learner = promoted
    assert all(moment.other <= moment.live for moment in seen)
    assert any(moment.canary > moment.live for moment in seen), "no trial was seen"
    assert any(moment.other.step > 0 for moment in seen), "the other actor did not follow"
    assert "withdrawn" not in learner.text
    assert [m["step"] for m in metrics_of(project, "canary")] == list(range(1, STEPS + 1))
    assert live_on_disk(project, "canary") == {"version": f"canary/1/{STEPS}", "held": False}


def test_a_bad_version_never_leaves_the_canary_and_training_ends(
    promoted: tuple[set[Seen], Service], project: Path, actors: Actors
) -> None:
    """A bound that no optimizer step keeps; only the new epoch's first version has its parent's weights."""
    before = [says(actor)["weight_syncs"] for actor in actors]
    settings = (f"learner.steps={2 * STEPS}", f"learner.max_staleness={STEPS}", "canary.max_kl=1e-9")
    learner = start(project, "learner", *settings)
    try:
        seen = watch(learner, learner_url(project), actors)
    finally:
        learner.kill()
    good = {PolicyVersion(epoch=epoch, step=STEPS, run="canary") for epoch in (1, 2)}
    assert {moment.live for moment in seen} | {moment.other for moment in seen} <= good
    assert re.search(r"withdrawn after its trial with actor-0: KL .* exceeds canary.max_kl", learner.text)
    canary, other = (says(actor)["weight_syncs"] - count for actor, count in zip(actors, before, strict=True))
    assert other <= 1 < canary
    assert PolicyVersion.parse(says(actors[1])["version"]) in good
    assert [m["step"] for m in metrics_of(project, "canary")] == list(range(1, 2 * STEPS + 1))


def test_an_operators_word_on_what_is_live_reaches_both_actors(project: Path, actors: Actors) -> None:
    """Back while training goes on, then on to the newest, which is not tried again; later ones are."""
    url = learner_url(project)
    settings = ("learner.steps=100000", "learner.max_staleness=8", "canary.max_kl=1000")
    learner = start(project, "learner", *settings, "canary.timeout_s=300", "weights.keep=64")

    def agreed(version: str) -> bool:
        status = fetch_status(url)
        return {status["live"], *(actor["version"] for actor in status["actors"])} == {version}

    def promotions() -> int:
        return int(fetch_status(url)["trials"].get("promoted", 0)) if step_of(url) >= 0 else 0

    try:
        wait_until(lambda: promotions() >= 3, 200, (learner, *actors))
        older = json.loads(aspo_weights(project, url, "ls", "--json"))["versions"][-3]["version"]
        assert f"{older} is live" in aspo_weights(project, url, "rollback", older)
        step = step_of(url)
        wait_until(lambda: agreed(older), 60, (learner, *actors))
        status = wait_until(lambda: step_of(url) > step and fetch_status(url), 60, (learner, *actors))
        assert (status["live"], status["held"], status["trial"]) == (older, True, None)
        post(f"{url}/v1/pause")
        wait_until(lambda: fetch_status(url)["phase"] == "paused", 60, (learner, *actors))
        newest, tried = fetch_status(url)["version"], promotions()
        assert f"{newest} is live" in aspo_weights(project, url, "promote", newest)
        wait_until(lambda: agreed(newest), 60, (learner, *actors))
        assert not fetch_status(url)["held"]
        post(f"{url}/v1/resume")
        wait_until(lambda: promotions() > tried, 60, (learner, *actors))
        assert PolicyVersion.parse(fetch_status(url)["live"]) > PolicyVersion.parse(newest)
        assert learner.stop() == 0, learner.text
    finally:
        learner.kill()
    assert "withdrawn" not in learner.text


def test_a_canary_killed_in_its_trial_is_replaced(tmp_path: Path, redis_url: str, run: str) -> None:
    """Its trial times out, the next one goes to the other actor, and the run goes on to its end."""
    project, steps, timeout = make_project(tmp_path, redis_url, run=run), 20, "canary.timeout_s=16"
    url = learner_url(project)
    # Groups that never come: a trial lasts for half of the timeout.
    actors = start_actors(project, "canary.groups=1000", timeout)
    settings = (f"learner.steps={steps}", "learner.max_staleness=8", "canary.max_kl=1000", timeout)
    learner = start(project, "learner", *settings)

    def tried_by(canary: str) -> dict[str, str] | None:
        """The trial, once the canary runs its version."""
        status = fetch_status(url) if step_of(url) >= 0 else {"trial": None}
        running = {actor["id"]: actor["version"] for actor in status.get("actors", ())}
        trial: dict[str, str] | None = status["trial"]
        return (
            trial if trial and trial["canary"] == canary and running.get(canary) == trial["version"] else None
        )

    try:
        trial = wait_until(lambda: tried_by("actor-0"), 200, (learner, *actors))
        actors[0].kill()
        wait_until(lambda: tried_by("actor-1"), 60, (learner, actors[1]))
        assert learner.wait(200) == 0, learner.text
    finally:
        for service in (learner, *actors):
            service.kill()
    assert learner.text.count("withdrawn") == 1, learner.text
    assert (
        f"version {trial['version']} withdrawn after its trial with actor-0: no report within" in learner.text
    )
    assert [m["step"] for m in metrics_of(project, run)] == list(range(1, steps + 1))
    live = PolicyVersion.parse(live_on_disk(project, run)["version"])
    assert live > PolicyVersion.parse(trial["version"])
