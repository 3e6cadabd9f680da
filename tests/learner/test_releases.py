"""What goes live, at once or after a canary's trial; and the publisher, which stores beside training."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from aspo.config import CanaryConfig, ModelConfig
from aspo.schemas import PolicyVersion
from aspo.weights.leases import Leases
from aspo.weights.manifest import WeightsError
from aspo.weights.store import WeightStore
from aspo_learner.policy import Policy
from aspo_learner.publisher import Publisher
from aspo_learner.releases import Releases, TrialReport
from models import save_model
from versions import FILES, tensors, version


class Trial:
    """A store with a canary, `actor-0`, and a bystander."""

    def __init__(self, folder: Path, **settings: float) -> None:
        self.leases = Leases()
        self.store = WeightStore(folder)
        self.releases = Releases(self.store, self.leases, CanaryConfig(enabled=True, **settings))  # type: ignore[arg-type]
        for client in ("actor-1", "actor-0"):
            self.leases.renew(client, version(0))
        self.leases.renew("a-relay", version(0), role="relay")

    def publish(self, step: int) -> None:
        self.store.put(version(step), tensors(step), FILES, live=False)
        self.releases.stored(version(step))

    def targets(self) -> tuple[int | None, int | None]:
        canary, other = self.store.target("actor-0"), self.store.target("actor-1")
        return canary and canary.step, other and other.step

    def report(self, step: int, **seen: object) -> str:
        report = {"client": "actor-0", "finite": True, "kl": 0.01} | seen
        return self.releases.report(version(step), TrialReport.model_validate(report))


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    trial = Trial(tmp_path)
    trial.publish(0)
    return trial


def test_the_first_version_goes_live_at_once(trial: Trial) -> None:
    assert trial.targets() == (0, 0)


def test_without_a_canary_every_version_goes_live(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    releases = Releases(store, Leases(), CanaryConfig())
    for step in range(2):
        store.put(version(step), tensors(step), FILES, live=False)
        releases.stored(version(step))
        assert store.live() == version(step)


def test_a_good_report_makes_the_version_live_for_all(trial: Trial) -> None:
    trial.publish(1)
    assert trial.targets() == (1, 0)
    assert trial.report(1, reward=0.5, reward_before=0.9) == "live"
    assert trial.targets() == (1, 1)
    assert trial.releases.outcomes == {"promoted": 1}


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"finite": False}, "not finite"),
        ({"kl": 0.51}, "KL 0.51 from the version before exceeds"),
        ({"reward": 0.1, "reward_before": 0.9}, "reward fell by 0.8"),
    ],
)
def test_a_bad_report_withdraws_the_version(trial: Trial, seen: dict[str, object], words: str) -> None:
    trial.publish(1)
    assert words in trial.report(1, **seen)
    assert trial.targets() == (0, 0)
    trial.publish(2)
    assert trial.targets() == (2, 0)
    assert trial.report(2) == "live"
    assert trial.targets() == (2, 2)


def test_versions_wait_while_a_trial_runs_and_the_newest_is_next(trial: Trial) -> None:
    for step in (1, 2, 3):
        trial.publish(step)
    assert trial.targets() == (1, 0)
    trial.report(1)
    assert trial.targets() == (3, 1)


def test_only_the_canarys_word_on_the_version_on_trial_counts(trial: Trial) -> None:
    trial.publish(1)
    assert trial.report(1, client="actor-1").startswith("ignored")
    assert trial.report(0).startswith("ignored")
    assert trial.targets() == (1, 0)


def test_a_version_whose_canary_falls_silent_is_tried_once_more_by_another(tmp_path: Path) -> None:
    """Else a learner that waits for it, all other data being too stale, would wait for ever."""
    trial = Trial(tmp_path, timeout_s=1e-6)
    trial.publish(0)
    trial.publish(1)
    trial.releases.tick()
    assert trial.targets() == (0, 1)
    trial.releases.tick()
    assert (trial.targets(), trial.releases.undecided) == ((0, 0), False)
    assert trial.releases.outcomes == {"withdrawn": 2}
    trial.publish(2)
    assert trial.targets() == (0, 0)
    trial.leases.renew("actor-0", version(0))  # it was only slow
    trial.releases.tick()
    assert trial.targets() == (2, 0)


def test_after_a_silent_canary_the_newest_version_is_tried(tmp_path: Path) -> None:
    trial = Trial(tmp_path, timeout_s=1e-6)
    for step in range(3):
        trial.publish(step)
    trial.releases.tick()
    assert trial.targets() == (0, 2)


def test_an_actor_that_is_still_starting_is_no_canary(trial: Trial) -> None:
    trial.leases.renew("actor-0", None)
    trial.publish(1)
    assert trial.targets() == (0, 1)


def test_without_any_actor_a_version_waits_for_one(tmp_path: Path) -> None:
    store, leases = WeightStore(tmp_path), Leases()
    releases = Releases(store, leases, CanaryConfig(enabled=True))
    for step in range(2):
        store.put(version(step), tensors(step), FILES, live=False)
        releases.stored(version(step))
    assert store.live() == version(0)
    leases.renew("late", version(0))
    releases.tick()
    assert store.target("late") == version(1)


def test_a_rollback_ends_the_trial(trial: Trial) -> None:
    trial.publish(1)
    trial.store.roll_back(version(0))
    assert trial.report(1).startswith("ignored: a rollback")
    trial.publish(2)
    assert trial.targets() == (0, 0)
    trial.store.promote(version(2))
    assert trial.targets() == (2, 2)


def test_an_operators_word_ends_the_trial(trial: Trial) -> None:
    trial.publish(1)
    trial.store.promote(version(0))
    trial.releases.overruled()
    assert trial.report(1).startswith("ignored")
    assert trial.store.live() == version(0)
    trial.publish(2)
    assert trial.targets() == (2, 0)


def test_a_version_that_an_operator_promoted_is_not_tried_again(trial: Trial) -> None:
    trial.store.roll_back(version(0))
    trial.releases.overruled()
    trial.publish(1)
    assert not trial.releases.undecided
    trial.store.promote(version(1))
    trial.releases.overruled()
    trial.releases.tick()
    assert (trial.targets(), trial.releases.trial) == ((1, 1), None)
    trial.publish(2)
    assert trial.targets() == (2, 1)


def test_what_waited_when_the_learner_went_back_is_never_tried(trial: Trial) -> None:
    trial.publish(1)
    trial.publish(2)
    trial.store.roll_back(version(0))
    trial.releases.overruled()
    trial.releases.branch_off(version(0))
    trial.releases.tick()
    assert (trial.targets(), trial.store.held()) == ((0, 0), False)
    trial.publish(3)
    assert trial.targets() == (3, 0)


def test_nothing_is_undecided_once_the_trial_is_over(trial: Trial) -> None:
    assert not trial.releases.undecided
    trial.publish(1)
    assert trial.releases.undecided
    trial.report(1, finite=False)
    assert not trial.releases.undecided


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    save_model(tmp_path / "model", seed=0)
    return Policy(ModelConfig(path=str(tmp_path / "model"), dtype="bfloat16"), torch.device("cpu"))


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights")


def nudge(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 1e-3


def test_published_versions_are_the_weights_of_their_step(policy: Policy, store: WeightStore) -> None:
    publisher = Publisher(store, policy, "r", epoch=1)
    expected = []
    for step in range(4):
        expected.append(
            {n: p.detach().to(torch.bfloat16).clone() for n, p in policy.model.named_parameters()}
        )
        assert publisher.publish(step) == version(step)
        nudge(policy)  # at once: the copy has been taken
    publisher.wait()
    for step, weights in enumerate(expected):
        found = store.state(version(step)).tensors
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert store.live() == version(3)
    assert publisher.metrics["weights_bytes"] > 0
    assert 0 < publisher.metrics["weights_changed_fraction"] <= 1


def test_a_failed_publication_is_mended_by_the_next(
    policy: Policy, store: WeightStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = Publisher(store, policy, "r", epoch=1)
    publisher.publish(0)
    publisher.wait()
    put = store.put

    def fails_once(name: PolicyVersion, *args: object, **options: object) -> object:
        if name == version(1):
            raise WeightsError("disk full")
        return put(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "put", fails_once)
    for step in (1, 2):
        nudge(policy)
        publisher.publish(step)
    publisher.wait()
    assert "a version was not published: disk full; actors stay on r/1/0" in caplog.text
    assert (publisher.failures, store.live(), store.versions()) == (1, version(2), [version(0), version(2)])
    store.verify(version(2))


def test_training_does_not_wait_for_the_store(
    policy: Policy, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, put = threading.Event(), store.put

    def slow(*args: object, **options: object) -> object:
        assert go.wait(30)
        return put(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "put", slow)
    publisher = Publisher(store, policy, "r", epoch=1)
    publisher.publish(0)
    assert store.live() is None
    go.set()
    publisher.wait()
    assert store.live() == version(0)


def test_a_version_taken_up_again_is_what_it_was(policy: Policy, store: WeightStore) -> None:
    publisher = Publisher(store, policy, "r", epoch=1)
    publisher.publish(0)
    publisher.wait()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    nudge(policy)
    policy.load_published(store.state(version(0)).tensors)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), before[name].to(torch.bfloat16))
