"""Rollouts in: decode, validate, dedupe, admit; what ends is acknowledged only by a checkpoint."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import redis

from aspo.codec import CodecError, decode_group, validate_group
from aspo.config import Config
from aspo.queue import Delivery, RolloutReader
from aspo.schemas import IntArray, PolicyVersion, RolloutGroup
from aspo_learner.dispatcher import task_index
from aspo_learner.groups import teaches
from aspo_learner.ledger import Ledger
from aspo_learner.staleness import StalenessRule

log = logging.getLogger(__name__)
_READ_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rollout group must keep to; sizes in tokens, entries in bytes; `stamp` is the hello's."""

    run: str
    vocab_size: int
    max_tokens: int
    max_prompt_tokens: int
    max_entry_bytes: int
    stamp: str = ""
    max_environment_tokens: int = 0

    @classmethod
    def of(cls, config: Config, vocab_size: int, max_prompt_tokens: int, stamp: str) -> Limits:
        """A run's, given its model's vocabulary, the room for prompts and the stamp of its hello."""
        return cls(
            run=config.run.name,
            vocab_size=vocab_size,
            max_tokens=config.sampling.max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            max_entry_bytes=config.redis.max_entry_mib * 2**20,
            stamp=stamp,
            max_environment_tokens=config.environment.room,
        )


class Asker(Protocol):
    """Who knows what was asked: the dispatcher."""

    cursor: int

    def was_asked(self, group: RolloutGroup, index: int) -> bool: ...


class Intake:
    """Turns deliveries into batches of fresh, valid, unseen rollout groups.

    `on_eval` gets the groups of evaluation tasks, `on_set_aside` actor, uid and reason of the unusable;
    `ended` counts, by reason, the groups not trained on. Of a task's answers the first counts, unless
    `chosen` names the entry of another; `taken` names those of the batch given last. With `refill`, groups
    that teach nothing are dropped for others, up to so many batches of them for one. `altered` is set when a
    rollout no longer matched its digest, whose task is to be asked again: once, for a second such answer ends
    it as any unusable one does.
    """

    def __init__(
        self,
        reader: RolloutReader,
        ledger: Ledger,
        asker: Asker,
        limits: Limits,
        staleness: StalenessRule,
        *,
        on_eval: Callable[[RolloutGroup], None],
        on_lost_eval: Callable[[str], None] = lambda uid: None,
        on_set_aside: Callable[[str, str, str], None] = lambda actor, uid, reason: None,
        refill: int = 0,
    ) -> None:
        self._reader, self._ledger, self._asker, self.limits = reader, ledger, asker, limits
        self.staleness = staleness
        self._on_eval, self._on_lost_eval = on_eval, on_lost_eval
        self._on_set_aside = on_set_aside
        self._seen: set[tuple[bytes, bytes]] = set()
        self._ready: deque[tuple[int, RolloutGroup]] = deque()
        self._held: set[int] = set()
        self._deliveries: dict[int, Delivery] = {}
        self._done: list[Delivery] = []
        self.chosen: Mapping[int, str] = {}
        self.taken: dict[int, str] = {}
        self.ended: Counter[str] = Counter()
        self._dropped: list[IntArray] = []
        self._refill, self._refilled = refill, list[RolloutGroup]()
        self._altered: set[int] = set()
        self.altered = False

    @property
    def held(self) -> set[int]:
        """Indices of the tasks whose groups wait in memory."""
        return self._held

    @property
    def ready(self) -> int:
        """Groups waiting in memory."""
        return len(self._ready)

    def pump(self, current: PolicyVersion, wait_s: float) -> int:
        """Read what has arrived, waiting up to `wait_s` seconds; returns how many rollouts came."""
        # An idle Redis looks at its blocked clients ten times a second: the shortest wait takes 100 ms.
        block_ms = int(wait_s * 1000) or None
        deliveries = self._reader.read(count=_READ_AT_ONCE, block_ms=block_ms)
        if not deliveries and not self._reader.streams:
            time.sleep(min(wait_s, 0.05))
        fresh = [d for d in deliveries if (d.stream, d.entry_id) not in self._seen]
        try:
            for delivery in fresh:
                self._receive(delivery, current)
                self._seen.add((delivery.stream, delivery.entry_id))
        except redis.RedisError:
            self._reader.replay()  # Redis could not keep one that is unusable: the rest comes again
            raise
        return len(fresh)

    def reread(self, current: PolicyVersion) -> None:
        """Read again what is unacknowledged, in case a reply of Redis was lost; what is known is skipped."""
        self._reader.replay()
        for _ in range(len(self._seen) // _READ_AT_ONCE + 2):
            self.pump(current, 0.0)

    def take(self, count: int, current: PolicyVersion) -> list[RolloutGroup] | None:
        """Give `count` groups that the staleness rule admits, oldest first; None while there are too few."""
        self._drop_stale(current)
        self._ready = deque(sorted(self._ready, key=lambda item: item[0]))
        self._drop_uninformative(self._refill * count)
        if len(self._ready) < count:
            return None
        items = [self._ready.popleft() for _ in range(count)]
        return self._give(items)

    def take_planned(self, indices: Sequence[int]) -> list[RolloutGroup] | None:
        """Give the groups of just these tasks, in this order, however stale; None while one is missing."""
        if not self._held.issuperset(indices):
            return None
        planned, groups = set(indices), dict(self._ready)
        self._ready = deque(item for item in self._ready if item[0] not in planned)
        return self._give([(index, groups[index]) for index in indices])

    def dropped_lengths(self) -> list[IntArray]:
        """The [G] model_lengths of each group dropped for staleness since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def refilled(self) -> list[RolloutGroup]:
        """The groups dropped as uninformative since the last call."""
        refilled, self._refilled = self._refilled, []
        return refilled

    def acknowledge(self) -> None:
        """Give up everything that has ended; call it once a durable checkpoint holds the ledger."""
        self._reader.acknowledge(self._done)
        self._seen -= {(delivery.stream, delivery.entry_id) for delivery in self._done}
        self._done = []

    def forget_deliveries(self) -> None:
        """Keep the groups in memory, but acknowledge nothing that came before: Redis has lost it."""
        self._reader.forget_all()
        self._seen, self._done, self._deliveries = set(), [], {}

    def _receive(self, delivery: Delivery, current: PolicyVersion) -> None:
        group: RolloutGroup | None = None
        reason: str | None
        altered = False
        try:
            group = decode_group(delivery.payload, max_bytes=self.limits.max_entry_bytes)
            reason = validate_group(
                group,
                vocab_size=self.limits.vocab_size,
                max_tokens=self.limits.max_tokens,
                max_prompt_tokens=self.limits.max_prompt_tokens,
                current=current,
                max_environment_tokens=self.limits.max_environment_tokens,
            )
        except CodecError as error:
            reason, altered = f"undecodable: {error.code}: {error}", error.code == "digest"
        if reason is None and delivery.stamp not in ("", self.limits.stamp):
            reason = "other-rewards: of an actor with another reward function or tokenizer than the learner's"
        if group is None or reason is not None:
            self._set_aside(delivery, str(reason), altered=altered)
        elif group.purpose == "eval":
            self._on_eval(group)
            self._done.append(delivery)
        else:
            self._admit(delivery, group)

    def _admit(self, delivery: Delivery, group: RolloutGroup) -> None:
        index = task_index(group.uid, self.limits.run, "train")
        if index is None:
            self._set_aside(delivery, "foreign-uid")
        elif not self._asker.was_asked(group, index):
            self._set_aside(delivery, "not-as-asked")
        elif index in self._held and index not in self._deliveries:
            self._deliveries[index] = delivery  # what Redis had lost is stored again
        elif self._is_duplicate(index, delivery):
            self._count_duplicate(delivery)
        else:
            self._hold(index, delivery, group)

    def _is_duplicate(self, index: int, delivery: Delivery) -> bool:
        if index in self._held:
            return self.chosen.get(index) != _entry_name(delivery)
        return index in self._ledger and not self._ledger.reopen(index)

    def _hold(self, index: int, delivery: Delivery, group: RolloutGroup) -> None:
        if index in self._held:
            self._count_duplicate(self._deliveries[index])
            self._ready = deque(item for item in self._ready if item[0] != index)
        self._held.add(index)
        self._deliveries[index] = delivery
        self._ready.append((index, group))

    def _count_duplicate(self, delivery: Delivery) -> None:
        self.ended["duplicate"] += 1
        self._done.append(delivery)

    def _give(self, items: Sequence[tuple[int, RolloutGroup]]) -> list[RolloutGroup]:
        self.taken = {index: _entry_name(self._deliveries.get(index)) for index, _ in items}
        for index, _ in items:
            self._end(index)
        return [group for _, group in items]

    def _drop_stale(self, current: PolicyVersion) -> None:
        fresh: deque[tuple[int, RolloutGroup]] = deque()
        for index, group in self._ready:
            if self.staleness.admits(group, current):
                fresh.append((index, group))
            else:
                self.ended["stale"] += 1
                self._dropped.append(group.model_lengths)
                self._end(index)
        self._ready = fresh

    def _drop_uninformative(self, most: int) -> None:
        """Make room for groups that teach something; no more of them than `most` for one batch."""
        kept: deque[tuple[int, RolloutGroup]] = deque()
        for index, group in self._ready:
            if len(self._refilled) < most and not teaches(group):
                self.ended["uninformative"] += 1
                self._refilled.append(group)
                self._end(index)
            else:
                kept.append((index, group))
        self._ready = kept

    def _end(self, index: int) -> None:
        self._ledger.add(index)
        self._held.discard(index)
        if index in self._deliveries:
            self._done.append(self._deliveries.pop(index))

    def _set_aside(self, delivery: Delivery, reason: str, *, altered: bool = False) -> None:
        code = reason.partition(":")[0]
        log.warning("quarantined a rollout from %s: %s", delivery.stream.decode(errors="replace"), reason)
        self._reader.quarantine(delivery, reason, max_bytes=self.limits.max_entry_bytes)
        self.ended[code] += 1
        self._on_set_aside(delivery.actor, delivery.uid, reason)
        self._done.append(delivery)
        index = task_index(delivery.uid, self.limits.run, "train")
        if index is not None and index not in self._held and index < self._asker.cursor:
            if altered and index not in self._altered and index not in self._ledger:
                self._altered.add(index)
                self.altered = True
            else:
                self._ledger.set_aside(index)
        self._on_lost_eval(delivery.uid)


def _entry_name(delivery: Delivery | None) -> str:
    """What the plan calls an entry; nothing for one that Redis has lost."""
    return f"{delivery.actor}/{delivery.entry_id.decode()}" if delivery else ""
