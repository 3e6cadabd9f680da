"""Row 19 of the fault matrix: poison is quarantined with its reason, the weights as if it had not come."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
import torch
from numpy.typing import NDArray

from aspo.codec import HEADER_BYTES, encode_group
from aspo.quarantine import Quarantine, describe
from aspo.queue import RolloutReader, RolloutWriter
from aspo.schemas import PolicyVersion, RolloutGroup, VersionSpan
from aspo_learner.dispatcher import task_uid
from aspo_learner.intake import Intake, Limits
from aspo_learner.ledger import Ledger
from aspo_learner.policy import Policy
from aspo_learner.staleness import StalenessRule
from aspo_learner.trainer import Trainer
from models import save_model
from rollouts import make_group, seal, write_config

STEPS, BATCH, MAX_BYTES = 3, 4, 2**20
Poison = Callable[[RolloutGroup, str], bytes]


def altered(**changes: Callable[[RolloutGroup], Any]) -> Poison:
    """A frame whose encoder lets it pass."""

    def make(group: RolloutGroup, run: str) -> bytes:
        values = {name: change(group) for name, change in changes.items()}
        return encode_group(dataclasses.replace(group, **values))

    return make


def forged(**changes: object) -> Poison:
    """A frame with a digest that fits, whose fields no honest encoder would send."""

    def make(group: RolloutGroup, run: str) -> bytes:
        values = {name: change(group) if callable(change) else change for name, change in changes.items()}
        fields = msgspec.msgpack.decode(encode_group(group)[HEADER_BYTES:]) | values
        return seal(msgspec.msgpack.encode(fields))

    return make


def raw(payload: bytes) -> Poison:
    return lambda group, run: payload


def labelled(version: str) -> Poison:
    def make(group: RolloutGroup, run: str) -> bytes:
        spans = tuple((VersionSpan(version.format(run=run), int(n)),) for n in group.lengths)
        return encode_group(dataclasses.replace(group, spans=spans))

    return make


def first(name: str, value: float) -> Poison:
    """One bad number among good ones."""

    def change(group: RolloutGroup) -> NDArray[Any]:
        array: NDArray[Any] = getattr(group, name).copy()
        array[0] = value
        return array

    return altered(**{name: change})


def emptied(group: RolloutGroup, run: str) -> bytes:
    """Samples without a single token to train on: an empty mask."""
    nothing = {"lengths": np.zeros_like(group.lengths), "token_ids": group.token_ids[:0]}
    return encode_group(
        dataclasses.replace(
            group, **nothing, behavior_logprobs=group.behavior_logprobs[:0], spans=((),) * len(group)
        )
    )


def flipped(group: RolloutGroup, run: str) -> bytes:
    frame = bytearray(encode_group(group))
    frame[-30] ^= 1
    return bytes(frame)


POISON: dict[str, tuple[str, Poison]] = {
    "NaN log-prob": ("nan-logprob", first("behavior_logprobs", np.nan)),
    "infinite log-prob": ("nan-logprob", first("behavior_logprobs", -np.inf)),
    "log-prob above 0": ("positive-logprob", first("behavior_logprobs", 0.5)),
    "NaN reward": ("bad-reward", first("rewards", np.nan)),
    "infinite reward": ("bad-reward", first("rewards", np.inf)),
    "id outside the vocabulary": ("token-out-of-range", first("token_ids", 16)),
    "negative id": ("token-out-of-range", first("prompt_ids", -1)),
    "empty mask": ("empty-completion", emptied),
    "empty prompt": ("empty-prompt", altered(prompt_ids=lambda group: group.prompt_ids[:0])),
    "future version": ("future-version", labelled("{run}/1/99")),
    "future epoch": ("future-version", labelled("{run}/2/0")),
    "unknown run's version": ("foreign-run", labelled("other/1/0")),
    "no version": (
        "undecodable: policy-version",
        forged(spans=lambda group: [[["latest", n]] for n in group.lengths.tolist()]),
    ),
    "fewer log-probs than tokens": ("undecodable: length", forged(behavior_logprobs=b"\0" * 4)),
    "fewer rewards than samples": ("undecodable: length", forged(rewards=b"\0" * 4)),
    "half a token": ("undecodable: length", forged(token_ids=b"\0" * 7)),
    "negative length": ("undecodable: range", forged(lengths=b"\xff" * 16)),
    "unknown field": ("undecodable: schema", forged(code="import os")),
    "deep nesting": ("undecodable: schema", raw(seal(b"\x81\xa1x" + b"\x91" * 100_000))),
    "bad UTF-8": ("undecodable: utf8", raw(seal(b"\x81\xa3uid\xa2\xff\xfe"))),
    "flipped bit": ("undecodable: digest", flipped),
    "noise": ("undecodable: magic", raw(b"\x80\x04c__builtin__\neval\n" * 9)),
    "nothing": ("undecodable: truncated", raw(b"")),
    "100 MB": ("undecodable: too-large", raw(b"\0" * 100_000_000)),
}


class Asked:
    """Has asked for every group of the test."""

    cursor = STEPS * BATCH

    def was_asked(self, group: RolloutGroup, index: int) -> bool:
        return index < self.cursor


@dataclasses.dataclass
class Trained:
    """What a run came to."""

    state: dict[str, torch.Tensor]
    ended: Counter[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), hidden_size=64, layers=2)


def new_intake(client: redis.Redis, run: str) -> Intake:
    limits = Limits(run=run, vocab_size=16, max_tokens=6, max_prompt_tokens=10, max_entry_bytes=MAX_BYTES)
    rule = StalenessRule(max_staleness=2)
    return Intake(RolloutReader(client, run), Ledger(), Asked(), limits, rule, on_eval=lambda group: None)


def poisoned(group: RolloutGroup, run: str) -> Iterator[bytes]:
    """All poison but for the large, in the name of this group."""
    for name, (_, make) in POISON.items():
        if name != "100 MB":
            yield make(group, run)


def train(client: redis.Redis, run: str, model: Path, folder: Path, *, poison: bool) -> Trained:
    """Train on the same groups, with or without a hostile actor that answers each task first and last."""
    torch.manual_seed(0)
    config = write_config(folder, model=model, run=run)
    trainer = Trainer(Policy(config.model, torch.device("cpu")), config)
    intake = new_intake(client, run)
    honest, hostile = RolloutWriter(client, run, "honest"), RolloutWriter(client, run, "hostile")

    def attack(groups: list[RolloutGroup]) -> None:
        for group in groups if poison else []:
            for frame in poisoned(group, run):
                hostile.put(group.uid, frame)
        intake.pump(PolicyVersion(epoch=1, step=step, run=run), 0.01)

    for step in range(STEPS):
        current = PolicyVersion(epoch=1, step=step, run=run)
        groups = [
            make_group(trainer.policy.model, uid=task_uid(run, "train", i), version=str(current), seed=i)
            for i in range(step * BATCH, (step + 1) * BATCH)
        ]
        attack(groups)
        for group in groups * (2 if poison else 1):
            honest.put(group.uid, encode_group(group))
        intake.pump(current, 0.01)
        attack(groups)
        batch = intake.take(BATCH, current)
        assert batch is not None
        trainer.train_step(batch)
        intake.acknowledge()
        attack(groups)
    assert intake.ready == 0
    return Trained(_state(trainer), intake.ended)


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    for number, values in enumerate(trainer.optimizer.state.values()):
        state |= {f"{number}.{name}": value for name, value in values.items()}
    return state


def test_poison_leaves_the_weights_as_they_would_have_been_bit_for_bit(
    client: redis.Redis, run: str, model: Path, tmp_path: Path
) -> None:
    clean = train(client, f"{run}-clean", model, tmp_path / "clean", poison=False)
    attacked = train(client, run, model, tmp_path / "attacked", poison=True)
    assert clean.ended == {}
    assert attacked.ended["duplicate"] == STEPS * BATCH
    assert attacked.ended.total() == STEPS * BATCH * (1 + 3 * (len(POISON) - 1))
    assert attacked.state.keys() == clean.state.keys()
    for name, tensor in attacked.state.items():
        assert torch.equal(tensor, clean.state[name]), name


@pytest.mark.parametrize("name", POISON)
def test_each_poison_is_kept_with_its_reason_and_a_sample(
    client: redis.Redis, run: str, model: Path, name: str
) -> None:
    reason, make = POISON[name]
    policy = Policy(write_config(model, model=model).model, torch.device("cpu")).model
    group = make_group(policy, uid=task_uid(run, "train", 0), version=f"{run}/1/0")
    frame = make(group, run)
    RolloutWriter(client, run, "hostile").put(group.uid, frame)
    intake = new_intake(client, run)
    intake.pump(PolicyVersion(epoch=1, step=0, run=run), 0.01)
    intake.acknowledge()
    assert intake.ready == 0
    quarantine = Quarantine(client, run)
    [entry] = quarantine.entries()
    assert (entry.kind, entry.uid, entry.actor, entry.size) == (reason, group.uid, "hostile", len(frame))
    sample = quarantine.entry(entry.id)[1]
    assert sample == frame if entry.whole else 0 < len(sample) < len(frame) == 100_000_000
    assert describe(sample)["begins_with"] == frame[:16].hex(" ")
    assert client.xlen(f"aspo:{run}:rollouts:hostile") == 0
