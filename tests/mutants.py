"""Parts that each break one rule of the protocol, as a plausible change to the real ones would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from redis.client import Pipeline

from aspo.fence import Fence
from aspo.queue import Delivery, RolloutReader, RolloutWriter
from aspo.schemas import RolloutGroup
from aspo_learner.intake import Intake
from aspo_learner.journal import Journal
from aspo_learner.ledger import Ledger
from protocol import Parts, ToyFence, ToyLearner


def stay(fence: Fence) -> None:
    """Have every learner write to the same folder."""
    fence.folder = fence.folder / "state-0"
    fence.folder.mkdir(exist_ok=True)


class Unfenced(ToyFence):
    """Nothing is checked."""

    def execute(self, queue: Callable[[Pipeline], Any], **options: Any) -> list[Any]:
        with self._client.pipeline(transaction=True) as pipeline:
            queue(pipeline)
            return list(pipeline.execute(options.get("raise_on_error", True)))

    def _take_folder(self) -> None:
        stay(self)


class ChecksRedisThenActs(ToyFence):
    """Asks Redis for the epoch, and then acts without WATCH."""

    def execute(self, queue: Callable[[Pipeline], Any], **options: Any) -> list[Any]:
        self._refuse_below(int(self._client.get(self._epoch_key) or 0))
        self.on_gap()
        with self._client.pipeline(transaction=True) as pipeline:
            queue(pipeline)
            return list(pipeline.execute(options.get("raise_on_error", True)))


class StaysInPlace(ToyFence):
    """Does not move the folder."""

    def _take_folder(self) -> None:
        stay(self)


class ChecksThenWrites(ToyLearner):
    """Asks Redis for the epoch before it writes, and then writes in a folder that stays where it is."""

    def checkpoint(self) -> None:
        self.fence.execute(lambda pipeline: pipeline.ping())
        super().checkpoint()


class AcknowledgesFirst(ToyLearner):
    """Acknowledges before the checkpoint is durable."""

    def make_durable(self) -> Iterator[str]:
        self.intake.acknowledge()
        yield "acknowledged"
        self.checkpoint()
        yield "checkpointed"


class AcknowledgesAtOnce(ToyLearner):
    """Acknowledges what it takes, as a plain consumer does."""

    def step_once(self) -> Iterator[str]:
        for action in super().step_once():
            if action == "read":
                self.intake.acknowledge()
            yield action


class PublishesFirst(ToyLearner):
    """Publishes a step before it has trained it."""

    def step_once(self) -> Iterator[str]:
        groups = yield from self.read()
        self.planner.write(self.step + 1, groups)
        self.step += 1
        yield from self.publish()
        self.step -= 1
        self.train(groups)
        yield "trained"


class Forgetful(Ledger):
    """Does not outlive its learner."""

    @classmethod
    def load(cls, state: dict[str, Any]) -> Ledger:
        return cls()


class Trims(RolloutWriter):
    """Keeps its stream short, as MAXLEN does."""

    def _store(self, uid: str, payload: bytes) -> bool:
        stored = super()._store(uid, payload)
        self._redis.xtrim(self._stream, maxlen=2, approximate=False)
        return stored


class Unwritten(Journal):
    """Plans nothing."""

    def write(self, step: int, tasks: Sequence[int], entries: Sequence[str] = ()) -> None:
        pass


class Unnamed(Journal):
    """Notes which tasks were trained, and not which of their answers."""

    def write(self, step: int, tasks: Sequence[int], entries: Sequence[str] = ()) -> None:
        super().write(step, tasks)


class BeginsAnew(Journal):
    """Takes no heed of the former learner's plan."""

    def __init__(self, path: Path, **options: Any) -> None:
        path.unlink(missing_ok=True)
        super().__init__(path, **options)


class ThrowsAway(RolloutReader):
    """Keeps no copy of what cannot be used."""

    def quarantine(self, delivery: Delivery, reason: str, *, max_bytes: int) -> None:
        pass


class TakesTwice(Intake):
    """Takes an answer for new whatever has been trained."""

    def _admit(self, delivery: Delivery, group: RolloutGroup) -> None:
        self._ledger = Ledger()
        super()._admit(delivery, group)


MUTANTS = {
    "no fence": (Parts(fence=Unfenced), "I8"),
    "check, then act in Redis": (Parts(fence=ChecksRedisThenActs), "I8"),
    "check, then act in the folder": (Parts(fence=StaysInPlace, learner=ChecksThenWrites), "I8"),
    "acknowledge before the checkpoint": (Parts(learner=AcknowledgesFirst), "I2"),
    "acknowledge before training": (Parts(learner=AcknowledgesAtOnce), "I2"),
    "publish before training": (Parts(learner=PublishesFirst), "I3"),
    "no ledger": (Parts(ledger=Forgetful), "I1"),
    "trim the rollouts": (Parts(writer=Trims), "I[26]"),
    "no journal": (Parts(journal=Unwritten), "I7"),
    "a plan for each learner": (Parts(journal=BeginsAnew), "I7"),
    "no quarantine": (Parts(reader=ThrowsAway), "I6"),
    "no deduplication": (Parts(intake=TakesTwice), "I1"),
}
