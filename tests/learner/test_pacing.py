"""In normal running nothing passes the staleness bound: dispatcher and intake against actors' delays."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspo.codec import encode_group
from aspo.config import Config
from aspo.queue import Claim, RolloutReader, RolloutWriter, TaskQueue
from aspo.schemas import PolicyVersion, Task
from aspo_learner.data import Prompt
from aspo_learner.dispatcher import Dispatcher
from aspo_learner.intake import Intake, Limits
from aspo_learner.ledger import Ledger
from aspo_learner.order import PromptOrder
from aspo_learner.staleness import StalenessRule
from rollouts import make_plain_group, write_config

PROMPTS = [Prompt([2, 3, i], {}) for i in range(5)]


@dataclass(frozen=True)
class Delays:
    """Times in ticks: of a step, from its end to the version's storage, on to the actors, and of sampling."""

    step: int
    store: int
    fetch: int
    sample: tuple[int, int]  # quickest and slowest
    places: int  # groups that actors sample at once


@dataclass
class Sampling:
    """A task that an actor holds; it begins once the actor runs the version that the task needs."""

    claim: Claim
    version: int | None = None
    ready_at: int = 0


@dataclass
class Actors:
    """Claims, in order, as many tasks as there are places, and answers each after a random time."""

    client: redis.Redis
    run: str
    delays: Delays
    random: random.Random
    held: list[Sampling] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tasks = TaskQueue(self.client, self.run)
        self._writer = RolloutWriter(self.client, self.run, "actor")

    def tick(self, now: int, version: int) -> int:
        """Answer what is due, claim what there is room for, begin what the version allows; count answers."""
        due = [s for s in self.held if s.version is not None and s.ready_at <= now]
        for sampling in due:
            self._answer(sampling)
        room = self.delays.places - len(self.held)
        if room:
            self.held += [Sampling(claim) for claim in self._tasks.claim("actor", count=room)]
        for sampling in self.held:
            if sampling.version is None and version >= needed(sampling.claim.task):
                sampling.version = version
                sampling.ready_at = now + self.random.randint(*self.delays.sample)
        return len(due)

    def _answer(self, sampling: Sampling) -> None:
        task, version = sampling.claim.task, f"{self.run}/1/{sampling.version}"
        group = make_plain_group([[(version, 1)]] * task.group_size, uid=task.uid, prompt_ids=task.prompt_ids)
        self._writer.put(task.uid, encode_group(group))
        self._tasks.finish([sampling.claim])
        self.held.remove(sampling)


def needed(task: Task) -> int:
    return PolicyVersion.parse(task.min_version).step if task.min_version else 0


def train(
    client: redis.Redis, config: Config, delays: Delays, seed: int, steps: int
) -> Iterator[tuple[int, int, Intake]]:
    """Run the learner's loop in ticks; yields each batch's staleness, the outstanding tasks, the intake."""
    run, learner, chance = config.run.name, config.learner, random.Random(seed)
    ledger, rule = Ledger(), StalenessRule(max_staleness=learner.max_staleness)
    dispatcher = Dispatcher(TaskQueue(client, run), PromptOrder(PROMPTS, config.run.seed), config, ledger)
    limits = Limits(run=run, vocab_size=16, max_tokens=6, max_prompt_tokens=10, max_entry_bytes=2**20)
    intake = Intake(RolloutReader(client, run), ledger, dispatcher, limits, rule, on_eval=lambda group: None)
    actors = Actors(client, run, delays, chance)
    stored, fetched = {0: 0}, {0: 0}  # version -> the tick from which it is there
    step, busy_until, now = 0, None, 0
    while step < steps:
        current = PolicyVersion(1, step, run)
        if actors.tick(now, max(version for version, tick in fetched.items() if tick <= now)):
            intake.pump(current, 0.0)
        if busy_until == now:
            step, busy_until = step + 1, None
            current = PolicyVersion(1, step, run)
            if step % config.weights.publish_every == 0:
                stored[step] = now + chance.randint(0, delays.store)
                fetched[step] = stored[step] + chance.randint(0, delays.fetch)
        if busy_until is None:
            newest = PolicyVersion(1, max(v for v, tick in stored.items() if tick <= now), run)
            behind = rule.lag(newest, current)
            dispatcher.top_up(steps - step, current=current, live=newest, behind=behind)
            batch = intake.take(learner.batch_prompts, current)
            if batch is not None:
                yield max(rule.staleness_of(g, current) for g in batch), dispatcher.outstanding, intake
                busy_until = now + delays.step
        now += 1


@st.composite
def normal_running(draw: st.DrawFn) -> tuple[Delays, int]:
    """Delays, and a staleness bound within which they keep everything.

    Groups may take any time as long as they come in order: from a single place, or all equally slow. Where
    one may overtake another, none is slower than a training step, and the bound leaves room for it.
    """
    store, fetch, slowest = (draw(st.integers(low, 4)) for low in (0, 0, 1))
    kind = draw(st.sampled_from(["one place", "equally slow", "overtaking"]))
    if kind == "overtaking":
        step = store + fetch + slowest + draw(st.integers(1, 4))
        return Delays(step, store, fetch, (1, slowest), places=100), draw(st.integers(2, 3))
    step, slowest = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    one = kind == "one place"
    delays = Delays(step, store, fetch, (1 if one else slowest, slowest), places=1 if one else 100)
    return delays, draw(st.integers(0, 3))


@settings(
    max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    running=normal_running(),
    batch=st.integers(1, 3),
    data=st.data(),
    seed=st.integers(0, 999),
)
def test_in_normal_running_nothing_passes_the_bound(
    client: redis.Redis,
    tmp_path: Path,
    running: tuple[Delays, int],
    batch: int,
    data: st.DataObject,
    seed: int,
) -> None:
    delays, max_staleness = running
    publish_every = data.draw(st.integers(1, max_staleness + 1))
    overrides = {
        "learner.max_staleness": max_staleness,
        "learner.batch_prompts": batch,
        "learner.mini_batch_prompts": 1,
        "weights.publish_every": publish_every,
        "sampling.group_size": 2,
    }
    run = f"pace-{uuid.uuid4().hex[:12]}"
    config = write_config(
        tmp_path, model="m", run=run, overrides=[f"{name}={value}" for name, value in overrides.items()]
    )
    worst = 0
    for staleness, outstanding, intake in train(client, config, delays, seed, steps=12):
        worst = max(worst, staleness)
        assert outstanding <= (max_staleness + 1) * batch
        assert intake.ended == {}
    assert worst <= max_staleness


def test_a_task_names_the_oldest_version_that_is_within_the_bound_in_its_turn(
    client: redis.Redis, run: str, tmp_path: Path
) -> None:
    overrides = ["learner.max_staleness=2", "learner.batch_prompts=1", "learner.mini_batch_prompts=1"]
    config = write_config(tmp_path, model="m", run=run, overrides=overrides)
    queue = TaskQueue(client, run)
    dispatcher = Dispatcher(queue, PromptOrder(PROMPTS, config.run.seed), config, Ledger())

    def asked(step: int, live: PolicyVersion, behind: int) -> list[str | None]:
        current = PolicyVersion(epoch=2, step=step, run=run)
        dispatcher.top_up(100, current=current, live=live, behind=behind)
        return [claim.task.min_version for claim in queue.claim("a", count=100)]

    live = PolicyVersion(epoch=2, step=1, run=run)
    assert asked(1, live, behind=1) == [None, None], "what cannot be on time in its turn is not asked for"
    assert asked(1, live, behind=0) == [f"{run}/2/1"]
    trial = PolicyVersion(epoch=1, step=7, run=run)
    queue.reset("train")
    dispatcher = Dispatcher(queue, PromptOrder(PROMPTS, config.run.seed), config, Ledger())
    assert asked(9, trial, behind=0) == [str(trial)] * 3, "what is not live cannot be waited for"
