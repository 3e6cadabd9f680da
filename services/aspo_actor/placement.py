"""Where a checkpoint's tensors lie in a running model, learnt by watching the model load them.

    recorder = LoadRecorder(model)
    with recorder:
        model.load_weights(recorder.watched(tensors))
    recorder.copies[name], recorder.opaque[name]    # rectangles copied as they are; or why that is unknown

A model renames, fuses, pads and splits what it loads (q, k and v become one matrix, a rank keeps its rows),
but as a rule it does so by copying rectangles of checkpoint tensors. A `Placement` is the rectangles of one
tensor in live memory. It holds for any layout whose offsets add up, offset(r, c) = F[r] + G[c]: the
plain and strided ones, and the blocked ones of oneDNN.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aspo_actor.patch import Change

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22
_PACK = torch.ops.mkldnn._reorder_linear_weight.default
# Neither reads a value; packing is known to keep every one.
_HARMLESS = {torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default, _PACK}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's elements as integers of their width: equal just where every bit is, NaNs included."""
    return tensor.view(_BITS[tensor.element_size()])


class Parameter(NamedTuple):
    """A parameter by its place in the model, which outlives the tensor that is there."""

    module: torch.nn.Module
    name: str


class Copy(NamedTuple):
    """A rectangle [height, width] of a checkpoint tensor that a parameter holds from its [row, column] on."""

    parameter: Parameter
    shape: tuple[int, int]
    source: tuple[int, int]
    target: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Block:
    """A matrix in live memory: element (r, c) is `memory[rows[r] + columns[c]]`."""

    memory: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def plain(cls, matrix: Tensor) -> Block:
        """The block of a strided matrix, or of a vector as a column."""
        matrix = as_matrix(matrix)
        flat = torch.empty(0, dtype=matrix.dtype, device=matrix.device).set_(matrix.untyped_storage())
        rows, columns = (
            torch.arange(length, device=matrix.device) * stride
            for length, stride in zip(matrix.shape, matrix.stride(), strict=True)
        )
        return cls(bits(flat), torch.add(rows, int(matrix.storage_offset())), columns)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time and where their elements lie: an index takes more room than what it finds."""
        step = max(1, _CHUNK // max(1, len(self.columns)))
        for start in range(0, len(self.rows), step):
            part = slice(start, start + step)
            yield part, self.rows[part, None] + self.columns

    def inside(self) -> Block:
        """Without the rows and columns that lie elsewhere."""
        return Block(self.memory, self.rows[self.rows >= 0], self.columns[self.columns >= 0])

    def cut(self, copy: Copy, shape: tuple[int, int]) -> Block:
        """The block of a tensor of `shape` that was copied into this one; -1 for what lies elsewhere."""
        (height, width), (row, column), (top, left) = copy.size, copy.target, copy.source
        rows, columns = (torch.full((n,), -1, dtype=torch.int64, device=self.rows.device) for n in shape)
        rows[top : top + height] = self.rows[row : row + height]
        columns[left : left + width] = self.columns[column : column + width]
        return Block(self.memory, rows, columns)


@dataclass(frozen=True, eq=False)
class Write:
    """Values on their way to live memory: `values` [C] to `where` [C], or [R, C] to a whole block."""

    block: Block
    where: Tensor | None
    values: Tensor

    def land(self) -> None:
        """Write; a device does so in its own time."""
        for where, values in self._pieces():
            self.block.memory.scatter_(0, where, values)

    def landed(self) -> bool:
        """Whether every element reads back as written."""
        memory = self.block.memory
        return all(torch.equal(memory.index_select(0, where), values) for where, values in self._pieces())

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.where is not None:
            yield self.where, self.values
            return
        for part, where in self.block.pieces():
            yield where.reshape(-1), self.values[part].reshape(-1)


@dataclass(frozen=True, eq=False)
class Placement:
    """The live blocks of one checkpoint tensor; none where this worker, or the model, has no use for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]

    def stage(self, change: Change) -> list[Write]:
        """Bring a change, checked before, to the device and find its elements; the model is not touched."""
        return [self._stage(block, change) for block in self.blocks]

    def matches(self, tensor: Tensor) -> bool:
        """Whether the live elements are those of a checkpoint tensor, to the last bit."""
        return all(write.landed() for write in self.stage(Change(None, tensor)))

    def gather(self) -> Tensor | None:
        """The whole tensor from live memory, on the CPU; None where this worker holds a part of it or none.

        Raises `RuntimeError` when it has several copies and they differ.
        """
        if not self.blocks:
            return None
        rows, columns = matrix_shape(self.shape)
        values = torch.empty((rows, columns), dtype=_BITS[self.dtype.itemsize])
        seen = torch.zeros(rows, dtype=torch.bool)
        for block in self.blocks:
            inside = (block.rows >= 0).cpu()
            if not bool((block.columns >= 0).all()):
                return None
            found = torch.cat([block.memory[where].cpu() for _, where in block.inside().pieces()])
            if not torch.equal(found[seen[inside]], values[seen & inside]):
                raise RuntimeError("two copies of a tensor differ")
            values[inside] = found
            seen |= inside
        return values.view(self.dtype).reshape(self.shape) if bool(seen.all()) else None

    def _stage(self, block: Block, change: Change) -> Write:
        device = block.memory.device
        if change.positions is None:
            rows, columns = block.rows >= 0, block.columns >= 0
            values = bits(as_matrix(change.values).to(device, self.dtype))[rows][:, columns]
            return Write(block.inside(), None, values)
        positions = change.positions.to(device)
        values = bits(change.values.to(device, self.dtype, copy=True))
        row = positions // len(block.columns)  # four times as fast in 32 bits, where those are enough
        row_offsets = block.rows.index_select(0, row)
        column_offsets = block.columns.index_select(0, positions - row * len(block.columns))
        where = row_offsets + column_offsets
        if bool((block.rows < 0).any()) or bool((block.columns < 0).any()):
            inside = (row_offsets >= 0) & (column_offsets >= 0)
            where, values = where[inside], values[inside]
        return Write(block, where, values)


class LoadRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a model load its checkpoint, and tells what was copied where from what was computed.

    `copies` has the rectangles of every tensor that went to parameters as it is. `opaque` has those of which
    anything was read in another way, by name, with the operation: what became of them is unknown.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: defaultdict[str, dict[Copy, None]] = defaultdict(dict)
        self.opaque: dict[str, str] = {}
        self._starts: list[int] = []
        self._sources: dict[int, tuple[str, Tensor]] = {}
        self._parameters: dict[StorageWeakRef, tuple[Parameter, Tensor]] = {}
        # The checkpoint tensors whose values a storage holds, by references that outlive its memory.
        self._names: defaultdict[StorageWeakRef, set[str]] = defaultdict(set)
        self.add_parameters(model)

    def add_parameters(self, model: torch.nn.Module) -> None:
        """Know the model's present parameters too: a reload loads into others than those that serve."""
        for module in model.modules():
            for name, tensor in module.named_parameters(recurse=False):
                self._parameters.setdefault(_storage(tensor), (Parameter(module, name), tensor.data))

    def watched(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass on a checkpoint's tensors, on the CPU, each known by its memory from then on."""
        for name, tensor in tensors:
            bisect.insort(self._starts, tensor.data_ptr())
            self._sources[tensor.data_ptr()] = name, tensor
            yield name, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at one operation, then run it."""
        if func is torch.ops.aten.copy_.default:
            self._copied(args[0], args[1])
        elif not getattr(func, "is_view", False) and func not in _HARMLESS:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    self._computed(tensor, str(func))
        return func(*args, **(kwargs or {}))

    def _copied(self, target: Tensor, source: Tensor) -> None:
        if target.numel() == 0:
            return
        known = self._parameters.get(_storage(target))
        found = self._source(source)
        if found is None:
            names = self._names.get(_storage(source), set())
            if names and not (known and target.shape == source.shape and names <= self._held(known[0])):
                self._computed(source, f"a copy of {sorted(names)[0]}")
            return
        name, tensor = found
        if known is not None:
            self._record(name, tensor, known, target, source)
        self._names[_storage(target)].add(name)

    def _record(
        self, name: str, tensor: Tensor, known: tuple[Parameter, Tensor], target: Tensor, source: Tensor
    ) -> None:
        copy = _rectangle(tensor, known, target, source)
        if copy is None:
            self.opaque.setdefault(name, "a copy that is not of a rectangle")
        else:
            self.copies[name][copy] = None

    def _computed(self, tensor: Tensor, how: str) -> None:
        found = self._source(tensor)
        for name in {found[0]} if found else self._names.get(_storage(tensor), set()):
            self.opaque.setdefault(name, how)

    def _held(self, parameter: Parameter) -> set[str]:
        return {name for name, copies in self.copies.items() if any(c.parameter == parameter for c in copies)}

    def _source(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        if tensor.device.type != "cpu" or not self._starts:
            return None
        address = tensor.data_ptr()
        start = self._starts[bisect.bisect_right(self._starts, address) - 1]
        name, source = self._sources.get(start, ("", tensor))
        return (name, source) if start <= address < start + source.nbytes else None


def as_matrix(tensor: Tensor) -> Tensor:
    """A view of a tensor as a matrix, a vector as one column; raises `ValueError` beyond two dimensions."""
    if tensor.ndim == 2:
        return tensor
    return tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor.reshape(matrix_shape(tuple(tensor.shape)))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of `as_matrix`."""
    if len(shape) > 2:
        raise ValueError(f"a tensor of shape {list(shape)} is no matrix")
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns


def _rectangle(
    tensor: Tensor, known: tuple[Parameter, Tensor], target: Tensor, source: Tensor
) -> Copy | None:
    """What of checkpoint `tensor` went where in a parameter, if `source` and `target` are rectangles."""
    parameter, whole = known
    if max(tensor.ndim, whole.ndim) > 2 or target.shape != source.shape or tensor.dtype != source.dtype:
        return None
    (rows, columns), shape = matrix_shape(tuple(tensor.shape)), matrix_shape(tuple(whole.shape))
    if columns == 1 != shape[1] and rows > 1:
        return None
    size = {columns: 1, 1: 1}
    for length, source_stride, target_stride in zip(
        source.shape, source.stride(), target.stride(), strict=True
    ):
        if length == 1:
            continue
        along = {columns: shape[1], 1: 1}.get(source_stride)
        if along != target_stride or size[source_stride] != 1:
            return None
        size[source_stride] = length
    offset = (source.data_ptr() - tensor.data_ptr()) // tensor.element_size()
    height, width = (size[columns], size[1]) if columns > 1 else (size[1], 1)
    top, left = divmod(offset, columns)
    row, column = divmod(int(target.storage_offset()) - int(whole.storage_offset()), shape[1])
    if left + width > columns or column + width > shape[1] or row + height > shape[0]:
        return None
    return Copy(parameter, shape, (top, left), (row, column), (height, width))


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
