"""Frames of the codec, sound and altered, and what must hold of whatever is decoded from them."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from aspo.codec import (
    HEADER_BYTES,
    MAX_SAMPLES,
    MAX_TOKENS,
    CodecError,
    CodecFault,
    decode_group,
    encode_group,
    encode_task,
)
from aspo.schemas import SCHEMA_VERSION, PolicyVersion, RolloutGroup, Task, VersionSpan
from rollouts import seal

DELETE = object()
OLD, NEW = "demo/1/41", "demo/1/42"


def make_group(**changes: Any) -> RolloutGroup:
    group = RolloutGroup(
        uid="train-000007",
        actor="actor-1",
        purpose="train",
        temperature=1.0,
        prompt_ids=np.array([5, 6, 7], np.int32),
        lengths=np.array([3, 1], np.int32),
        token_ids=np.array([1, 2, 3, 9], np.int32),
        behavior_logprobs=np.array([-0.5, -1.0, 0.0, -2.0], np.float32),
        rewards=np.array([1.0, 0.0], np.float32),
        failed=np.array([False, True]),
        finish_reasons=("stop", "length"),
        spans=((VersionSpan(OLD, 2), VersionSpan(NEW, 1)), (VersionSpan(NEW, 1),)),
    )
    return dataclasses.replace(group, **changes)


def make_task(**changes: Any) -> Task:
    task = Task(
        uid="train-000007",
        index=7,
        purpose="train",
        prompt_ids=[5, 6, 7],
        group_size=8,
        max_tokens=16,
        temperature=1.0,
        reward_inputs={"answer": "42", "tests": [[1, None, 2.5, b"\x00"], {"deep": True}]},
        seed=-3,
        min_version=OLD,
    )
    return msgspec.structs.replace(task, **changes)


def payload_with(frame: bytes, **changes: Any) -> bytes:
    fields = msgspec.msgpack.decode(frame[HEADER_BYTES:]) | changes
    return msgspec.msgpack.encode({name: value for name, value in fields.items() if value is not DELETE})


def group_with(**changes: Any) -> bytes:
    return seal(payload_with(encode_group(make_group()), **changes))


def task_with(**changes: Any) -> bytes:
    return seal(payload_with(encode_task(make_task()), **changes), magic=b"ASPt")


def int32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def comparable(group: RolloutGroup) -> dict[str, Any]:
    fields = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    fields |= fields.pop("reward_parts")
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    return fields | {name: (value.dtype, value.shape, value.tobytes()) for name, value in arrays.items()}


def assert_well_formed(group: RolloutGroup) -> None:
    lengths = group.lengths.tolist()
    assert 1 <= len(lengths) <= MAX_SAMPLES
    assert min(lengths) >= 0
    assert group.token_ids.shape == group.behavior_logprobs.shape == (sum(lengths),)
    assert group.rewards.shape == group.failed.shape == (len(lengths),)
    assert len(group.finish_reasons) == len(group.spans) == len(lengths)
    assert set(group.finish_reasons) <= {"stop", "length"}
    assert set(group.failed.view(np.uint8).tolist()) <= {0, 1}
    assert [sum(span.length for span in spans) for spans in group.spans] == lengths
    assert all(span.length > 0 for spans in group.spans for span in spans)
    assert all(str(PolicyVersion.parse(span.version)) for spans in group.spans for span in spans)
    assert 0 <= group.temperature <= 100
    assert group.turns == () or [sum(turns) for turns in group.turns] == lengths
    assert group.by_model.shape == (sum(lengths),)
    assert group.by_model.sum() == group.model_lengths.sum()
    assert comparable(decode_group(encode_group(group))) == comparable(group)


def assert_task_in_bounds(task: Task) -> None:
    assert task.schema == SCHEMA_VERSION
    assert 1 <= len(task.uid) <= 128
    assert task.index >= 0
    assert task.prompt_ids
    assert all(0 <= token < 2**31 for token in task.prompt_ids)
    assert 1 <= task.group_size <= MAX_SAMPLES
    assert 1 <= task.max_tokens <= MAX_TOKENS
    assert 0 <= task.temperature <= 100


def refusal(decode: Callable[[bytes], Any], data: bytes) -> CodecError:
    with pytest.raises(CodecError) as caught:
        decode(data)
    assert caught.value.code in get_args(CodecFault)
    text = str(caught.value)
    assert text.isprintable()
    assert 0 < len(text) < 1000
    return caught.value


def peak_bytes(decode: Callable[[bytes], Any], data: bytes) -> int:
    """Decode under tracemalloc; anything but a result or a `CodecError` escapes."""
    tracemalloc.start()
    try:
        with suppress(CodecError):
            decode(data)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


GROUP_FRAME = encode_group(make_group())
TASK_FRAME = encode_task(make_task())
