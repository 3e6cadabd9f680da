import dataclasses
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspo.codec import (
    HEADER_BYTES,
    MAX_GROUP_BYTES,
    MAX_SAMPLES,
    MAX_SPANS,
    MAX_TASK_BYTES,
    MAX_TOKENS,
    MAX_TURNS,
    CodecError,
    CodecFault,
    Poison,
    decode_group,
    decode_task,
    encode_group,
    encode_task,
    validate_group,
)
from aspo.schemas import SCHEMA_VERSION, PolicyVersion, RolloutGroup, Task, VersionSpan
from rollouts import seal

FUZZ = settings(max_examples=100, database=None, deadline=None, suppress_health_check=list(HealthCheck))
DELETE = object()
OLD, NEW = "demo/1/41", "demo/1/42"
BEFORE_TURNS = "6fac9c4e98a835a94c88b88b4b8006c8"  # digest of `make_group()` as it was written before


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


def check_hostile_group(data: bytes) -> None:
    with suppress(CodecError):
        assert_well_formed(decode_group(data))
    assert peak_bytes(decode_group, data) < 64 * len(data) + 100_000


def check_hostile_task(data: bytes) -> None:
    with suppress(CodecError):
        assert_task_in_bounds(decode_task(data))
    assert peak_bytes(decode_task, data) < 256 * len(data) + 100_000


# Strategies

names = st.text(min_size=1, max_size=128)
versions = st.builds(
    "{}/{}/{}".format, st.sampled_from(["demo", "r-2"]), st.integers(0, 9), st.integers(0, 99)
)
spans_of_a_sample = st.lists(st.builds(VersionSpan, versions, st.integers(1, 9)), max_size=4).map(tuple)


@st.composite
def groups(draw: st.DrawFn) -> RolloutGroup:
    spans = tuple(draw(st.lists(spans_of_a_sample, min_size=1, max_size=5)))
    lengths = [sum(span.length for span in sample) for sample in spans]

    def array(count: int, dtype: Any) -> Any:
        size = count * np.dtype(dtype).itemsize
        return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype)

    return RolloutGroup(
        uid=draw(names),
        actor=draw(names),
        purpose=draw(st.sampled_from(["train", "eval"])),
        temperature=draw(st.floats(0, 100)),
        prompt_ids=array(draw(st.integers(0, 9)), np.int32),
        lengths=np.array(lengths, np.int32),
        token_ids=array(sum(lengths), np.int32),
        behavior_logprobs=array(sum(lengths), np.float32),
        rewards=array(len(spans), np.float32),
        failed=np.array(draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))),
        finish_reasons=tuple(draw(st.sampled_from(["stop", "length"])) for _ in spans),
        spans=spans,
        reward_parts={name: array(len(spans), np.float32) for name in draw(st.sets(names, max_size=2))},
        turns=tuple(draw(turns_of(length)) for length in lengths)
        if min(lengths) and draw(st.booleans())
        else (),
    )


@st.composite
def turns_of(draw: st.DrawFn, length: int) -> tuple[int, ...]:
    """A sample's tokens in an odd number of runs."""
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else set()
    edges = sorted(cuts)[: len(cuts) // 2 * 2]
    return tuple(np.diff([0, *edges, length]).tolist())


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
tasks = st.builds(
    Task,
    uid=names,
    index=st.integers(0, 2**63 - 1),
    purpose=st.sampled_from(["train", "eval"]),
    prompt_ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9),
    group_size=st.integers(1, 1024),
    max_tokens=st.integers(1, 4096),
    temperature=st.floats(0, 100),
    reward_inputs=st.dictionaries(st.text(max_size=9), json_like, max_size=4),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    min_version=st.none() | versions,
)


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    data = bytearray(original)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "truncate", "repeat"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at] = draw(
                st.sampled_from(b"\x00\x01\x7f\x80\x90\xa0\xc0\xc4\xc6\xc9\xcb\xcf\xdb\xdd\xdf\xff")
            )
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 8))]
        elif kind == "truncate":
            del data[at:]
        else:
            data[at:at] = data[at : at + 16]
    return bytes(data)


GROUP_FRAME = encode_group(make_group())
TASK_FRAME = encode_task(make_task())
odd_values = st.sampled_from([None, True, -1, 2**63, float("nan"), "", b"\x00\x01", [], [1], {}, {"x": 1}])
buffers = st.lists(st.integers(-1, 4), min_size=1, max_size=4).map(lambda values: int32(*values))
flags = st.binary(min_size=1, max_size=3) | st.lists(st.integers(0, 2), min_size=2, max_size=2).map(bytes)
wire_spans = st.lists(st.lists(st.tuples(versions, st.integers(0, 4)), max_size=2), max_size=3)
wire_groups = st.fixed_dictionaries(
    {},
    optional={
        "lengths": buffers,
        "spans": wire_spans,
        "token_ids": buffers,
        "behavior_logprobs": buffers,
        "rewards": buffers,
        "failed": flags,
        "finish_reasons": st.lists(st.sampled_from(["stop", "length"]), max_size=3),
        "reward_parts": st.dictionaries(st.text(max_size=3), buffers, max_size=2),
        "turns": st.lists(st.lists(st.integers(-1, 4), max_size=3), max_size=3),
    },
)
odd_groups = st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(RolloutGroup)]), odd_values, min_size=1
)


# Round trips


def test_a_group_without_parts_or_turns_is_what_older_readers_take() -> None:
    assert blake3(GROUP_FRAME).hexdigest(16) == BEFORE_TURNS
    wire = msgspec.msgpack.decode(GROUP_FRAME[HEADER_BYTES:])
    assert not {"reward_parts", "turns"} & wire.keys()
    parts = {"right": np.array([1, 0], np.float32), "format": np.array([0.5, -0.5], np.float32)}
    back = decode_group(encode_group(make_group(reward_parts=parts)))
    assert {name: values.tolist() for name, values in back.reward_parts.items()} == {
        "right": [1, 0],
        "format": [0.5, -0.5],
    }


@given(groups())
@FUZZ
def test_a_group_comes_off_the_wire_as_it_went_on(group: RolloutGroup) -> None:
    data = encode_group(group)
    decoded = decode_group(data)
    assert comparable(decoded) == comparable(group)
    assert comparable(decode_group(memoryview(data))) == comparable(group)
    assert encode_group(decoded) == data


@given(tasks)
@FUZZ
def test_a_task_comes_off_the_wire_as_it_went_on(task: Task) -> None:
    data = encode_task(task)
    assert decode_task(data) == decode_task(memoryview(data)) == task


def test_big_endian_and_strided_arrays_are_sent_by_value() -> None:
    group = make_group(
        token_ids=np.array([1, 0, 2, 0, 3, 0, 9, 0], np.int32)[::2],
        rewards=np.array([1.0, 0.0], ">f4"),
    )
    assert encode_group(group) == encode_group(make_group())


def test_decoded_arrays_are_read_only_aligned_and_independent_of_the_message() -> None:
    data = bytearray(encode_group(make_group()))
    group = decode_group(memoryview(data))
    data[:] = bytes(len(data))
    assert comparable(group) == comparable(make_group())
    for array in (group.prompt_ids, group.lengths, group.token_ids, group.behavior_logprobs, group.rewards):
        assert array.flags.aligned
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_a_group_takes_little_more_than_eight_bytes_per_token() -> None:
    tokens = 8 * 1024
    group = make_group(
        lengths=np.full(8, 1024, np.int32),
        token_ids=np.arange(tokens, dtype=np.int32),
        behavior_logprobs=np.full(tokens, -1, np.float32),
        rewards=np.zeros(8, np.float32),
        failed=np.zeros(8, np.bool_),
        finish_reasons=("stop",) * 8,
        spans=((VersionSpan(OLD, 24), VersionSpan(NEW, 1000)),) * 8,
    )
    data = encode_group(group)
    assert len(data) / tokens <= 8.2
    assert peak_bytes(decode_group, data) < 1.5 * len(data)


# The frame


def test_the_frame_is_pinned() -> None:
    assert seal(GROUP_FRAME[HEADER_BYTES:]) == GROUP_FRAME
    assert seal(TASK_FRAME[HEADER_BYTES:], magic=b"ASPt") == TASK_FRAME


def test_every_cut_and_every_flipped_bit_is_noticed() -> None:
    for size in range(len(GROUP_FRAME)):
        assert refusal(decode_group, GROUP_FRAME[:size]).code == "truncated"
    for bit in range(8 * len(GROUP_FRAME)):
        data = bytearray(GROUP_FRAME)
        data[bit // 8] ^= 1 << bit % 8
        expected = ("magic", "schema-version", "length", "truncated", "digest")
        assert refusal(decode_group, bytes(data)).code in expected
        assert bit < 8 * 16 or refusal(decode_group, bytes(data)).code == "digest"


@pytest.mark.parametrize("decode", [decode_group, decode_task])
def test_another_schema_version_is_named_with_ours(decode: Callable[[bytes], Any]) -> None:
    magic = b"ASPg" if decode is decode_group else b"ASPt"
    for version in (0, SCHEMA_VERSION + 1, 2**32 - 1):
        error = refusal(decode, seal(b"whatever a later schema says", magic, version))
        assert error.code == "schema-version"
        assert f"version {version}," in str(error)
        assert f"reads {SCHEMA_VERSION};" in str(error)


def test_a_task_that_contradicts_its_header_is_refused() -> None:
    assert refusal(decode_task, task_with(schema=SCHEMA_VERSION + 1)).code == "schema-version"


def test_a_frame_of_another_kind_is_refused() -> None:
    assert refusal(decode_group, TASK_FRAME).code == "magic"
    assert refusal(decode_task, GROUP_FRAME).code == "magic"
    assert refusal(decode_group, b"\x80\x04\x95" + bytes(100)).code == "magic"


def test_bytes_after_the_frame_are_refused() -> None:
    assert refusal(decode_group, GROUP_FRAME + b"\x00").code == "length"
    assert refusal(decode_group, seal(GROUP_FRAME[HEADER_BYTES:] + b"\x00")).code == "schema"


def test_the_size_limit_is_inclusive_and_comes_first() -> None:
    size = len(GROUP_FRAME)
    assert decode_group(GROUP_FRAME, max_bytes=size).uid == "train-000007"
    assert refusal(lambda data: decode_group(data, max_bytes=size - 1), GROUP_FRAME).code == "too-large"
    assert decode_task(TASK_FRAME, max_bytes=len(TASK_FRAME)).index == 7
    assert (
        refusal(lambda data: decode_task(data, max_bytes=size - 1), TASK_FRAME + bytes(size)).code
        == "too-large"
    )
    for decode, limit in ((decode_group, MAX_GROUP_BYTES), (decode_task, MAX_TASK_BYTES)):
        garbage = bytes(limit + 1)
        assert refusal(decode, garbage).code == "too-large"
        assert peak_bytes(decode, garbage) < 10_000


# What a payload may hold, with a digest that holds


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("schema", {"uid": ""}),
        ("schema", {"uid": "u" * 129}),
        ("schema", {"uid": DELETE}),
        ("schema", {"uid": 3}),
        ("schema", {"unheard_of": 3}),
        ("schema", {"x" * 5000: 3}),
        ("schema", {"\n\x1b[31m": 3}),
        ("schema", {"actor": "a" * 129}),
        ("schema", {"purpose": "test"}),
        ("schema", {"temperature": -0.1}),
        ("schema", {"temperature": float("nan")}),
        ("schema", {"temperature": float("inf")}),
        ("schema", {"temperature": 101.0}),
        ("schema", {"token_ids": [1, 2, 3, 9]}),
        ("schema", {"finish_reasons": ["stop", "abort"]}),
        ("schema", {"spans": [[[NEW, 3]], [[NEW, 1.5]]]}),
        ("schema", {"spans": [[[NEW, 3]], [[NEW]]]}),
        ("schema", {"reward_parts": []}),
        ("schema", {"reward_parts": {"": bytes(8)}}),
        ("schema", {"reward_parts": {str(i): bytes(8) for i in range(65)}}),
        ("length", {"reward_parts": {"format": bytes(4)}}),
        ("length", {"reward_parts": {"format": bytes(8), "right": bytes(12)}}),
        ("length", {"reward_parts": {"format": bytes(7)}}),
        ("schema", {"turns": [3, 1]}),
        ("schema", {"turns": [[3], [0.5]]}),
        ("schema", {"turns": [[3], [1] * (2 * MAX_TURNS)]}),
        ("length", {"turns": [[3]]}),
        ("length", {"turns": [[3], [1], [1]]}),
        ("length", {"turns": [[1, 1, 2], [1]]}),
        ("range", {"turns": [[3], []]}),
        ("range", {"turns": [[1, 2], [1]]}),
        ("range", {"turns": [[3, 0, 0], [1]]}),
        ("range", {"turns": [[3, 2**63, -(2**63)], [1]]}),
        ("length", {"prompt_ids": b"\x00" * 5}),
        ("length", {"lengths": int32(3, 1)[:-1]}),
        ("length", {"token_ids": int32(1, 2, 3)}),
        ("length", {"token_ids": int32(1, 2, 3, 4, 5)}),
        ("length", {"token_ids": int32(1, 2, 3, 4)[:-1]}),
        ("length", {"behavior_logprobs": bytes(12)}),
        ("length", {"behavior_logprobs": bytes(20)}),
        ("length", {"rewards": bytes(4)}),
        ("length", {"rewards": bytes(12)}),
        ("length", {"rewards": bytes(7)}),
        ("length", {"failed": b"\x00"}),
        ("length", {"failed": b"\x00\x00\x00"}),
        ("range", {"failed": b"\x00\x02"}),
        ("length", {"finish_reasons": ["stop"]}),
        ("length", {"finish_reasons": ["stop"] * 3}),
        ("length", {"spans": [[[NEW, 3]]]}),
        ("length", {"spans": [[[NEW, 3]], [[NEW, 1]], []]}),
        ("length", {"spans": [[[NEW, 3]], [[NEW, 2]]]}),
        ("length", {"spans": [[[NEW, 3]], []]}),
        ("length", {"spans": [[[NEW, 1]], [[NEW, 3]]]}),
        ("range", {"spans": [[[NEW, 3], [NEW, 0]], [[NEW, 1]]]}),
        ("range", {"spans": [[[NEW, 4], [NEW, -1]], [[NEW, 1]]]}),
        ("policy-version", {"spans": [[["demo/1", 3]], [[NEW, 1]]]}),
        ("policy-version", {"spans": [[["\x1b[31m" * 99, 3]], [[NEW, 1]]]}),
        ("range", {"lengths": int32(5, -1)}),
    ],
)
def test_a_malformed_group_is_refused(code: str, changes: dict[str, Any]) -> None:
    assert decode_group(group_with())
    assert refusal(decode_group, group_with(**changes)).code == code


def test_an_empty_group_is_refused() -> None:
    empty = dict.fromkeys(("lengths", "token_ids", "behavior_logprobs", "rewards", "failed"), b"")
    assert refusal(decode_group, group_with(**empty, finish_reasons=[], spans=[])).code == "range"


def test_lengths_whose_sum_wraps_round_in_32_bits_are_refused() -> None:
    lengths = (2**31 - 1, 2**31 - 1, 6)
    changes = {
        "lengths": int32(*lengths),
        "rewards": bytes(12),
        "failed": bytes(3),
        "finish_reasons": ["stop"] * 3,
        "spans": [[[NEW, length]] for length in lengths],
    }
    assert refusal(decode_group, group_with(**changes)).code == "length"


def many_samples(samples: int, spans: int) -> bytes:
    return group_with(
        lengths=int32(*[spans] * samples),
        token_ids=bytes(4 * spans * samples),
        behavior_logprobs=bytes(4 * spans * samples),
        rewards=bytes(4 * samples),
        failed=bytes(samples),
        finish_reasons=["stop"] * samples,
        spans=[[[NEW, 1]] * spans] * samples,
    )


def test_counts_are_bounded() -> None:
    assert len(decode_group(many_samples(MAX_SAMPLES, 1))) == MAX_SAMPLES
    assert len(decode_group(many_samples(1, MAX_SPANS)).spans[0]) == MAX_SPANS
    assert refusal(decode_group, many_samples(MAX_SAMPLES + 1, 1)).code == "schema"
    assert refusal(decode_group, many_samples(1, MAX_SPANS + 1)).code == "schema"
    for field, value in (
        ("lengths", bytes(4 * MAX_SAMPLES + 4)),
        ("rewards", bytes(4 * MAX_SAMPLES + 4)),
        ("failed", bytes(MAX_SAMPLES + 1)),
        ("finish_reasons", ["stop"] * (MAX_SAMPLES + 1)),
        ("spans", [[]] * (MAX_SAMPLES + 1)),
    ):
        assert refusal(decode_group, group_with(**{field: value})).code == "schema"
    for field in ("prompt_ids", "token_ids", "behavior_logprobs"):
        data = group_with(**{field: bytes(4 * MAX_TOKENS + 4)})
        assert "length" in str(refusal(decode_group, data))
        assert peak_bytes(decode_group, data) < 100_000


def test_the_largest_group_is_within_the_memory_bound() -> None:
    data = many_samples(MAX_SAMPLES, MAX_SPANS)
    assert peak_bytes(decode_group, data) < 16 * len(data)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("range", {"uid": ""}),
        ("range", {"uid": "u" * 129}),
        ("range", {"index": -1}),
        ("range", {"prompt_ids": []}),
        ("range", {"prompt_ids": [1, -1]}),
        ("range", {"prompt_ids": [1, 2**31]}),
        ("range", {"group_size": 0}),
        ("range", {"group_size": 1025}),
        ("range", {"max_tokens": 0}),
        ("range", {"max_tokens": MAX_TOKENS}),
        ("range", {"temperature": -0.5}),
        ("range", {"temperature": float("nan")}),
        ("range", {"temperature": float("inf")}),
        ("range", {"seed": 2**63}),
        ("policy-version", {"min_version": "latest"}),
        ("schema", {"purpose": "test"}),
        ("schema", {"prompt_ids": [1.5]}),
        ("schema", {"prompt_ids": DELETE}),
        ("schema", {"reward_inputs": [1]}),
        ("schema", {"reward_inputs": {1: 2}}),
        ("schema", {"type": "other"}),
        ("schema", {"unheard_of": 1}),
    ],
)
def test_a_malformed_task_is_refused(code: str, changes: dict[str, Any]) -> None:
    assert decode_task(task_with())
    assert refusal(decode_task, task_with(**changes)).code == code


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("schema", {"token_ids": np.array([1, 2, 3, 9], np.int64)}),
        ("schema", {"token_ids": np.array([1, 2, 3, 9], np.uint32)}),
        ("schema", {"token_ids": np.array([[1, 2], [3, 9]], np.int32)}),
        ("schema", {"rewards": np.array([1.0, 0.0])}),
        ("schema", {"failed": np.array([0, 1], np.uint8)}),
        ("schema", {"spans": ((VersionSpan(NEW, np.int32(3)),), (VersionSpan(NEW, 1),))}),
        ("schema-version", {"schema": SCHEMA_VERSION + 1}),
        ("length", {"rewards": np.zeros(3, np.float32)}),
        ("utf8", {"uid": "\ud800"}),
        ("policy-version", {"spans": ((VersionSpan("v1", 3),), (VersionSpan(NEW, 1),))}),
    ],
)
def test_the_encoder_refuses_what_the_decoder_would(code: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CodecError) as caught:
        encode_group(make_group(**changes))
    assert caught.value.code == code


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("schema", {"reward_inputs": {"x": object()}}),
        ("schema", {"reward_inputs": {"x": 2**64}}),
        ("schema", {"reward_inputs": {1: "x"}}),
        ("utf8", {"reward_inputs": {"x": "\ud800"}}),
        ("nesting", {"reward_inputs": {"x": endless()}}),
        ("too-large", {"reward_inputs": {"x": "y" * MAX_TASK_BYTES}}),
        ("range", {"group_size": 0}),
        ("schema-version", {"schema": 0}),
    ],
)
def test_a_task_that_cannot_be_sent_is_refused(code: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CodecError) as caught:
        encode_task(make_task(**changes))
    assert caught.value.code == code


# Declared sizes, depth and text

HUGE = struct.pack(">I", 2**32 - 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uid", b"\xdb" + HUGE),
        ("token_ids", b"\xc6" + HUGE),
        ("token_ids", b"\xc6" + struct.pack(">I", 4 * MAX_TOKENS)),
        ("finish_reasons", b"\xdd" + HUGE),
        ("finish_reasons", b"\xdd" + struct.pack(">I", MAX_SAMPLES)),
        ("spans", b"\xdd" + HUGE),
        ("spans", b"\x91\xdd" + HUGE),
        ("spans", b"\xdf" + HUGE),
        ("unheard_of", b"\xdd" + HUGE),
        ("unheard_of", b"\xc9" + HUGE + b"\x01"),
    ],
)
def test_declared_sizes_allocate_nothing(field: str, value: bytes) -> None:
    data = group_with(**{field: msgspec.Raw(value)})
    assert refusal(decode_group, data).code == "schema"
    assert peak_bytes(decode_group, data) < 30_000


def test_a_header_that_declares_exabytes_allocates_nothing() -> None:
    data = seal(b"\x80", size=2**63)
    assert refusal(decode_group, data).code == "truncated"
    assert peak_bytes(decode_group, data) < 10_000


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf"])
def test_nested_lists_that_each_claim_the_rest_stay_small(head: bytes) -> None:
    size = 100_000
    nested = (
        head + struct.pack(">I", size // 2) + (b"\x01" if head == b"\xdf" else b"")
    ) * 400 + b"\x01" * size
    data = task_with(reward_inputs={"x": msgspec.Raw(nested)})
    assert refusal(decode_task, data).code == "schema"
    assert peak_bytes(decode_task, data) < 64 * len(data)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x01", b"\xdc\x00\x01"])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    deep = msgspec.Raw(opening * 200_000 + b"\xc0")
    assert refusal(decode_task, task_with(reward_inputs={"x": deep})).code == "nesting"
    assert refusal(decode_group, group_with(spans=deep)).code == "schema"
    assert refusal(decode_group, group_with(unheard_of=deep)).code == "schema"


@pytest.mark.parametrize("text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"])
def test_bad_utf8_is_refused(text: bytes) -> None:
    value = msgspec.Raw(bytes([0xA0 + len(text)]) + text)
    assert refusal(decode_group, group_with(uid=value)).code == "utf8"
    assert refusal(decode_group, group_with(spans=[[[value, 3]], [[NEW, 1]]])).code == "utf8"
    assert refusal(decode_task, task_with(reward_inputs={"x": [value]})).code == "utf8"


# Fuzz


@given(st.binary(max_size=200) | st.binary(max_size=200).map(seal))
@FUZZ
def test_noise_is_refused(data: bytes) -> None:
    refusal(decode_group, data)
    refusal(decode_task, data[:2] + b"Pt" + data[4:])


@given(mutated(GROUP_FRAME))
@FUZZ
def test_altered_frames_are_refused_or_the_same(data: bytes) -> None:
    if data == GROUP_FRAME:
        return
    refusal(decode_group, data)
    assert peak_bytes(decode_group, data) < 64 * len(data) + 100_000


@given(mutated(GROUP_FRAME[HEADER_BYTES:]).map(seal))
@settings(FUZZ, max_examples=500)
def test_an_altered_payload_is_a_well_formed_group_or_an_error(data: bytes) -> None:
    check_hostile_group(data)


@given(wire_groups | odd_groups)
@settings(FUZZ, max_examples=250)
def test_any_fields_are_a_well_formed_group_or_an_error(changes: dict[str, Any]) -> None:
    check_hostile_group(group_with(**changes))


@given(mutated(TASK_FRAME[HEADER_BYTES:]))
@settings(FUZZ, max_examples=250)
def test_an_altered_task_is_in_bounds_or_an_error(payload: bytes) -> None:
    check_hostile_task(seal(payload, magic=b"ASPt"))


@given(st.dictionaries(st.sampled_from(Task.__struct_fields__), odd_values, min_size=1))
@FUZZ
def test_any_task_fields_are_in_bounds_or_an_error(changes: dict[str, Any]) -> None:
    check_hostile_task(task_with(**changes))


# Poison


def verdict(group: RolloutGroup, **limits: Any) -> str | None:
    current = PolicyVersion(run="demo", epoch=1, step=42)
    defaults = {"vocab_size": 10, "max_tokens": 3, "max_prompt_tokens": 3, "current": current}
    return validate_group(decode_group(encode_group(group)), **(defaults | limits))


def logprobs(value: float) -> Any:
    return np.array([-0.5, -1.0, 0.0, value], np.float32)


def versioned(version: str) -> Any:
    return (VersionSpan(OLD, 2), VersionSpan(NEW, 1)), (VersionSpan(version, 1),)


POISONS: list[tuple[str, dict[str, Any]]] = [
    ("empty-prompt", {"prompt_ids": np.array([], np.int32)}),
    ("empty-completion", {"lengths": np.array([4, 0], np.int32), "spans": ((VersionSpan(NEW, 4),), ())}),
    ("too-long", {"lengths": np.array([4], np.int32)}),
    ("too-long", {"turns": ((1, 1, 1), (1,))}),
    ("too-long", {"prompt_ids": np.array([5, 6, 7, 8], np.int32)}),
    ("token-out-of-range", {"token_ids": np.array([1, 2, 3, 10], np.int32)}),
    ("token-out-of-range", {"token_ids": np.array([1, 2, 3, -1], np.int32)}),
    ("token-out-of-range", {"prompt_ids": np.array([5, 6, 10], np.int32)}),
    ("token-out-of-range", {"prompt_ids": np.array([5, 6, -1], np.int32)}),
    ("nan-logprob", {"behavior_logprobs": logprobs(np.nan)}),
    ("nan-logprob", {"behavior_logprobs": logprobs(np.inf)}),
    ("nan-logprob", {"behavior_logprobs": logprobs(-np.inf)}),
    ("positive-logprob", {"behavior_logprobs": logprobs(2e-4)}),
    ("bad-reward", {"rewards": np.array([np.nan, 0], np.float32)}),
    ("bad-reward", {"rewards": np.array([0, -np.inf], np.float32)}),
    ("bad-reward", {"reward_parts": {"format": np.array([0, np.nan], np.float32)}}),
    ("bad-temperature", {"temperature": 0.0}),
    ("bad-temperature", {"temperature": 1e-30}),
    ("foreign-run", {"spans": versioned("other/1/42")}),
    ("foreign-run", {"spans": versioned("other/9/9")}),
    ("future-version", {"spans": versioned("demo/1/43")}),
    ("future-version", {"spans": versioned("demo/2/0")}),
]


@pytest.mark.parametrize(("reason", "changes"), POISONS)
def test_poison_has_a_reason(reason: str, changes: dict[str, Any]) -> None:
    if "lengths" in changes and len(changes["lengths"]) == 1:
        changes = changes | {
            "rewards": np.zeros(1, np.float32),
            "failed": np.zeros(1, np.bool_),
            "finish_reasons": ("stop",),
            "spans": ((VersionSpan(NEW, 4),),),
        }
    assert verdict(make_group(**changes)) == reason


def test_every_reason_is_tested() -> None:
    assert {reason for reason, _ in POISONS} == set(get_args(Poison))


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, {}),
        ({"token_ids": np.array([0, 2, 3, 9], np.int32)}, {}),
        ({"behavior_logprobs": logprobs(9e-5)}, {}),
        ({"behavior_logprobs": logprobs(-80.0)}, {}),
        ({"prompt_ids": np.arange(9, dtype=np.int32)}, {"max_prompt_tokens": None}),
        ({"turns": ((1, 1, 1), (1,))}, {"max_tokens": 2, "max_environment_tokens": 1}),
        ({"spans": versioned("demo/0/99")}, {}),
        ({"spans": versioned("other/9/9")}, {"current": None}),
        ({"temperature": 0.0, "purpose": "eval"}, {}),
        ({"temperature": 0.01}, {}),
    ],
)
def test_a_sound_group_has_none(changes: dict[str, Any], limits: dict[str, Any]) -> None:
    assert verdict(make_group(**changes), **limits) is None
