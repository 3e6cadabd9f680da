"""The crash-safety protocol on the real parts, with a hash chain for a model, so that a step costs nothing.

A `ToyLearner` does what `Learner` does, one action a `next`: between any two of them a test may drop it, as
a crash would, or leave it asleep while a successor starts. `Durable` is what an outsider sees of a run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis
import safetensors.torch
import torch
from blake3 import blake3
from redis.client import Pipeline
from torch import Tensor, nn

from aspo.codec import decode_task
from aspo.config import Config
from aspo.fence import Fence
from aspo.queue import RolloutReader, RolloutWriter, TaskQueue, rollout_keys
from aspo.schemas import PolicyVersion, RolloutGroup
from aspo.weights.manifest import decode_manifest, state_digest
from aspo.weights.state import describe
from aspo.weights.store import Live, WeightStore
from aspo_learner.checkpoint import Checkpoints
from aspo_learner.data import Prompt
from aspo_learner.dispatcher import Dispatcher, task_index
from aspo_learner.intake import Intake, Limits
from aspo_learner.journal import Journal
from aspo_learner.ledger import Ledger
from aspo_learner.order import PromptOrder
from aspo_learner.planner import Planner
from aspo_learner.staleness import StalenessRule

PROMPTS = [Prompt([2, 3, i], {}) for i in range(5)]
STEPS = 10**6
CHECKPOINT_EVERY = 3
Trained = list[list[str]]  # by step, the uid and content of each group


def name_of(group: RolloutGroup) -> str:
    """A group's uid and content: two answers to one task differ."""
    return f"{group.uid} {blake3(group.rewards.tobytes()).hexdigest(8)}"


def chain(history: Trained) -> Tensor:
    """The weights after these steps: a hash of the groups and of the weights before them; float32 [8]."""
    weights = bytes(8)
    for names in history:
        weights = blake3(weights + "".join(names).encode()).digest(8)
    return torch.tensor(list(weights), dtype=torch.float32)


class ToyFence(Fence):
    """The real fence without its clock: no lease is renewed; a test may act between its check and its act."""

    on_gap: Callable[[], None] = staticmethod(lambda: None)

    def execute(self, queue: Callable[[Pipeline], Any], **options: Any) -> list[Any]:
        def commands(pipeline: Pipeline) -> None:
            self.on_gap()
            queue(pipeline)

        return super().execute(commands, **options)

    def _keep_renewing(self) -> None:
        pass


class ToyLearner:
    """One learner process from its start on; `next` does one action of `Learner.run` and names it."""

    def __init__(self, client: redis.Redis, config: Config, parts: Parts, fence: Fence) -> None:
        run, folder = config.run.name, fence.folder
        self.config, self.fence, self.batch = config, fence, config.learner.batch_prompts
        self.asking = True
        self.model = nn.Module()
        self.model.weights = nn.Parameter(chain([]))
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.store = WeightStore(folder / "weights", keep=4)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        state = self.checkpoints.load(self.model, self.optimizer) or {}
        self.step, self.history = state.get("step", 0), state.get("history", [])
        self.ledger = parts.ledger.load(state.get("ledger", {}))
        self.tasks = TaskQueue(client, run, lease_s=10**5, fence=fence)
        self.dispatcher = Dispatcher(
            self.tasks, PromptOrder(PROMPTS, config.run.seed), config, self.ledger, state.get("cursor", 0)
        )
        self.intake = parts.intake(
            parts.reader(client, run, fence=fence),
            self.ledger,
            self.dispatcher,
            Limits(run=run, vocab_size=16, max_tokens=6, max_prompt_tokens=10, max_entry_bytes=2**16),
            StalenessRule(max_staleness=config.learner.max_staleness, branch=self.step),
            on_eval=lambda group: None,
            refill=config.groups.refill,
        )
        journal = parts.journal(folder / "plan.jsonl")
        self.planner = Planner(journal, self.intake, self.ledger, self.step)
        self.actions = self.act()

    @property
    def current(self) -> PolicyVersion:
        return PolicyVersion(epoch=self.fence.epoch, step=self.step, run=self.config.run.name)

    def act(self) -> Iterator[str]:
        """The protocol, as `Learner` keeps to it."""
        self.planner.resume(self.current)
        yield "resumed"
        yield from self.publish()
        self.dispatcher.ask_again(self.intake.held)
        yield "asked again"
        while True:
            yield from self.step_once()

    def step_once(self) -> Iterator[str]:
        groups = yield from self.read()
        yield "read"
        self.planner.write(self.step + 1, groups)
        yield "planned"
        self.train(groups)
        yield "trained"
        yield from self.publish()
        if self.step % CHECKPOINT_EVERY == 0:
            yield from self.make_durable()

    def read(self) -> Generator[str, None, list[RolloutGroup]]:
        """Wait for a batch; in a silence ask again for what may have been lost."""
        groups, waited = None, itertools.count(1)
        while groups is None:
            self.dispatch()
            yield "dispatched"
            self.fence.require()
            if not self.intake.pump(self.current, 0.0) and next(waited) % 3 == 0:
                self.intake.reread(self.current)
                self.dispatcher.recover(self.intake.held)
            yield "pumped"
            groups = self.planner.take(self.batch, self.current)
        return groups

    def dispatch(self) -> None:
        newest = self.store.newest()
        behind = max(0, self.intake.staleness.lag(newest, self.current)) if newest else 0
        remaining = STEPS - self.step if self.asking else 0
        self.dispatcher.top_up(remaining, current=self.current, live=self.store.live(), behind=behind)

    @torch.no_grad()
    def train(self, groups: Sequence[RolloutGroup]) -> None:
        self.history = [*self.history, [name_of(group) for group in groups]]
        self.model.weights.copy_(chain(self.history))
        self.step += 1

    def publish(self) -> Iterator[str]:
        if self.step < self.planner.retraining_until and self.store.live() is not None:
            return
        tensors = {"weights": self.model.weights.detach().clone()}
        self.store.put(self.current, tensors, {"config.json": b"{}"}, live=False)
        yield "stored"
        self.store.go_live(self.current)
        yield "published"

    def make_durable(self) -> Iterator[str]:
        self.checkpoint()
        yield "checkpointed"
        self.intake.acknowledge()
        yield "acknowledged"

    def checkpoint(self) -> None:
        state = {
            "ledger": self.ledger.state(),
            "cursor": self.dispatcher.cursor,
            "history": self.history,
            "epoch": self.fence.epoch,
        }
        self.checkpoints.save(self.step, self.model, self.optimizer, state)


@dataclass(frozen=True)
class Parts:
    """What a learner and an actor are made of; a mutant puts one of its own in the place of a real part."""

    fence: type[ToyFence] = ToyFence
    reader: type[RolloutReader] = RolloutReader
    ledger: type[Ledger] = Ledger
    journal: type[Journal] = Journal
    intake: type[Intake] = Intake
    writer: type[RolloutWriter] = RolloutWriter
    learner: type[ToyLearner] = ToyLearner


@dataclass
class Durable:
    """What is durable of a run at one moment, read from Redis and the folder without the learner's code."""

    client: redis.Redis
    run: str
    folder: Path
    rollouts: dict[tuple[bytes, bytes], str] = field(init=False)
    tasks: list[int] = field(init=False)
    quarantined: list[bytes] = field(init=False)
    plan: bytes = field(init=False)
    checkpoint: dict[str, Any] = field(init=False)
    checkpoints: list[str] = field(init=False)
    versions: dict[str, str] = field(init=False)
    live: PolicyVersion | None = field(init=False)

    def __post_init__(self) -> None:
        self.folder = max(self.folder.glob("state-*"), key=lambda path: int(path.name.partition("-")[2]))
        registry, _ = rollout_keys(self.run, "")
        streams = sorted(self.client.smembers(registry))
        with self.client.pipeline() as pipeline:
            for stream in (f"aspo:{self.run}:tasks:train", f"aspo:{self.run}:quarantine", *streams):
                pipeline.xrange(stream)
            asked, kept, *stored = pipeline.execute()
        self.tasks = [decode_task(fields[b"task"]).index for _, fields in asked]
        self.quarantined = [fields[b"group"] for _, fields in kept]
        self.rollouts = {
            (stream, entry_id): fields[b"uid"].decode()
            for stream, entries in zip(streams, stored, strict=True)
            for entry_id, fields in entries
        }
        plan = self.folder / "plan.jsonl"
        self.plan = plan.read_bytes() if plan.exists() else b""
        self.checkpoints = sorted(path.name for path in self.folder.glob("checkpoints/step-*"))
        self.checkpoint = {"step": 0, "history": [], "epoch": 0, "ledger": {}}
        if self.checkpoints:
            path = self.folder / "checkpoints" / self.checkpoints[-1]
            self.checkpoint = json.loads((path / "state.json").read_text())
            self.checkpoint["weights"] = safetensors.torch.load_file(path / "model.safetensors")["weights"]
        manifests = [decode_manifest(p.read_bytes()) for p in self.folder.glob("weights/manifests/*.json")]
        self.versions = {manifest.version: manifest.state_digest for manifest in manifests}
        live = self.folder / "weights" / "live"
        self.live = None
        if live.exists():
            self.live = PolicyVersion.parse(msgspec.json.decode(live.read_bytes(), type=Live).version)

    @property
    def ledger(self) -> Ledger:
        """The tasks that have ended, as the newest checkpoint has it."""
        return Ledger.load(self.checkpoint["ledger"])

    def unacknowledged(self) -> set[int]:
        """The tasks with a rollout in Redis."""
        return self.indices(self.rollouts.values())

    def indices(self, uids: Any) -> set[int]:
        """The training tasks among these uids."""
        found = (task_index(uid, self.run, "train") for uid in uids)
        return {index for index in found if index is not None}

    def seen(self) -> tuple[Any, ...]:
        """All of it, to compare with another moment."""
        return (
            set(self.rollouts),
            self.tasks,
            self.quarantined,
            self.plan,
            self.checkpoints,
            self.versions,
            self.live,
        )


def digest_of(history: Trained) -> str:
    """The digest under which the weights after these steps are to be published."""
    return state_digest(describe({"weights": chain(history)}))
