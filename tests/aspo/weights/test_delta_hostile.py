"""The weight-delta codec on hostile bytes: `DeltaError` alone, nothing written, no bomb unpacked."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from aspo.weights import _delta_format as wire
from aspo.weights.delta import (
    DeltaError,
    apply_delta,
    decode_delta,
    describe_delta,
    encode_delta,
    merge_deltas,
)
from aspo.weights.manifest import WeightsError
from states import State, changed, copied, noise, same, small


def test_every_flip_and_every_cut_is_refused() -> None:
    base, _, delta = small()
    assert issubclass(DeltaError, WeightsError)
    for i in range(len(delta)):
        flipped = bytearray(delta)
        flipped[i] ^= 1 + i % 255
        for bad in (bytes(flipped), delta[:i]):
            with pytest.raises(DeltaError):
                decode_delta(base, bad)
    for bad in (delta + b"\0", delta + delta, None, 7, "text", [1], np.zeros((2, 2))[:, 1:]):
        with pytest.raises(DeltaError):
            decode_delta(base, bad)  # type: ignore[arg-type]


def resealed(body: bytes) -> bytes:
    """A delta of any bytes under a digest that holds."""
    return delta_prefix(blake3(body).digest(length=16)) + body


def delta_prefix(digest: bytes) -> bytes:
    return b"ASPd" + wire.SCHEMA_VERSION.to_bytes(4, "little") + digest


def refusal(read: Callable[[], object]) -> str:
    """The text of the `DeltaError` that reading raises, empty if it raises nothing."""
    try:
        read()
    except DeltaError as error:
        return str(error)
    return ""


def refused_or_sound(base: State, delta: bytes) -> None:
    """Nothing but `DeltaError` is raised, and nothing written unless it says so."""
    refusal(lambda: decode_delta(base, delta))
    refusal(lambda: merge_deltas([delta]))
    refusal(lambda: describe_delta(delta))
    live = copied(base)
    text = refusal(lambda: apply_delta(live, delta))
    assert not text or "ruined" in text or same(live, base)


@given(data=st.binary(max_size=300), sealed=st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_bytes(data: bytes, sealed: bool) -> None:
    base, _, _ = small()
    refused_or_sound(base, resealed(data) if sealed else data)


@given(
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 3),
    plain=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_mutations_under_a_digest_that_holds(edits: list[tuple[int, int]], cut: int, plain: bool) -> None:
    base, _, delta = small()
    body = bytearray(delta[24:])
    if plain:  # the header as it is, so that edits hit its fields and not its compression
        header, rest = split(delta)
        body = bytearray(joined(msgspec.msgpack.encode(header), rest)[24:])
    for at, value in edits:
        body[at % len(body)] = value
    refused_or_sound(base, resealed(bytes(body[: len(body) - cut])))


def split(delta: bytes) -> tuple[list, bytes]:
    """The header as plain lists, and what follows it."""
    opened = wire.open_delta(delta)
    rest = sum(len(frame) for frames in opened.frames for frame in frames) + sum(
        map(len, opened.raw.values())
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(opened.header)), delta[len(delta) - rest :]


def joined(header: bytes, rest: bytes) -> bytes:
    size = len(header).to_bytes(4, "little")
    return resealed(size + size + header + rest)


def forged(edit: Callable[[list[bytearray]], None], density: float = 0.2) -> tuple[State, bytes]:
    """A delta of one bf16 tensor of 4000 elements whose streams were edited and sealed again."""
    rng = np.random.default_rng(0)
    base = {"w": noise(torch.bfloat16, (4000,), rng)}
    new = {"w": changed(base["w"], density, rng, far=False)}
    header, _ = split(encode_delta(base, new))
    opened = wire.open_delta(encode_delta(base, new))
    streams = [bytearray(b"".join(map(zstandard.decompress, frames))) for frames in opened.frames]
    edit(streams)
    frames = [zstandard.compress(bytes(stream)) for stream in streams if stream]
    sizes = iter(frames)
    header[3] = [[len(next(sizes))] if stream else [] for stream in streams]
    return base, joined(msgspec.msgpack.encode(header), b"".join(frames))


def set_count(column: int, value: int) -> Callable[[list[bytearray]], None]:
    """Overwrite a count of the only segment; its bytes lie one after another."""

    def edit(streams: list[bytearray]) -> None:
        streams[0][4 * column : 4 * column + 4] = value.to_bytes(4, "little")

    return edit


def longer_gaps(streams: list[bytearray]) -> None:
    streams[1][:] = bytes([254]) * len(streams[1])


def dangling_gap(streams: list[bytearray]) -> None:
    streams[1][-1] = 255


def wide_steps(streams: list[bytearray]) -> None:
    streams[2][0] = 255


def short_gaps(streams: list[bytearray]) -> None:
    del streams[1][-1]


def no_gaps(streams: list[bytearray]) -> None:
    streams[1].clear()


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (longer_gaps, "do not fit"),
        (dangling_gap, "do not fit"),
        (wide_steps, "do not fit"),
        (short_gaps, "due"),
        (no_gaps, "frames"),
        (set_count(0, 4001), "larger"),
        (set_count(0, 2**32 - 1), "larger"),
        (set_count(0, 3), "not those|larger"),
        (set_count(1, 2**31), "larger"),
        (set_count(1, 0), "frames"),
        (set_count(2, 5000), "larger"),
        (set_count(2, 1), "frames"),
    ],
)
def test_forged_streams_are_refused_before_anything_is_written(
    edit: Callable[[list[bytearray]], None], text: str
) -> None:
    base, delta = forged(edit)
    live = copied(base)
    for read in (lambda: apply_delta(live, delta), lambda: merge_deltas([delta])):
        with pytest.raises(DeltaError, match=text):
            read()
    assert same(live, base)


def test_forging_itself_is_sound() -> None:
    base, delta = forged(lambda streams: None)
    decode_delta(base, delta)


def test_forged_values_ruin_the_state_and_say_so() -> None:
    def other_step(streams: list[bytearray]) -> None:
        streams[2][0] ^= 1

    base, delta = forged(other_step)
    with pytest.raises(DeltaError, match="ruined"):
        decode_delta(base, delta)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda header: header[2].reverse(), "order"),
        (lambda header: header[2].append(header[2][1]), "order"),
        (lambda header: header[2][1].__setitem__(1, "complex64"), "dtype"),
        (lambda header: header[2][1].__setitem__(2, [2**40, 2**40]), "declares|elements"),
        (lambda header: header[2][1].__setitem__(2, [-1]), "header"),
        (lambda header: header[2][1].__setitem__(2, [599]), "layout"),
        (lambda header: header[2][1].__setitem__(3, "rle"), "header"),
        (lambda header: header[2][1].__setitem__(3, "raw"), "declares"),
        (lambda header: header[2][1].__setitem__(4, 0), "mode"),
        (lambda header: header[2][1].__setitem__(4, 601), "mode"),
        (lambda header: header[2][1].__setitem__(4, 6), "not those"),
        (lambda header: header[3].pop(), "declares"),
        (lambda header: header[3][1].append(1), "declares"),
        (lambda header: header.append(0), "header"),
        (lambda header: header.__setitem__(0, b"short"), "header"),
    ],
)
def test_forged_headers_are_refused(edit: Callable[[list], None], text: str) -> None:
    base, _, delta = small()
    header, rest = split(delta)
    edit(header)
    with pytest.raises(DeltaError, match=text):
        decode_delta(base, joined(msgspec.msgpack.encode(header), rest))


def test_bombs_are_refused_before_they_unpack() -> None:
    base, _, delta = small()
    bomb = zstandard.compress(bytes(2**28))
    header, rest = split(delta)
    first = header[3][0][0]
    header[3][0][0] = len(bomb)
    in_stream = joined(msgspec.msgpack.encode(header), bomb + rest[first:])
    sizes = len(bomb).to_bytes(4, "little") + (2**28).to_bytes(4, "little")
    claimed = len(bomb).to_bytes(4, "little") + (60 * len(bomb)).to_bytes(4, "little")
    tracemalloc.start()
    for bad in (in_stream, resealed(sizes + bomb), resealed(claimed + bomb)):
        with pytest.raises(DeltaError):
            decode_delta(base, bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_fuzzing_allocates_in_proportion() -> None:
    base, _, delta = small()
    rng = random.Random(0)
    tracemalloc.start()
    for _ in range(150):
        body = bytearray(delta[24:])
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(len(body))] = rng.choice([0, 1, 127, 128, 254, 255])
        refused_or_sound(base, resealed(bytes(body)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
