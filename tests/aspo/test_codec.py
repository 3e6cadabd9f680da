from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from aspo.codec import (
    HEADER_BYTES,
    MAX_GROUP_BYTES,
    MAX_SAMPLES,
    MAX_SPANS,
    MAX_TASK_BYTES,
    MAX_TOKENS,
    MAX_TURNS,
    CodecError,
    decode_group,
    decode_task,
    encode_group,
    encode_task,
)
from aspo.schemas import SCHEMA_VERSION, VersionSpan
from frames import (
    DELETE,
    GROUP_FRAME,
    NEW,
    OLD,
    TASK_FRAME,
    comparable,
    group_with,
    int32,
    make_group,
    make_task,
    peak_bytes,
    refusal,
    task_with,
)
from rollouts import seal

BEFORE_TURNS = "6fac9c4e98a835a94c88b88b4b8006c8"  # digest of `make_group()` as it was written before

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
