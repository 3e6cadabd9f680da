"""Packed weights of linear layers on a CPU, whose memory can be written.

vLLM packs a CPU's weights into opaque oneDNN handlers, out of reach of a sparse update. torch packs through
the same library, gives the same results at the same speed, and tells where the packed memory lies. Where each
element went is learnt once per shape, by packing matrices that are known, and then held against a random one
in full.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from aspo_actor.placement import Block, bits

# The batch for which oneDNN chooses the layout; the one vLLM packs for.
_BATCH = 32
# Digits that every weight dtype represents exactly.
_BASE = 128
_CHUNK = 2**22
# The overload by name, for finding it costs as much as a small product.
_multiply = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear:
    """The product with a packed weight, called as vLLM calls a layer's `cpu_linear`."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = _pack(weight)
        rows, columns = weight.shape
        # oneDNN's choice may depend on the number of threads, which vLLM changes once it has loaded a model.
        layout = _layout(rows, columns, weight.dtype, torch.get_num_threads())
        if layout is None:
            raise RuntimeError(f"the packed layout of [{rows}, {columns}] {weight.dtype} is not understood")
        self.block = Block(_memory(self._packed, weight.dtype), *layout)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., columns] to [..., rows]; `weight` is the unpacked one, of which vLLM keeps none."""
        product: Tensor = _multiply(x, self._packed, bias, "none", [], "")
        return product


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH)
    return packed


def _memory(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a packed matrix, flat, as integers of its elements' width; it keeps the matrix alive."""
    size = torch.ops.mkldnn._nbytes(packed)
    buffer: Any = (ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    buffer.owner = packed
    return bits(torch.frombuffer(buffer, dtype=dtype))


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype, threads: int) -> tuple[Tensor, Tensor] | None:
    """F [rows] and G [columns] such that element (r, c) is packed at F[r] + G[c]; None if there are none."""
    down = _offsets(torch.zeros(rows, columns, dtype=dtype), 0)
    across = _offsets(torch.zeros(rows, columns, dtype=dtype), 1)
    if down is None or across is None:
        return None
    layout = down, across - across[0]
    known = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    memory = _memory(_pack(known), dtype)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        places = layout[0][part, None] + layout[1]
        if int(places.max()) >= len(memory) or not torch.equal(memory[places], bits(known[part])):
            return None
    return layout


def _offsets(matrix: Tensor, axis: int) -> Tensor | None:
    """Where the elements of a zero matrix's first column (axis 0) or row (axis 1) are packed."""
    line = matrix.select(1 - axis, 0)
    index = torch.arange(len(line))
    line.fill_(1)
    places = _memory(_pack(matrix), matrix.dtype).nonzero()[:, 0]
    if len(places) != len(line):
        return None
    found, scale = torch.zeros_like(index), 1
    while scale < len(line):
        line.copy_(index // scale % _BASE)
        digits = _memory(_pack(matrix), matrix.dtype)[places].view(matrix.dtype)
        found += digits.long() * scale
        scale *= _BASE
    if not torch.equal(found.sort().values, index):
        return None
    offsets = torch.empty_like(index)
    offsets[found] = places
    return offsets
