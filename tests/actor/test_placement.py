"""Placements and patches on plain torch modules: what a model does to its checkpoint, without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import Tensor

from aspo_actor.checkpoint import TensorSpec, WeightMismatchError
from aspo_actor.packing import PackedLinear
from aspo_actor.patch import Change, read_patch, write_patch
from aspo_actor.placement import Block, LoadRecorder, Placement, bits, matrix_shape

Load = Callable[[Tensor, Tensor], object]


def learn(parameter: Tensor, tensors: Mapping[str, Tensor], load: Mapping[str, Load]) -> LoadRecorder:
    """What is seen while `load[name](parameter, tensor)` runs for every tensor."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(parameter, requires_grad=False)
    recorder = LoadRecorder(model)
    with recorder:
        for name, tensor in recorder.watched(tensors.items()):
            load[name](model.weight.data, tensor)
    return recorder


def placed(recorder: LoadRecorder, parameter: Tensor, name: str, tensor: Tensor) -> Placement:
    assert not recorder.opaque
    copies, shape = recorder.copies[name], matrix_shape(tuple(tensor.shape))
    blocks = tuple(Block.plain(parameter).cut(copy, shape) for copy in copies)
    return Placement(tuple(tensor.shape), parameter.dtype, blocks)


def changed(tensor: Tensor, seed: int = 0) -> Change:
    """A third of the elements, each with its sign and last bit flipped: NaNs and infinities may come up."""
    generator = np.random.default_rng(seed)
    positions = np.sort(generator.choice(tensor.numel(), max(1, tensor.numel() // 3), replace=False))
    found = tensor.reshape(-1)[torch.from_numpy(positions)]
    return Change(torch.from_numpy(positions.astype(np.int32)), (bits(found) ^ -0x7FFF).view(tensor.dtype))


def after(tensor: Tensor, change: Change) -> Tensor:
    assert change.positions is not None
    flat = tensor.clone().reshape(-1)
    flat[change.positions.long()] = change.values
    return flat.reshape(tensor.shape)


def test_a_fused_parameter_takes_the_patch_of_each_of_its_parts() -> None:
    q, k = torch.randn(12, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    fused = torch.zeros(16, 8, dtype=torch.bfloat16)
    recorder = learn(
        fused,
        {"q": q, "k": k},
        {"q": lambda p, t: p.narrow(0, 0, 12).copy_(t), "k": lambda p, t: p[12:].copy_(t)},
    )
    for name, tensor in {"q": q, "k": k}.items():
        placement = placed(recorder, fused, name, tensor)
        assert placement.matches(tensor)
        change = changed(tensor)
        (write,) = placement.stage(change)
        assert not write.landed()
        write.land()
        assert write.landed()
        whole = placement.gather()
        assert whole is not None
        assert torch.equal(bits(whole), bits(after(tensor, change)))
    assert torch.equal(bits(fused), bits(torch.cat([after(q, changed(q)), after(k, changed(k))])))


def _narrow_rows(parameter: Tensor, tensor: Tensor) -> None:
    parameter[:5].copy_(tensor.narrow(0, 7, 5))
    parameter[5:].fill_(0)


def _narrow_columns(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor.narrow(1, 4, 4))


def _pad(parameter: Tensor, tensor: Tensor) -> None:
    parameter[: len(tensor)].copy_(tensor)
    parameter[len(tensor) :].fill_(0)


@pytest.mark.parametrize(
    ("shape", "load", "expected"),
    [
        ((6, 8), _narrow_rows, lambda t: torch.cat([t[7:12], torch.zeros(1, 8)])),
        ((12, 4), _narrow_columns, lambda t: t[:, 4:8]),
        ((16, 8), _pad, lambda t: torch.cat([t, torch.zeros(4, 8)])),
    ],
    ids=["rows of a rank, padded", "columns of a rank", "padded vocabulary"],
)
def test_a_part_of_a_tensor_takes_only_what_is_its_own(
    shape: tuple[int, int], load: Load, expected: Callable[[Tensor], Tensor]
) -> None:
    tensor = torch.randn(12, 8)
    parameter = torch.zeros(shape)
    placement = placed(learn(parameter, {"w": tensor}, {"w": load}), parameter, "w", tensor)
    change = Change(torch.arange(0, 96, 5), torch.arange(0.0, 96.0, 5))
    new = after(tensor, change)
    for step in (change, Change(None, new)):
        writes = placement.stage(step)
        for write in writes:
            write.land()
        assert all(write.landed() for write in writes)
        assert torch.equal(parameter, expected(new))
    whole = placement.gather()
    assert (whole is None) == (len(parameter) == 6 or shape[1] == 4)
    assert whole is None or torch.equal(whole, new)


@pytest.mark.parametrize("strides", [(1, 12), (16, 2)], ids=["transposed", "spread"])
def test_live_memory_may_have_any_strides_and_a_vector_is_a_column(strides: tuple[int, int]) -> None:
    tensor, live = torch.randn(12, 8), torch.zeros(200).as_strided((12, 8), strides, 3)
    live.copy_(tensor)
    assert Placement((12, 8), torch.float32, (Block.plain(live),)).matches(tensor)
    vector = torch.randn(12)
    placement = placed(learn(vector.clone(), {"b": vector}, {"b": _copy}), vector, "b", vector)
    assert placement.matches(vector)
    gathered = placement.gather()
    assert gathered is not None
    assert torch.equal(gathered, vector)


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor)


def test_values_are_cast_as_the_model_casts_them() -> None:
    tensor, parameter = torch.randn(4, 4), torch.zeros(4, 4, dtype=torch.bfloat16)
    placement = placed(learn(parameter, {"w": tensor}, {"w": _copy}), parameter, "w", tensor)
    assert placement.matches(tensor)
    assert placement.matches(tensor.bfloat16())
    assert not placement.matches(tensor + 1)


def _transform(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(-tensor.exp())


def _copy_then_transform(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor)
    parameter.copy_(parameter + 1)


def _transpose(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor.t())


def _derive(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor)
    torch.zeros(4, 4).copy_(parameter)


def _broadcast(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor[0])


@pytest.mark.parametrize("load", [_transform, _copy_then_transform, _transpose, _derive, _broadcast])
def test_what_is_more_than_a_copy_of_a_rectangle_is_told(load: Load) -> None:
    recorder = learn(torch.zeros(4, 4), {"w": torch.randn(4, 4)}, {"w": load})
    assert set(recorder.opaque) == {"w"}


def test_a_reload_into_other_memory_is_followed_to_the_parameter_that_serves() -> None:
    """As vLLM reloads: counted on the meta device, loaded into fresh memory, copied to where it was."""
    live, tensor = torch.zeros(4, 4), torch.randn(4, 4)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(live, requires_grad=False)
    recorder = LoadRecorder(model)
    model.weight = torch.nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
    recorder.add_parameters(model)
    with recorder:
        for _, source in recorder.watched([("w", tensor)]):
            model.weight.data.copy_(source)
            fresh = torch.empty(4, 4)
            fresh.copy_(source)
            live.copy_(fresh)
    assert placed(recorder, live, "w", tensor).matches(tensor)
    with recorder:
        fresh.mul_(2)
    assert set(recorder.opaque) == {"w"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (16, 128), (200, 96), (100, 70), (7, 3), (1, 8), (8, 1)])
def test_a_packed_matrix_multiplies_like_the_plain_one_and_takes_patches(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    linear = PackedLinear(weight)
    placement = Placement(shape, dtype, (Block.plain(weight), linear.block))
    change = Change(
        torch.arange(0, weight.numel(), 3),
        torch.randn((weight.numel() + 2) // 3, generator=generator).to(dtype),
    )
    new = after(weight, change)
    for write in placement.stage(change):
        write.land()
        assert write.landed()
    assert torch.equal(weight, new)
    gathered = placement.gather()
    assert gathered is not None
    assert torch.equal(gathered, new)
    x = torch.randn(5, shape[1], generator=generator).to(dtype)
    assert torch.equal(linear(x, weight, None), PackedLinear(new)(x, new, None))
    torch.testing.assert_close(linear(x, weight, None), torch.nn.functional.linear(x, new))


def test_copies_that_differ_are_told() -> None:
    weight = torch.randn(4, 4)
    placement = Placement((4, 4), torch.float32, (Block.plain(weight), Block.plain(weight.clone())))
    assert placement.gather() is not None
    weight[1, 1] += 1
    with pytest.raises(RuntimeError, match="two copies"):
        placement.gather()


SPECS = {"w": TensorSpec((3, 4), "BF16"), "b": TensorSpec((4,), "F32")}


def test_a_patch_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, dense = tmp_path / "patch.safetensors", torch.randn(4)
    positions, values = np.array([0, 5, 11]), torch.randn(3).bfloat16()
    write_patch(path, {"w": (positions, values), "b": (None, dense)})
    changes = read_patch(path, SPECS, "BF16")
    assert changes.keys() == {"w", "b"}
    assert changes["w"].positions is not None
    assert changes["w"].positions.dtype == torch.int32
    assert changes["w"].positions.tolist() == positions.tolist()
    assert torch.equal(changes["w"].values, values)
    assert changes["b"].positions is None
    assert torch.equal(changes["b"].values, dense)
    far = np.array([2**31])
    write_patch(path, {"w": (far, values[:1])})
    wide = read_patch(path, {"w": TensorSpec((2**16, 2**16), "BF16")}, "BF16")["w"].positions
    assert wide is not None
    assert wide.tolist() == [2**31]


def _patch(name: str = "w", **parts: Tensor) -> dict[str, Tensor]:
    return {f"{name}|{part}": tensor for part, tensor in parts.items()}


VALUES = torch.ones(2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_patch("v", dense=torch.ones(3, 4)), "v is unknown to the model"),
        ({"w": torch.ones(3, 4)}, "w is unknown to the model"),
        (_patch(positions=torch.tensor([1, 2])), "needs positions and values, or dense"),
        (_patch(dense=torch.ones(3, 4).half()), "w has dtype F16; the engine runs in BF16"),
        (_patch("b", dense=torch.ones(3)), r"b has shape \[3\]; the model has \[4\]"),
        (_patch(positions=torch.tensor([1.0, 2.0]), values=VALUES), "not one row of I32 or I64"),
        (_patch(positions=torch.tensor([1]), values=VALUES), "1 positions for values of shape"),
        (_patch(positions=torch.tensor([2, 2]), values=VALUES), "do not ascend"),
        (_patch(positions=torch.tensor([-1, 2]), values=VALUES), r"outside 0 \.\. 11"),
        (_patch(positions=torch.tensor([1, 12]), values=VALUES), r"outside 0 \.\. 11"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "patch.safetensors")
    with pytest.raises(WeightMismatchError, match=message) as refusal:
        read_patch(tmp_path / "patch.safetensors", SPECS, "BF16")
    assert "\n" not in str(refusal.value)


def test_a_truncated_or_missing_patch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    write_patch(path, {"b": (None, torch.ones(4))})
    path.write_bytes(path.read_bytes()[:-4])
    for file in (path, tmp_path / "nowhere"):
        with pytest.raises(WeightMismatchError, match="cannot be read"):
            read_patch(file, SPECS, "BF16")


def test_a_gathered_tensor_has_the_digest_of_the_published_one() -> None:
    tensor = torch.randn(40, 16).bfloat16()
    gathered = Placement((40, 16), torch.bfloat16, (PackedLinear(tensor).block,)).gather()
    assert gathered is not None
    raw = [blake3(bits(t).numpy().tobytes()).hexdigest() for t in (tensor, gathered)]
    assert raw[0] == raw[1]
