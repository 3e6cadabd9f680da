"""Whatever crashes, sleeps or lies, in whatever order: what the service promises of its data holds.

A state machine drives the real queue, fence, intake, ledger, journal, checkpoints and weight store; the
invariants are looked at from outside after every rule. Each mutant breaks one rule of the protocol, and must
be caught.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aspo.codec import encode_group
from aspo.config import Config, GroupsConfig
from aspo.errors import AspoError
from aspo.fence import Fence, FencedError
from aspo.queue import Claim, RolloutWriter, TaskQueue, connect
from aspo.schemas import PolicyVersion, RolloutGroup
from aspo.weights.store import WeightStore
from aspo_learner.dispatcher import task_uid
from mutants import MUTANTS, Unnamed
from protocol import (
    CHECKPOINT_EVERY,
    Durable,
    Parts,
    ToyLearner,
    Trained,
    chain,
    digest_of,
)
from rollouts import make_plain_group, write_config
from services import redis_server

ACTORS = st.sampled_from(["a", "b"])
ANY = st.integers(0, 99)


@dataclasses.dataclass
class Work:
    """A task that an actor has claimed, and the version that it samples with."""

    actor: str
    claim: Claim
    version: str
    stored: bool = False


@contextlib.contextmanager
def refused(fence: Fence) -> Iterator[list[FencedError]]:
    """Leave the body when it is refused as `aspo learner` does: paths that lead nowhere mean a fence."""
    was: list[FencedError] = []
    try:
        yield was
    except FencedError as error:
        was.append(error)
    except (OSError, AspoError) as error:
        try:
            fence.require()
        except FencedError as fenced:
            was.append(fenced)
        else:
            raise error


@contextlib.contextmanager
def before_files_are_replaced(call: Callable[[], None]) -> Iterator[None]:
    """Have `call` come between the making of a file and its taking of its place."""
    replace = os.replace

    def replace_later(source: Any, target: Any) -> None:
        call()
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_later)
        yield


class Protocol(RuleBasedStateMachine):
    """Actors, learners one after the other, and those that overslept, on one run."""

    def __init__(self, client: redis.Redis, config: Config, parts: Parts) -> None:
        super().__init__()
        run = config.run.model_copy(update={"name": f"protocol-{uuid.uuid4().hex[:12]}"})
        self.client, self.parts = client, parts
        self.config = config.model_copy(update={"run": run})
        self.run, self.folder = run.name, run.path
        self.limit = (config.learner.max_staleness + 1) * config.learner.batch_prompts
        self.tasks = TaskQueue(client, self.run, lease_s=10**5)
        self.writers: dict[str, RolloutWriter] = {}
        self.work: list[Work] = []
        self.abandoned: list[Claim] = []
        self.answers = 0
        self.accepted: dict[tuple[bytes, bytes], str] = {}
        self.broken = False
        self.poison: dict[tuple[bytes, bytes], bytes] = {}
        self.trained: Trained = []
        self.versions: dict[str, str] = {}
        self.epoch, self.zombies = 0, list[ToyLearner]()
        self.learner: ToyLearner | None = None
        self.usurper: Fence | None = None
        self.start()
        self.before = self.now = Durable(client, self.run, self.folder)

    # Actors

    @rule(actor=ACTORS, count=st.integers(1, 3))
    def actor_claims(self, actor: str, count: int) -> None:
        live = self.now.live
        if live is not None:
            claims = self.tasks.claim(actor, count=count)
            self.work += [Work(actor, claim, str(live)) for claim in claims]

    @precondition(lambda self: self.work)
    @rule(which=ANY, twice=st.booleans())
    def actor_stores(self, which: int, twice: bool) -> None:
        """Store an answer; `twice` as after a lost reply."""
        work = self.work[which % len(self.work)]
        task, self.answers = work.claim.task, self.answers + 1
        agreed = self.config.groups.refill > 0 and self.answers % 3 == 0  # nothing to learn: replaced
        rewards = [float(self.answers + (0 if agreed else i)) for i in range(task.group_size)]
        spans = [[(work.version, 1)]] * task.group_size
        group = make_plain_group(spans, uid=task.uid, prompt_ids=task.prompt_ids, rewards=rewards)
        self.store(work.actor, task.uid, encode_group(group), twice=twice)
        work.stored = True

    @precondition(lambda self: any(work.stored for work in self.work))
    @rule(which=ANY)
    def actor_finishes(self, which: int) -> None:
        stored = [work for work in self.work if work.stored]
        work = stored[which % len(stored)]
        self.tasks.finish([work.claim])
        self.work.remove(work)

    @precondition(lambda self: self.work)
    @rule(which=ANY)
    def actor_hands_back(self, which: int) -> None:
        work = self.work.pop(which % len(self.work))
        self.tasks.hand_back(work.actor, [work.claim])

    @rule()
    def actors_answer(self) -> None:
        """All that is asked is answered, as most of the time."""
        self.actor_claims("a", 2 * self.limit)
        for which in range(len(self.work)):
            self.actor_stores(which, twice=False)
        while self.work:
            self.actor_finishes(0)

    @rule(actor=ACTORS)
    def actor_dies(self, actor: str) -> None:
        self.abandoned += [work.claim for work in self.work if work.actor == actor]
        self.work = [work for work in self.work if work.actor != actor]
        self.writers.pop(actor, None)

    @rule()
    def leases_run_out(self) -> None:
        """Those of the dead, and those of the slow, who go on with their tasks."""
        claims, self.abandoned = [*self.abandoned, *(work.claim for work in self.work)], []
        self.tasks.hand_back("late", claims)

    @rule(kind=st.sampled_from(["garbage", "not a number", "unasked", "foreign"]), offset=st.integers(-2, 6))
    def poison_arrives(self, kind: str, offset: int) -> None:
        index = max(0, len(self.trained) * self.config.learner.batch_prompts + offset)
        group = self.poisonous(kind, task_uid(self.run, "train", index))
        payload = b"garbage" if kind == "garbage" else encode_group(group)
        entry = self.store("mallory", group.uid, payload)
        self.poison[entry] = payload

    def poisonous(self, kind: str, uid: str) -> RolloutGroup:
        group = make_plain_group([[(f"{self.run}/1/0", 1)]] * 2, uid=uid)
        if kind == "not a number":
            return dataclasses.replace(group, behavior_logprobs=np.full(2, np.nan, dtype=np.float32))
        if kind == "unasked":
            return dataclasses.replace(group, uid=task_uid(self.run, "train", 10**6))
        return dataclasses.replace(group, uid="another:train:0") if kind == "foreign" else group

    def store(self, actor: str, uid: str, payload: bytes, *, twice: bool = False) -> tuple[bytes, bytes]:
        writer = self.writers.setdefault(actor, self.parts.writer(self.client, self.run, actor))
        writer.put(uid, payload)
        if twice:
            assert writer._store(uid, payload), "what is stored was refused when it was sent again"
        new = self.look().rollouts.keys() - self.accepted.keys()
        self.require("I1", len(new) == 1, f"one answer was stored {len(new)} times")
        [entry] = new
        self.accepted[entry] = uid
        return entry

    # Learners

    @precondition(lambda self: self.learner)
    @rule(actions=st.integers(1, 24))
    def learner_goes_on(self, actions: int) -> None:
        for _ in range(actions):
            self.proceed(self.learner)

    @precondition(lambda self: self.learner)
    @rule()
    def learner_crashes(self) -> None:
        self.learner = None

    @precondition(lambda self: self.learner is None)
    @rule()
    def successor_starts(self) -> None:
        self.start()

    @precondition(lambda self: self.learner)
    @rule()
    def learner_oversleeps(self) -> None:
        self.zombies.append(self.learner)
        self.start()

    @precondition(lambda self: self.learner)
    @rule(actions=st.integers(1, 12), gap=st.integers(0, 2))
    def learner_is_overtaken_between_check_and_act(self, actions: int, gap: int) -> None:
        """In the `gap`-th moment between check and act, or before a file takes its place, another starts."""
        old, self.usurper, gaps = self.learner, None, iter(range(gap))
        seen: list[Any] = []

        def take_over() -> None:
            if not seen and next(gaps, None) is None:
                seen.append(None)
                self.all_is_well()
                self.usurper = self.take_run()
                seen[0] = self.look().seen()

        old.fence.on_gap = take_over
        with before_files_are_replaced(take_over), refused(old.fence):
            while self.usurper is None and actions > 0:
                actions -= 1
                self.proceed(old)
        old.fence.on_gap = lambda: None
        if self.usurper is not None:
            self.require("I8", self.look().seen() == seen[0], "one that was overtaken changed something")
            self.start(self.usurper)

    @precondition(lambda self: self.zombies)
    @rule(which=ANY, actions=st.integers(1, 6))
    def zombie_wakes(self, which: int, actions: int) -> None:
        zombie, seen = self.zombies[which % len(self.zombies)], self.look().seen()
        with refused(zombie.fence) as was:
            for _ in range(actions):
                self.proceed(zombie)
        if was:
            self.zombies.remove(zombie)
        self.require("I8", self.look().seen() == seen, "one that overslept changed something")

    def proceed(self, learner: ToyLearner) -> str:
        """Have a learner do one action; whoever trains a step trains it as it was the first time."""
        action = next(learner.actions)
        if action == "trained":
            again = self.trained[: learner.step]
            self.require("I7", learner.history[: len(again)] == again, "other rollouts were trained")
            self.trained += learner.history[len(self.trained) :]
        return action

    def start(self, fence: Fence | None = None) -> None:
        fence = fence or self.take_run()
        self.learner = self.parts.learner(self.client, self.config, self.parts, fence)

    def take_run(self) -> Fence:
        self.client.delete(f"aspo:{self.run}:lease")
        fence = self.parts.fence.acquire(self.client, self.run, self.folder)
        self.epoch = fence.epoch
        return fence

    # Promises

    def look(self) -> Durable:
        return Durable(self.client, self.run, self.folder)

    @invariant()
    def all_is_well(self) -> None:
        self.before, self.now = self.now, self.look()
        self.check_history()
        self.check_rollouts()
        self.check_versions()

    def check_history(self) -> None:
        now, before = self.now, self.before
        history = now.checkpoint["history"]
        names = [name.split()[0] for step in history for name in step]
        self.require("I1", len(names) == len(set(names)), "a rollout was trained twice")
        if history:
            self.require("I5", torch.equal(chain(history), now.checkpoint["weights"]), "the weights differ")
        self.require("I7", now.plan.startswith(before.plan), "what was planned has changed")
        old = before.checkpoint["history"]
        self.require("I7", history[: len(old)] == old, "what was durable has changed")
        if now.checkpoints != before.checkpoints:
            self.require("I8", now.checkpoint["epoch"] == self.epoch, "an old learner made a checkpoint")

    def check_rollouts(self) -> None:
        now = self.now
        ledger = now.ledger
        gone = self.accepted.keys() - now.rollouts.keys()
        for entry in gone & self.poison.keys():
            self.require("I6", self.poison[entry] in now.quarantined, "poison vanished")
        good = {entry: self.accepted[entry] for entry in self.accepted.keys() - self.poison.keys()}
        waiting = now.indices(uid for entry, uid in good.items() if entry in now.rollouts)
        for index in now.indices(uid for entry, uid in good.items() if entry in gone) - waiting:
            self.require("I2", index in ledger, "a rollout was acknowledged that nothing durable knows of")
        self.require("I6", set(now.quarantined) <= set(self.poison.values()), "good ones were quarantined")
        bound = self.limit + len(self.poison)  # an unusable answer frees a place; a usable one may yet come
        ended = self.learner.ledger if self.learner else ledger
        asked = [index for index in now.tasks if index not in ended and index not in waiting]
        self.require("I9", len(asked) <= bound, "more tasks are waiting than there may be")
        held = [index for index in waiting if index not in ledger]
        bound += CHECKPOINT_EVERY * self.config.learner.batch_prompts * (1 + self.config.groups.refill)
        self.require("I9", len(held) <= bound, "more rollouts are waiting than there may be")

    def check_versions(self) -> None:
        now, before = self.now, self.before
        for name, digest in now.versions.items():
            self.require("I3", self.versions.setdefault(name, digest) == digest, "a version has changed")
            version = PolicyVersion.parse(name)
            true = digest_of(self.trained[: version.step])
            self.require(
                "I3", version.step <= len(self.trained) and digest == true, f"{name} was not trained"
            )
            if name not in before.versions:
                self.require("I8", version.epoch == self.epoch, "an old learner published")
        if now.live is not None:
            self.require("I3", str(now.live) in now.versions, "what is live is not there")
            self.require("I4", before.live is None or before.live <= now.live, "an older version went live")

    def require(self, promise: str, kept: bool, otherwise: str) -> None:
        """Fail with the name of a promise that is not kept."""
        self.broken |= not kept
        assert kept, f"{promise}: {otherwise}"

    # The end

    def teardown(self) -> None:
        """Faults stop: every rollout comes to an end, and what is stored can be read back."""
        if self.broken:
            return
        if self.learner is None:
            self.start()
        learner = self.learner
        learner.asking, learner.batch = False, 1
        for _ in range(40):
            self.leases_run_out()
            self.actors_answer()
            for _ in range(20):
                waits = self.proceed(learner) == "dispatched"
                if waits and learner.dispatcher.outstanding == 0:
                    list(learner.make_durable())
                    break
            self.all_is_well()
            if not self.now.rollouts:
                break
        self.require("I9", not self.look().rollouts, "rollouts never came to an end")
        self.all_is_well()
        store = WeightStore(self.look().folder / "weights")
        for version in store.versions():
            store.verify(version)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A Redis that writes nothing to the disk: it does not fail here."""
    with redis_server(tmp_path_factory.mktemp("redis"), "--appendonly", "no") as url:
        yield connect(url)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    overrides = {
        "learner.max_staleness": 1,
        "learner.batch_prompts": 2,
        "learner.mini_batch_prompts": 1,
        "sampling.group_size": 2,
    }
    return write_config(
        tmp_path, model="m", overrides=[f"{name}={value}" for name, value in overrides.items()]
    )


SETTINGS = settings(
    max_examples=12,
    stateful_step_count=60,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def drive(client: redis.Redis, config: Config, parts: Parts, settings: settings) -> None:
    """Run the machine on these parts; raises what it finds."""
    run_state_machine_as_test(lambda: Protocol(client, config, parts), settings=settings)


def test_every_promise_is_kept(client: redis.Redis, config: Config) -> None:
    drive(client, config, Parts(), SETTINGS)


def test_every_promise_is_kept_while_groups_are_replaced(client: redis.Redis, config: Config) -> None:
    drive(client, config.model_copy(update={"groups": GroupsConfig(refill=1)}), Parts(), SETTINGS)


@pytest.mark.faults
@pytest.mark.parametrize("refill", [0, 1])
def test_every_promise_is_kept_for_long(client: redis.Redis, config: Config, refill: int) -> None:
    config = config.model_copy(update={"groups": GroupsConfig(refill=refill)})
    drive(client, config, Parts(), settings(SETTINGS, max_examples=400, stateful_step_count=100))


@pytest.mark.parametrize(("parts", "broken"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_rule_is_caught(client: redis.Redis, config: Config, parts: Parts, broken: str) -> None:
    with pytest.raises(AssertionError, match=f"^{broken}: "):
        drive(client, config, parts, settings(SETTINGS, max_examples=400))


def answer_twice(client: redis.Redis, config: Config, parts: Parts) -> None:
    """Train on one actor's answers, crash once another's have come, and begin again."""
    run = Protocol(client, config, parts)
    run.learner_goes_on(6)
    run.all_is_well()
    run.actor_claims("b", 2)
    run.leases_run_out()
    run.actor_claims("a", 2)
    for which in (0, 1):
        run.actor_stores(which, twice=False)
    while not run.trained:
        run.learner_goes_on(1)
    for which in (2, 3):
        run.actor_stores(which, twice=False)
    run.learner_goes_on(9)
    run.all_is_well()
    run.learner_crashes()
    run.successor_starts()
    run.learner_goes_on(20)
    run.all_is_well()
    run.teardown()


def test_a_step_is_trained_again_on_the_very_answers_it_was_trained_on(
    client: redis.Redis, config: Config
) -> None:
    answer_twice(client, config, Parts())
    with pytest.raises(AssertionError, match="I7: other rollouts were trained"):
        answer_twice(client, config, Parts(journal=Unnamed))
