"""Lossless deltas between two versions of the weights: a few bytes for each element that changed.

    delta = encode_delta(base, new)                  # dicts of name -> CPU tensor
    new = decode_delta(base, delta)                  # the same bits
    changes = apply_delta(state, delta)              # in place; what changed, for engines that scatter
    delta = merge_deltas([first, second, third])     # one delta over three versions, without any tensors

Between two optimizer steps most elements of a published bf16 state stay, and those that change mostly move
to the next code; so a delta holds the gaps between changes and the steps of the integer codes, modulo
2^bits, compressed. A tensor of which that would take more than its own bytes is sent whole. Steps cannot
be applied twice nor to another base: a delta names the checks of the states before and after, and both are
compared. A state's check is XXH3-128 over the layout and the segments' hashes: it guards against a
wrong base and against bugs, not against forgery; blobs are authenticated by their BLAKE3 elsewhere. Who
keeps the check from the last call (`describe_delta(...).new_check`) spares hashing the base again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from aspo.weights._delta_format import (
    MAX_ELEMENTS,
    MAX_NAME,
    MAX_TENSORS,
    SEGMENT_BYTES,
    WIDTHS,
    Bytes,
    DeltaError,
    Entry,
    Layout,
    Mode,
    Opened,
    Piece,
    is_dense,
    join_pieces,
    open_delta,
    parallel,
    seal,
    unpack_streams,
)
from aspo.weights._scan import BLOCK, add_changes, find_unsound, pack_changes

__all__ = [
    "Change",
    "DeltaError",
    "DeltaInfo",
    "TensorDelta",
    "apply_delta",
    "decode_delta",
    "describe_delta",
    "encode_delta",
    "merge_deltas",
    "state_check",
]

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DEFAULT_THREADS = min(8, _cores)
_CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in WIDTHS}
_UNPACK_AT_ONCE = 32  # segments

Codes = NDArray[Any]  # the bits of a tensor's elements, flat and unsigned
Tensors = Mapping[str, torch.Tensor]


class Change(NamedTuple):
    """What a delta did to one tensor: ascending flat positions and the new values there.

    `positions` None: the whole tensor was replaced, and `values` is the tensor itself.
    """

    positions: NDArray[np.int64] | None
    values: torch.Tensor


class TensorDelta(NamedTuple):
    """One tensor of a delta; `changed` of `size` elements (all of a merged delta's raw tensor)."""

    mode: Mode
    changed: int
    size: int


class DeltaInfo(NamedTuple):
    """What a delta's header says; checks as `state_check` gives them, counts in elements."""

    base_check: str
    new_check: str
    changed: int
    size: int
    tensors: dict[str, TensorDelta]


class _Segment(NamedTuple):
    """Elements `first` to `stop` of a tensor, which one thread works on while they are in its cache."""

    tensor: int
    first: int
    stop: int


class _State(NamedTuple):
    """Tensors as flat codes in the order of their names, cut in segments."""

    layouts: list[Layout]
    codes: list[Codes]
    segments: list[_Segment]


class _Changes(NamedTuple):
    """A delta's streams, found sound; all sparse tensors one after another."""

    gaps: Bytes
    steps: Bytes
    planes: Bytes
    spans: dict[int, list[int]]  # segment of the state -> begin and end in changes, gaps, planes and steps
    begins: dict[int, int]  # tensor -> its first change

    def add(
        self, segment: int, first: int, codes: Codes, positions: NDArray[np.int64], values: Codes
    ) -> None:
        """Add a segment's steps to its codes, of which the first is element `first` of the tensor."""
        _, _, gap, last_gap, escape, last_escape, step, last_step = self.spans[segment]
        gaps, steps = self.gaps[gap:last_gap], self.steps[step:last_step]
        add_changes(codes, first, gaps, steps, self.planes[:, escape:last_escape], positions, values)


def encode_delta(
    base: Tensors, new: Tensors, *, base_check: str | None = None, threads: int = DEFAULT_THREADS
) -> bytes:
    """Write what turns `base` into `new`; raises `DeltaError` if names, dtypes or shapes differ.

    `base_check` is the base's `state_check` where it is known; the base is not hashed then.
    """
    old, young = _read_state(base), _read_state(new)
    _match(old.layouts, young.layouts)
    count = len(old.segments)
    hashes: tuple[list[bytes], list[bytes]] = ([b""] * count, [b""] * count)
    pieces: list[Piece | None] = [None] * count

    def work(indexes: Iterator[int]) -> None:
        scratch = _Scratch()
        for i in indexes:
            tensor, first, stop = old.segments[i]
            codes, new_codes = old.codes[tensor][first:stop], young.codes[tensor][first:stop]
            hashes[1][i] = xxhash.xxh3_128_digest(new_codes.data)
            if base_check is None:
                hashes[0][i] = xxhash.xxh3_128_digest(codes.data)
            pieces[i] = scratch.pack(codes, new_codes)

    parallel(work, count, threads)
    own = _by_tensor(len(old.codes), old.segments, pieces)
    whole = {i: codes for i, codes in enumerate(young.codes) if is_dense(own[i], codes.nbytes)}
    before = _combine(old.layouts, hashes[0]) if base_check is None else _check_bytes(base_check)
    return _assemble(old.layouts, own, whole, (before, _combine(young.layouts, hashes[1])), threads)


def decode_delta(base: Tensors, delta: bytes, *, threads: int = DEFAULT_THREADS) -> dict[str, torch.Tensor]:
    """Give the state that `delta` makes of `base`, in new tensors; raises `DeltaError` for any bad input."""
    source = _read_state(base)
    opened, changes = _prepare(source, delta, None, threads)
    new = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in base.items()}
    _write(_read_state(new), new, opened, changes, threads, source)
    return new


def apply_delta(
    state: Tensors,
    delta: bytes,
    *,
    checked_base: str | None = None,
    verify: bool = True,
    threads: int = DEFAULT_THREADS,
) -> dict[str, Change]:
    """Turn `state` into the new version in place; gives the tensors that changed.

    `checked_base` is the state's check where the caller knows it, so that it need not be hashed again. The
    result is hashed unless `verify` is False, as for all but the last of several deltas in a row. Tensors are
    contiguous and share no memory. Raises `DeltaError`: before anything is written, unless the text says that
    the state is ruined (a wrong `checked_base`, or a broken delta).
    """
    codes = _read_state(state, in_place=True)
    opened, changes = _prepare(codes, delta, checked_base, threads)
    return _write(codes, state, opened, changes, threads, verify=verify)


def merge_deltas(deltas: Sequence[bytes], *, threads: int = DEFAULT_THREADS) -> bytes:
    """Compose consecutive deltas to one; raises `DeltaError` if they do not follow one another.

    Memory is that of the changes. A merged sparse tensor stays sparse, however much of it has changed.
    """
    opened = [open_delta(delta, threads) for delta in deltas]
    if not opened:
        raise DeltaError("no deltas to merge")
    layouts = [entry.layout for entry in opened[0].header.tensors]
    for before, after in pairwise(opened):
        _match(layouts, [entry.layout for entry in after.header.tensors])
        if before.header.new_check != after.header.base_check:
            raise DeltaError("the deltas do not follow one another: one's base is not the former's result")
    return _merge(layouts, opened, threads)


def describe_delta(delta: bytes) -> DeltaInfo:
    """Read and validate a delta's header; raises `DeltaError`."""
    header = open_delta(delta).header
    tensors = {entry.name: TensorDelta(entry.mode, entry.changed, entry.size) for entry in header.tensors}
    return DeltaInfo(
        base_check=header.base_check.hex(),
        new_check=header.new_check.hex(),
        changed=sum(tensor.changed for tensor in tensors.values()),
        size=sum(tensor.size for tensor in tensors.values()),
        tensors=tensors,
    )


def state_check(tensors: Tensors, *, threads: int = DEFAULT_THREADS) -> str:
    """The check of names, dtypes, shapes and contents of a state, in hex; in any order of the names."""
    return _hash_state(_read_state(tensors), threads).hex()


class _Scratch:
    """One thread's buffers for the streams of a segment."""

    def __init__(self) -> None:
        mask = np.empty(BLOCK, np.uint8)
        hits, where = np.empty(BLOCK // 8 + 8, np.uint32), np.empty(BLOCK + 8, np.int64)
        self._search = mask, mask.view(np.uint64), hits, where
        self._gaps = np.empty(SEGMENT_BYTES + SEGMENT_BYTES // 255 + 1, np.uint8)
        self._steps = np.empty(SEGMENT_BYTES, np.uint8)
        self._planes = np.empty(SEGMENT_BYTES, np.uint8)

    def pack(self, before: Codes, after: Codes) -> Piece:
        """Scan one segment."""
        planes = self._planes[: before.nbytes].reshape(before.itemsize, before.size)
        counts = pack_changes(before, after, *self._search, self._gaps, self._steps, planes)
        changed, gap_bytes, escaped = counts
        gaps, steps = self._gaps[:gap_bytes].tobytes(), self._steps[: (changed + 1) // 2].tobytes()
        return Piece(counts, gaps, steps, planes[:, :escaped].copy())


def _read_state(tensors: Tensors, *, in_place: bool = False) -> _State:
    """View tensors as codes; in place, the codes are the tensors' own memory."""
    if len(tensors) > MAX_TENSORS or not all(isinstance(n, str) and 0 < len(n) <= MAX_NAME for n in tensors):
        raise DeltaError(
            f"a state has at most {MAX_TENSORS} tensors, with names of 1 to {MAX_NAME} characters"
        )
    names = sorted(tensors)
    codes = [_codes(name, tensors[name], in_place) for name in names]
    pointers = [tensors[name].data_ptr() for name in names if tensors[name].numel()]
    if in_place and len(set(pointers)) != len(pointers):
        raise DeltaError("tensors of the state share memory; give each once")
    layouts = [Layout(n, _DTYPE_NAMES[tensors[n].dtype], tuple(tensors[n].shape)) for n in names]
    return _State(layouts, codes, _segments([(array.size, array.itemsize) for array in codes]))


def _codes(name: str, tensor: torch.Tensor, in_place: bool) -> Codes:
    if tensor.dtype not in _DTYPE_NAMES:
        raise DeltaError(f"tensor {name} is {tensor.dtype}, which deltas do not know")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() > MAX_ELEMENTS:
        raise DeltaError(f"tensor {name} is no dense CPU tensor of at most {MAX_ELEMENTS} elements")
    width = tensor.element_size()
    if tensor.is_contiguous() and tensor.data_ptr() % width == 0:
        return tensor.detach().view(_UNSIGNED[width]).numpy().reshape(-1)
    if in_place:
        raise DeltaError(f"tensor {name} is not contiguous and aligned; a delta cannot be applied in place")
    return _codes(name, tensor.detach().clone(memory_format=torch.contiguous_format), False)


def _segments(tensors: Sequence[tuple[int, int]]) -> list[_Segment]:
    """Cut tensors of so many elements of so many bytes."""
    return [
        _Segment(i, first, min(first + SEGMENT_BYTES // width, size))
        for i, (size, width) in enumerate(tensors)
        for first in range(0, size, SEGMENT_BYTES // width)
    ]


def _match(expected: Sequence[Layout], found: Sequence[Layout]) -> None:
    for one, other in zip(expected, found, strict=False):
        if one != other:
            raise DeltaError(f"the states differ in layout: {one} against {other}")
    if len(expected) != len(found):
        raise DeltaError(f"one state has {len(expected)} tensors, the other {len(found)}")


def _hash_state(state: _State, threads: int) -> bytes:
    hashes = [b""] * len(state.segments)

    def work(indexes: Iterator[int]) -> None:
        for i in indexes:
            tensor, first, stop = state.segments[i]
            hashes[i] = xxhash.xxh3_128_digest(state.codes[tensor][first:stop].data)

    parallel(work, len(hashes), threads)
    return _combine(state.layouts, hashes)


def _combine(layouts: Sequence[Layout], hashes: Sequence[bytes]) -> bytes:
    try:
        names = msgspec.msgpack.encode(layouts)
    except UnicodeEncodeError as error:
        raise DeltaError(f"a tensor's name is no text: {error}") from None
    return xxhash.xxh3_128_digest(names + b"".join(hashes))


def _check_bytes(check: str) -> bytes:
    try:
        raw = bytes.fromhex(check)
    except (ValueError, TypeError):
        raw = b""
    if len(raw) != 16:
        raise DeltaError(f"{check!r} is not a state's check")
    return raw


def _assemble(
    layouts: Sequence[Layout],
    pieces: Sequence[Sequence[Piece]],
    whole: Mapping[int, Codes],
    checks: tuple[bytes, bytes],
    threads: int,
) -> bytes:
    """Write a delta of each tensor's pieces, or of its codes where `whole` has them."""
    entries: list[Entry] = []
    for i, layout in enumerate(layouts):
        changed = (
            sum(piece.counts[0] for piece in pieces[i]) if pieces[i] or i not in whole else whole[i].size
        )
        mode: Mode = "raw" if i in whole else "sparse" if changed else "same"
        entries.append(Entry(*layout, mode, changed))
    kept = [piece for i, entry in enumerate(entries) if entry.mode == "sparse" for piece in pieces[i]]
    return seal(*checks, entries, join_pieces(kept), [whole[i] for i in sorted(whole)], threads)


def _by_tensor(count: int, segments: Sequence[_Segment], pieces: Sequence[Piece | None]) -> list[list[Piece]]:
    grouped: list[list[Piece]] = [[] for _ in range(count)]
    for segment, piece in zip(segments, pieces, strict=True):
        if piece is not None:
            grouped[segment.tensor].append(piece)
    return grouped


def _prepare(state: _State, delta: bytes, checked_base: str | None, threads: int) -> tuple[Opened, _Changes]:
    """Validate all there is to a delta for a state, but its result."""
    opened = open_delta(delta, threads)
    _match(state.layouts, [entry.layout for entry in opened.header.tensors])
    found = _hash_state(state, threads) if checked_base is None else _check_bytes(checked_base)
    if found != opened.header.base_check:
        raise DeltaError(f"the delta is for the base {opened.header.base_check.hex()}; this is {found.hex()}")
    return opened, _unpack(opened, state.segments, threads)


def _unpack(opened: Opened, segments: Sequence[_Segment], threads: int) -> _Changes:
    """Read a delta's streams; raises `DeltaError` unless every position lies in its segment."""
    entries = opened.header.tensors
    sparse = [i for i, segment in enumerate(segments) if entries[segment.tensor].mode == "sparse"]
    (table_bytes,) = unpack_streams(opened.frames[:1], [12 * len(sparse)], threads)
    table = np.ascontiguousarray(table_bytes.reshape(3, 4, -1).transpose(2, 0, 1)).view("<u4")[:, :, 0]
    counts = np.concatenate((table, (table[:, :1] + 1) // 2), axis=1, dtype=np.int64)
    owners, firsts, stops = np.array([segments[i] for i in sparse], np.int64).reshape(-1, 3).T
    lengths = stops - firsts
    _check_counts(entries, counts, owners, lengths)
    ends = counts.cumsum(axis=0)
    _, gap_bytes, escaped, step_bytes = counts.sum(axis=0).tolist()
    sizes = [gap_bytes, step_bytes] + [escaped] * (len(opened.frames) - 3)
    gaps, steps, *planes = unpack_streams(opened.frames[1:], sizes, threads)
    stacked = np.stack(planes) if planes else np.empty((0, 0), np.uint8)
    bad = [-1] * (len(sparse) // _UNPACK_AT_ONCE + 1)

    def work(indexes: Iterator[int]) -> None:
        for i in indexes:
            start, stop = i * _UNPACK_AT_ONCE, min((i + 1) * _UNPACK_AT_ONCE, len(sparse))
            bad[i] = find_unsound(start, stop, lengths, counts, ends, gaps, steps)

    parallel(work, len(bad), threads)
    if max(bad) >= 0:
        raise DeltaError(f"the gaps or steps of segment {max(bad)} do not fit its counts or its length")
    spans = np.stack((ends - counts, ends), axis=2).reshape(-1, 8).tolist()
    begins = dict(zip(owners[::-1].tolist(), [span[0] for span in spans[::-1]], strict=True))
    return _Changes(gaps, steps, stacked, dict(zip(sparse, spans, strict=True)), begins)


def _check_counts(
    entries: Sequence[Entry],
    counts: NDArray[np.int64],
    owners: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> None:
    changed, gap_bytes, escaped, _ = counts.T
    most = changed + lengths // 255
    if (changed > lengths).any() or (gap_bytes > most).any() or (escaped > changed).any():
        raise DeltaError("a segment's counts are larger than the segment")
    totals = np.zeros(len(entries), np.int64)
    np.add.at(totals, owners, changed)
    if totals.tolist() != [entry.changed if entry.mode == "sparse" else 0 for entry in entries]:
        raise DeltaError("the segments' counts of changes are not those of their tensors")


def _write(
    state: _State,
    tensors: Tensors,
    opened: Opened,
    changes: _Changes,
    threads: int,
    source: _State | None = None,
    *,
    verify: bool = True,
) -> dict[str, Change]:
    """Write a validated delta to `state`, or onto a copy of `source` there, and verify the result.

    Each segment is hashed while it is in the cache.
    """
    entries = opened.header.tensors
    positions = {i: np.empty(entries[i].changed, np.int64) for i in changes.begins}
    values = {i: np.empty(entries[i].changed, state.codes[i].dtype) for i in changes.begins}
    hashes = [b""] * len(state.segments)

    def work(indexes: Iterator[int]) -> None:
        for i in indexes:
            tensor, first, stop = state.segments[i]
            codes = state.codes[tensor][first:stop]
            if source is not None:
                codes[:] = source.codes[tensor][first:stop]
            if tensor in values:
                skipped = changes.spans[i][0] - changes.begins[tensor]
                changes.add(i, first, codes, positions[tensor][skipped:], values[tensor][skipped:])
            elif entries[tensor].mode == "raw":
                codes[:] = np.frombuffer(opened.raw[entries[tensor].name], codes.dtype)[first:stop]
            if verify:
                hashes[i] = xxhash.xxh3_128_digest(codes.data)

    parallel(work, len(hashes), threads)
    found = _combine(state.layouts, hashes) if verify else opened.header.new_check
    if found != opened.header.new_check:
        raise DeltaError(
            f"the delta made {found.hex()}, not {opened.header.new_check.hex()}; the state is ruined"
        )
    result: dict[str, Change] = {}
    for i, entry in enumerate(entries):
        if i in values:
            tensor = torch.from_numpy(values[i]).view(tensors[entry.name].dtype)
            result[entry.name] = Change(positions[i], tensor)
        elif entry.mode == "raw":
            result[entry.name] = Change(None, tensors[entry.name])
    return result


def _merge(layouts: Sequence[Layout], opened: Sequence[Opened], threads: int) -> bytes:
    """Replay deltas segment by segment on zeros, or on a tensor's last whole copy, and scan the sum."""
    widths = [WIDTHS[layout.dtype] for layout in layouts]
    segments = _segments([(entry.size, entry.width) for entry in opened[0].header.tensors])
    changes = [_unpack(delta, segments, threads) for delta in opened]
    whole: dict[int, Codes] = {}
    begin = [0] * len(layouts)  # the first delta that counts
    for number, delta in enumerate(opened, 1):
        for i, layout in enumerate(layouts):
            if layout.name in delta.raw:
                whole[i] = np.frombuffer(delta.raw[layout.name], _CODES[widths[i]]).copy()
                begin[i] = number
    pieces: list[Piece | None] = [None] * len(segments)

    def work(indexes: Iterator[int]) -> None:
        scratch = _Scratch()
        for i in indexes:
            tensor, first, stop = segments[i]
            unused = np.empty(stop - first, np.int64), np.empty(stop - first, _CODES[widths[tensor]])
            zeros = np.zeros(stop - first, _CODES[widths[tensor]])
            codes = whole[tensor][first:stop] if tensor in whole else zeros.copy()
            for change in changes[begin[tensor] :]:
                if i in change.spans:
                    change.add(i, first, codes, *unused)
            if tensor not in whole:
                pieces[i] = scratch.pack(zeros, codes)

    parallel(work, len(segments), threads)
    checks = opened[0].header.base_check, opened[-1].header.new_check
    return _assemble(layouts, _by_tensor(len(layouts), segments, pieces), whole, checks, threads)
