"""The bytes of a weight delta: header, compressed streams, raw tensors; trusts nothing that it reads.

    magic, schema version, digest | sizes of the header, header | frames of the streams | raw tensors

The digest is the first 16 bytes of the BLAKE3 of all that follows it. The header names every tensor, in the
order of the names. Tensors are cut in segments of SEGMENT_BYTES; the streams run over all segments of all
sparse tensors, so that small tensors cost no frames of their own:

- table: per segment the counts of changes, gap bytes and escaped steps; uint32, by byte planes
- gaps: per change the equal elements before it in the segment; 255 is "go on 255 further"
- steps: per change the modular difference of the integer codes in zigzag order, two in a byte (low half
  first, each segment in whole bytes); 15 is "see the planes"
- plane 0, 1, ...: the escaped steps' bytes, least significant first, as many as the widest sparse tensor has

A stream is cut in chunks of CHUNK bytes, each a zstd frame; so no size has to be declared but the frames'.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import zstandard
from blake3 import blake3
from msgspec import Meta
from numpy.typing import NDArray

from aspo.weights.manifest import WeightsError

SCHEMA_VERSION = 1
SEGMENT_BYTES = 2**19  # of both states fit in a core's L2 cache
CHUNK = 2**20
MAX_TENSORS = 2**20
MAX_ELEMENTS = 2**40  # of a whole state
MAX_NAME = 512
WIDTHS = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
}

_MAGIC = b"ASPd"
_PREFIX = struct.Struct("<4sI16s")  # magic, schema version, digest
_SIZES = struct.Struct("<II")  # stored and unpacked bytes of the header; equal if it is not compressed
_MAX_HEADER_RATIO = 64  # beyond it a header is stored as it is: a few bytes must not unpack to many
_WORTH = 0.98  # of the bytes of a tensor sent whole; closer to it, the estimate may err
_MAX_FRAME = CHUNK + CHUNK // 64

Bytes = NDArray[np.uint8]
Check = Annotated[bytes, Meta(min_length=16, max_length=16)]
Mode = Literal["same", "sparse", "raw"]
_Size = Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)]
_FrameSize = Annotated[int, Meta(ge=1, le=_MAX_FRAME)]


class DeltaError(WeightsError):
    """A delta cannot be made, read or applied; the text says why. Take a snapshot instead."""


class Layout(NamedTuple):
    """What two states must share to differ by a delta."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a delta; `changed` counts elements (in a merged delta's raw tensor: all of them)."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[_Size, ...], Meta(max_length=64)]
    mode: Mode
    changed: _Size

    @property
    def layout(self) -> Layout:
        return Layout(self.name, self.dtype, self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return WIDTHS[self.dtype]


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Checks of the states before and after, the tensors, and the stored sizes of each stream's frames."""

    base_check: Check
    new_check: Check
    tensors: Annotated[tuple[Entry, ...], Meta(max_length=MAX_TENSORS)]
    streams: Annotated[tuple[tuple[_FrameSize, ...], ...], Meta(max_length=11)]


class Piece(NamedTuple):
    """What one segment adds to the streams."""

    counts: tuple[int, int, int]  # changes, gap bytes, escaped steps
    gaps: bytes
    steps: bytes
    planes: Bytes  # [width, escaped]


class Opened(NamedTuple):
    """A delta whose digest and header hold; `frames` per stream and `raw` per name are views of its bytes."""

    header: Header
    frames: list[list[memoryview]]
    raw: dict[str, memoryview]


# Only the frequencies of the streams' bytes say anything: chance matches would cost time, and space.
_ENTROPY_ONLY = zstandard.ZstdCompressionParameters(
    window_log=20, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_HEADER = msgspec.msgpack.Decoder(Header)


def seal(
    base_check: bytes,
    new_check: bytes,
    tensors: Sequence[Entry],
    streams: Sequence[bytes],
    raw: Sequence[NDArray[Any]],
    threads: int,
) -> bytes:
    """Write a delta; `raw` are the codes of the raw tensors in the header's order."""
    frames = _compress(streams, threads)
    sizes = tuple(tuple(map(len, stream)) for stream in frames)
    header = _pack_header(Header(base_check, new_check, tuple(tensors), sizes))
    body: list[Any] = [header, *itertools.chain(*frames), *(codes.data.cast("B") for codes in raw)]
    digest = blake3(max_threads=threads)
    for part in body:
        digest.update(part)
    return b"".join([_PREFIX.pack(_MAGIC, SCHEMA_VERSION, digest.digest(length=16)), *body])


def open_delta(delta: bytes | memoryview, threads: int = 1) -> Opened:
    """Read all of a delta but its streams; raises `DeltaError` and nothing else, whatever the bytes."""
    try:
        view = memoryview(delta).cast("B")
    except TypeError as error:
        raise DeltaError(f"a delta is bytes, not {type(delta).__name__}: {error}") from None
    if len(view) < _PREFIX.size + _SIZES.size:
        raise DeltaError(f"{len(view)} bytes are too few for a delta")
    magic, version, digest = _PREFIX.unpack_from(view)
    if magic != _MAGIC or version != SCHEMA_VERSION:
        raise DeltaError(
            f"not a delta of schema version {SCHEMA_VERSION}: it begins with {magic!r}, {version}"
        )
    body = view[_PREFIX.size :]
    if blake3(body, max_threads=threads).digest(length=16) != digest:
        raise DeltaError("the delta does not match its digest; it was altered or cut")
    header, body = _unpack_header(body)
    _check_entries(header.tensors)
    raw = {entry.name: entry.size * entry.width for entry in header.tensors if entry.mode == "raw"}
    planes = max((entry.width for entry in header.tensors if entry.mode == "sparse"), default=0)
    stored = sum(map(sum, header.streams)) + sum(raw.values())
    if len(header.streams) != 3 + planes or stored != len(body):
        raise DeltaError(f"the delta has {len(body)} bytes after its header, which declares {stored}")
    pieces = _split(body)
    frames = [[next_piece(size) for size in stream] for stream in header.streams for next_piece in (pieces,)]
    return Opened(header, frames, {name: pieces(size) for name, size in raw.items()})


def unpack_streams(frames: Sequence[Sequence[memoryview]], sizes: Sequence[int], threads: int) -> list[Bytes]:
    """Decompress whole streams of known sizes; nothing is allocated before every frame declares its due."""
    chunks = [_chunk_sizes(size) for size in sizes]
    for stream, due in zip(frames, chunks, strict=True):
        if len(stream) != len(due):
            raise DeltaError(f"a stream has {len(stream)} frames; its counts call for {len(due)}")
        for frame, size in zip(stream, due, strict=True):
            _check_frame(frame, size)
    jobs = [frame for stream in frames for frame in stream]
    parts: list[bytes] = [b""] * len(jobs)

    def work(indexes: Iterator[int]) -> None:
        for i in indexes:
            parts[i] = _decompress(jobs[i])

    parallel(work, len(jobs), threads)
    rest = iter(parts)
    return [np.frombuffer(b"".join(itertools.islice(rest, len(due))), np.uint8) for due in chunks]


def join_pieces(pieces: Sequence[Piece]) -> list[bytes]:
    """The streams of segments."""
    counts = np.array([piece.counts for piece in pieces], "<u4").reshape(-1, 3, 1)
    table = counts.view(np.uint8).transpose(1, 2, 0).tobytes()
    width = max((len(piece.planes) for piece in pieces), default=0)
    planes = [b"".join(_plane(piece, k) for piece in pieces) for k in range(width)]
    gaps, steps = b"".join(piece.gaps for piece in pieces), b"".join(piece.steps for piece in pieces)
    return [table, gaps, steps, *planes]


def _plane(piece: Piece, k: int) -> bytes:
    return piece.planes[k].tobytes() if k < len(piece.planes) else bytes(piece.counts[2])


def is_dense(pieces: Sequence[Piece], nbytes: int) -> bool:
    """Whether a tensor's streams would take more than its own bytes, by the entropy of their bytes."""
    plain = sum(len(piece.gaps) + len(piece.steps) + piece.planes.nbytes for piece in pieces)
    if 4 * plain <= nbytes:
        return False
    return sum(map(_entropy_bytes, join_pieces(pieces)[1:])) > _WORTH * nbytes


def _entropy_bytes(stream: bytes) -> float:
    counts = np.bincount(np.frombuffer(stream, np.uint8), minlength=256)
    share = counts[counts > 0] / max(len(stream), 1)
    return float(-(share * np.log2(share)).sum() * len(stream) / 8)


def parallel(work: Callable[[Iterator[int]], None], count: int, threads: int) -> None:
    """Have each thread run `work` on the indexes that it draws from one iterator over range(count)."""
    indexes = iter(range(count))
    threads = min(threads, count)
    if threads <= 1:
        work(indexes)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, indexes) for _ in range(threads)]:
            done.result()


def _compress(streams: Sequence[bytes], threads: int) -> list[list[bytes]]:
    jobs = [(i, at) for i, stream in enumerate(streams) for at in range(0, len(stream), CHUNK)]
    frames: list[bytes] = [b""] * len(jobs)

    def work(indexes: Iterator[int]) -> None:
        compressor = zstandard.ZstdCompressor(compression_params=_ENTROPY_ONLY)
        for job in indexes:
            i, at = jobs[job]
            frames[job] = compressor.compress(memoryview(streams[i])[at : at + CHUNK])

    parallel(work, len(jobs), threads)
    rest = iter(frames)
    return [list(itertools.islice(rest, len(_chunk_sizes(len(stream))))) for stream in streams]


def _chunk_sizes(size: int) -> list[int]:
    return [min(CHUNK, size - at) for at in range(0, size, CHUNK)]


def _check_frame(frame: memoryview, size: int) -> None:
    try:
        declared = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise DeltaError(f"a stream is not zstd: {error}") from None
    if declared.content_size != size or declared.window_size > max(size, 1024) or declared.dict_id:
        raise DeltaError(f"a frame declares {declared.content_size} bytes; {size} are due")


def _decompress(frame: memoryview) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DeltaError(f"a frame does not decompress: {error}") from None


def _pack_header(header: Header) -> bytes:
    try:
        plain = msgspec.msgpack.encode(header)
    except UnicodeEncodeError as error:
        raise DeltaError(f"a tensor's name is no text: {error}") from None
    packed = zstandard.ZstdCompressor(level=9).compress(plain)
    if not len(plain) / _MAX_HEADER_RATIO <= len(packed) < len(plain):
        packed = plain
    return _SIZES.pack(len(packed), len(plain)) + packed


def _unpack_header(body: memoryview) -> tuple[Header, memoryview]:
    stored, size = _SIZES.unpack_from(body)
    packed, rest = body[_SIZES.size : _SIZES.size + stored], body[_SIZES.size + stored :]
    if len(packed) != stored or size > stored * _MAX_HEADER_RATIO:
        raise DeltaError(f"the header declares {stored} bytes that unpack to {size}; {len(packed)} are there")
    if stored != size:
        _check_frame(packed, size)
    try:
        header = _HEADER.decode(packed if stored == size else _decompress(packed))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DeltaError(f"not a delta's header: {str(error)[:200]}") from None
    return header, rest


def _check_entries(entries: Sequence[Entry]) -> None:
    if any(entry.dtype not in WIDTHS for entry in entries):
        raise DeltaError("the delta has a tensor of unknown dtype")
    if any(one.name >= other.name for one, other in itertools.pairwise(entries)):
        raise DeltaError("the delta's tensors are not in the order of their names")
    if sum(entry.size for entry in entries) > MAX_ELEMENTS:
        raise DeltaError(f"the delta declares more than {MAX_ELEMENTS} elements")
    for entry in entries:
        if entry.changed > entry.size or (entry.mode == "same") != (entry.changed == 0):
            raise DeltaError(f"{entry.changed} of {entry.size} elements cannot change in mode {entry.mode}")


def _split(view: memoryview) -> Callable[[int], memoryview]:
    """Give a function that cuts the next so many bytes off a view."""
    at = 0

    def cut(size: int) -> memoryview:
        nonlocal at
        at += size
        return view[at - size : at]

    return cut
