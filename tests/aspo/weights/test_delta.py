"""The weight-delta codec: the same bits, for the right base only, and only `DeltaError` for bad bytes."""

from __future__ import annotations

import itertools
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
    state_check,
)
from aspo.weights.manifest import WeightsError

State = dict[str, torch.Tensor]
DTYPES = [getattr(torch, name) for name in wire.WIDTHS]
UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The codes of a tensor, flat, in memory of their own."""
    return tensor.contiguous().view(UNSIGNED[tensor.element_size()]).numpy().reshape(-1).copy()


def from_bits(codes: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(codes.copy()).view(like.dtype).reshape(like.shape)


def same(one: State, other: State) -> bool:
    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits(a), bits(b))

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def noise(dtype: torch.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Any bits at all: NaN payloads, infinities, subnormals, negative zero."""
    like = torch.empty(shape, dtype=dtype)
    codes = np.frombuffer(rng.bytes(like.nbytes), bits(like).dtype)
    return from_bits(codes % 2 if dtype == torch.bool else codes, like)


def changed(tensor: torch.Tensor, density: float, rng: np.random.Generator, far: bool) -> torch.Tensor:
    """Add to some codes a step, near or anywhere, modulo 2^bits."""
    codes = bits(tensor)
    where = rng.random(codes.size) < density
    if tensor.dtype == torch.bool:
        return from_bits(codes ^ where, tensor)
    steps = (
        np.frombuffer(rng.bytes(codes.nbytes), codes.dtype) if far else rng.choice([-2, -1, 1, 2], codes.size)
    )
    codes[where] += steps.astype(codes.dtype)[where]
    return from_bits(codes, tensor)


def state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    shapes = {"a": (300, 500), "b": (7,), "scalar": (), "empty": (0, 3), "norm": (64,)}
    tensors = {name: noise(torch.bfloat16, shape, rng) for name, shape in shapes.items()}
    return tensors | {"master": torch.randn(90, 90), "mask": torch.zeros(70, dtype=torch.bool)}


def stepped(tensors: State, seed: int, density: float = 0.01) -> State:
    rng = np.random.default_rng(seed)
    return {name: changed(tensor, density, rng, far=False) for name, tensor in tensors.items()}


def copied(tensors: State) -> State:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def small() -> tuple[State, State, bytes]:
    """Two states and their delta, of a size to try every byte of."""
    base = {"w": torch.linspace(-1, 1, 600).to(torch.bfloat16), "v": torch.ones(3)}
    new = {"w": base["w"].clone(), "v": base["v"] * 1.7}
    new["w"][[3, 17, 400, 599]] *= 1.01
    new["w"][300] = 1e30
    return base, new, encode_delta(base, new)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    far=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_any_bits_of_any_dtype_come_back(
    dtype: torch.dtype, shape: list[int], density: float, far: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = {"w": noise(dtype, tuple(shape), rng), "other": torch.arange(5)}
    new = base | {"w": changed(base["w"], density, rng, far)}
    delta = encode_delta(base, new)
    assert same(decode_delta(base, delta), new)
    assert describe_delta(delta).changed == int((bits(base["w"]) != bits(new["w"])).sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0001, 0.3, 1.0])
def test_tensors_of_many_segments(dtype: torch.dtype, density: float) -> None:
    rng = np.random.default_rng(0)
    like = torch.empty(
        2 * wire.SEGMENT_BYTES // torch.empty((), dtype=dtype).element_size() + 77, dtype=dtype
    )
    base = {"w": noise(dtype, tuple(like.shape), rng), "after": torch.ones(9)}
    new = {"w": changed(base["w"], density, rng, far=False), "after": torch.zeros(9)}
    delta = encode_delta(base, new, threads=3)
    assert same(decode_delta(base, delta, threads=3), new)
    assert delta == encode_delta(base, new, threads=1)


def test_steps_wrap_around_and_float_specials_keep_their_bits() -> None:
    codes = np.array([0, 0xFFFF, 0x7FFF, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0x8000], np.uint16)
    other = np.array([0xFFFF, 0, 0x8000, 0x7FFF, 0xFF80, 0x7F81, 0xFFFF, 0x0000], np.uint16)
    like = torch.empty(8, dtype=torch.bfloat16)
    base, new = {"w": from_bits(codes, like)}, {"w": from_bits(other, like)}
    assert same(decode_delta(base, encode_delta(base, new)), new)
    assert same(decode_delta(new, encode_delta(new, base)), base)


def test_empty_states_and_empty_changes() -> None:
    assert decode_delta({}, encode_delta({}, {})) == {}
    base = state()
    delta = encode_delta(base, copied(base))
    assert same(decode_delta(base, delta), base)
    assert apply_delta(copied(base), delta) == {}
    assert describe_delta(delta).changed == 0
    assert {tensor.mode for tensor in describe_delta(delta).tensors.values()} == {"same"}


def test_inputs_that_are_not_contiguous() -> None:
    base = {"w": torch.randn(40, 50).to(torch.bfloat16).t(), "odd": torch.arange(9, dtype=torch.uint8)[1:]}
    new = {"w": (base["w"].float() * 1.01).to(torch.bfloat16).t().contiguous().t(), "odd": base["odd"] + 1}
    result = decode_delta(base, encode_delta(base, new))
    assert same(result, new)
    assert result["w"].is_contiguous()
    with pytest.raises(DeltaError, match="contiguous"):
        apply_delta({"w": base["w"]}, encode_delta({"w": base["w"]}, {"w": new["w"]}))


def test_the_header_says_what_changed() -> None:
    base, new, delta = small()
    info = describe_delta(delta)
    assert (info.base_check, info.new_check) == (state_check(base), state_check(new))
    assert (info.changed, info.size) == (8, 603)
    assert info.tensors["w"] == ("sparse", 5, 600)
    assert delta == encode_delta(base, new, base_check=info.base_check)


def test_a_check_tells_names_dtypes_shapes_and_order_of_nothing() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    others = [
        {"a": torch.zeros(4), "c": torch.zeros(2, 2)},
        {"a": torch.zeros(4), "b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.zeros(2, 2)},
        {"a": -torch.zeros(4), "b": torch.zeros(2, 2)},
    ]
    assert len({state_check(tensors) for tensors in (base, *others)}) == 5
    assert state_check(base) == state_check(dict(reversed(base.items())))


def test_apply_gives_positions_and_new_values() -> None:
    base = state()
    new = stepped(base, 1)
    live = copied(base)
    changes = apply_delta(live, encode_delta(base, new), checked_base=state_check(base))
    assert same(live, new)
    for name, tensor in base.items():
        where = np.flatnonzero(bits(tensor) != bits(new[name]))
        assert (name in changes) == (len(where) > 0)
        if name in changes and changes[name].positions is not None:
            assert np.array_equal(changes[name].positions, where)
            assert changes[name].values.dtype == tensor.dtype
            assert np.array_equal(bits(changes[name].values), bits(new[name])[where])


def test_a_tensor_that_changed_all_over_is_sent_whole() -> None:
    rng = np.random.default_rng(0)
    base = {"w": noise(torch.bfloat16, (400, 400), rng), "v": noise(torch.bfloat16, (400, 400), rng)}
    new = {"w": noise(torch.bfloat16, (400, 400), rng), "v": changed(base["v"], 0.01, rng, far=False)}
    delta = encode_delta(base, new)
    modes = {name: tensor.mode for name, tensor in describe_delta(delta).tensors.items()}
    assert modes == {"w": "raw", "v": "sparse"}
    assert len(delta) < new["w"].nbytes + 10_000
    live = copied(base)
    changes = apply_delta(live, delta)
    assert same(live, new)
    assert changes["w"].positions is None
    assert changes["w"].values is live["w"]


def test_an_fp32_master_that_moved_a_little_everywhere_still_compresses() -> None:
    base = {"w": torch.randn(200_000)}
    new = {"w": base["w"] * (1 + 1e-5)}
    delta = encode_delta(base, new)
    assert same(decode_delta(base, delta), new)
    assert len(delta) < 0.5 * base["w"].nbytes


def versions(count: int) -> list[State]:
    """bf16 copies of an fp32 master that takes AdamW steps."""
    generator = torch.Generator().manual_seed(0)
    master = {"w": torch.nn.Parameter(torch.randn(300, 300, generator=generator) * 0.02)}
    master["norm"] = torch.nn.Parameter(torch.ones(300))
    optimizer = torch.optim.AdamW(master.values(), lr=3e-6)
    result = []
    for _ in range(count):
        result.append({name: weight.detach().to(torch.bfloat16) for name, weight in master.items()})
        for weight in master.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return result


def test_twenty_optimizer_steps_one_by_one_and_merged() -> None:
    states = versions(21)
    deltas: list[bytes] = []
    live, check = copied(states[0]), state_check(states[0])
    for base, new in itertools.pairwise(states):
        deltas.append(encode_delta(base, new, base_check=check))
        apply_delta(live, deltas[-1], checked_base=check)
        check = describe_delta(deltas[-1]).new_check
        assert same(live, new)
    for first, last in ((0, 20), (3, 4), (5, 13)):
        merged = merge_deltas(deltas[first:last])
        assert same(decode_delta(states[first], merged), states[last])
        assert merged == encode_delta(states[first], states[last])
    assert len(merge_deltas(deltas[:8])) < 0.7 * sum(map(len, deltas[:8]))


@pytest.mark.parametrize("dense_at", [(), (0,), (1,), (3,), (0, 2), (0, 1, 2, 3)])
def test_merging_composes_sparse_and_whole_tensors(dense_at: tuple[int, ...]) -> None:
    states = [state()]
    for i in range(4):
        new = stepped(states[-1], i)
        if i in dense_at:
            new["a"] = noise(torch.bfloat16, (300, 500), np.random.default_rng(i))
        states.append(new)
    deltas = [encode_delta(base, new) for base, new in itertools.pairwise(states)]
    assert same(decode_delta(states[0], merge_deltas(deltas)), states[-1])
    assert same(decode_delta(states[0], merge_deltas([merge_deltas(deltas[:2]), *deltas[2:]])), states[-1])


def test_there_and_back_merges_to_nothing() -> None:
    base, new, delta = small()
    merged = merge_deltas([delta, encode_delta(new, base)])
    assert {tensor.mode for tensor in describe_delta(merged).tensors.values()} <= {"same", "raw"}
    assert same(decode_delta(base, merged), base)


def test_only_consecutive_deltas_merge() -> None:
    base, new, delta = small()
    with pytest.raises(DeltaError, match="follow"):
        merge_deltas([delta, delta])
    with pytest.raises(DeltaError, match="layout"):
        merge_deltas([delta, encode_delta({"x": new["w"]}, {"x": base["w"]})])
    with pytest.raises(DeltaError, match="no deltas"):
        merge_deltas([])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s.pop("w"), "layout|tensors"),
        (lambda s: s.update(w=s["w"].float()), "layout"),
        (lambda s: s.update(w=s["w"].reshape(2, 300)), "layout"),
        (lambda s: s.update(z=torch.ones(1)), "tensors"),
        (lambda s: s.update(v=torch.ones(3, dtype=torch.complex64)), "do not know"),
        (lambda s: s.update(v=torch.ones(3, device="meta")), "CPU"),
        (lambda s: s.update({"": torch.ones(1)}), "names"),
        (lambda s: s.update({"\ud800": torch.ones(1)}), "text|tensors"),
    ],
)
def test_states_that_do_not_match_are_refused(spoil: Callable[[State], object], text: str) -> None:
    base, new, delta = small()
    spoil(new)
    with pytest.raises(DeltaError, match=text):
        encode_delta(base, new)
    with pytest.raises(DeltaError, match=text):
        decode_delta(new, delta)


def test_a_base_with_one_flipped_bit_is_refused_and_left_alone() -> None:
    base, new, delta = small()
    for name, tensor in base.items():
        for position in (0, 1, tensor.numel() - 1):
            wrong = copied(base)
            codes = bits(wrong[name])
            codes[position] ^= codes.dtype.type(1)
            wrong[name] = from_bits(codes, tensor)
            before = copied(wrong)
            with pytest.raises(DeltaError, match="for the base"):
                decode_delta(wrong, delta)
            with pytest.raises(DeltaError, match="for the base"):
                apply_delta(wrong, delta)
            assert same(wrong, before)
    with pytest.raises(DeltaError, match="for the base"):
        apply_delta(new, delta, checked_base=state_check(new))


def test_a_wrong_promise_about_the_base_is_found_afterwards() -> None:
    base, _, delta = small()
    wrong = base | {"w": base["w"] + 1}
    with pytest.raises(DeltaError, match="ruined"):
        apply_delta(wrong, delta, checked_base=state_check(base))
    with pytest.raises(DeltaError, match="not a state's check"):
        apply_delta(base, delta, checked_base="beef")


def test_only_the_last_of_several_deltas_need_be_verified() -> None:
    first, second, third = state(), stepped(state(), 1), stepped(stepped(state(), 1), 2)
    live = copied(first)
    forth, onward = encode_delta(first, second), encode_delta(second, third)
    apply_delta(live, forth, verify=False)
    assert same(live, second)
    live["norm" if "norm" in live else next(iter(live))].zero_()
    with pytest.raises(DeltaError, match="ruined"):
        apply_delta(live, onward, checked_base=describe_delta(forth).new_check)


def test_tensors_that_share_memory_are_refused() -> None:
    one = torch.zeros(8)
    delta = encode_delta({"a": one, "b": one}, {"a": one + 1, "b": one + 1})
    with pytest.raises(DeltaError, match="share"):
        apply_delta({"a": one, "b": one}, delta)
    assert not one.any()


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
