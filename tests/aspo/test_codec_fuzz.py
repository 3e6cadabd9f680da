import dataclasses
import struct
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspo.codec import (
    HEADER_BYTES,
    MAX_SAMPLES,
    MAX_TOKENS,
    CodecError,
    decode_group,
    decode_task,
    encode_group,
    encode_task,
)
from aspo.schemas import RolloutGroup, Task, VersionSpan
from frames import (
    GROUP_FRAME,
    NEW,
    TASK_FRAME,
    assert_task_in_bounds,
    assert_well_formed,
    comparable,
    group_with,
    int32,
    peak_bytes,
    refusal,
    task_with,
)
from rollouts import seal

FUZZ = settings(max_examples=100, database=None, deadline=None, suppress_health_check=list(HealthCheck))

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


def check_hostile_group(data: bytes) -> None:
    with suppress(CodecError):
        assert_well_formed(decode_group(data))
    assert peak_bytes(decode_group, data) < 64 * len(data) + 100_000


def check_hostile_task(data: bytes) -> None:
    with suppress(CodecError):
        assert_task_in_bounds(decode_task(data))
    assert peak_bytes(decode_task, data) < 256 * len(data) + 100_000


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
