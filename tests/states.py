"""States of tensors for the delta codec: any bits at all, and how two of them differ."""

from __future__ import annotations

import numpy as np
import torch

from aspo.weights.delta import encode_delta

State = dict[str, torch.Tensor]
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


def copied(tensors: State) -> State:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def small() -> tuple[State, State, bytes]:
    """Two states and their delta, of a size to try every byte of."""
    base = {"w": torch.linspace(-1, 1, 600).to(torch.bfloat16), "v": torch.ones(3)}
    new = {"w": base["w"].clone(), "v": base["v"] * 1.7}
    new["w"][[3, 17, 400, 599]] *= 1.01
    new["w"][300] = 1e30
    return base, new, encode_delta(base, new)
