"""The weight-delta codec: the same bits, and for the right base only."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
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
from states import State, bits, changed, copied, from_bits, noise, same, small

DTYPES = [getattr(torch, name) for name in wire.WIDTHS]


def state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    shapes = {"a": (300, 500), "b": (7,), "scalar": (), "empty": (0, 3), "norm": (64,)}
    tensors = {name: noise(torch.bfloat16, shape, rng) for name, shape in shapes.items()}
    return tensors | {"master": torch.randn(90, 90), "mask": torch.zeros(70, dtype=torch.bool)}


def stepped(tensors: State, seed: int, density: float = 0.01) -> State:
    rng = np.random.default_rng(seed)
    return {name: changed(tensor, density, rng, far=False) for name, tensor in tensors.items()}


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
