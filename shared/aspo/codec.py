"""Puts tasks and rollout groups on the wire and takes them off again, trusting nothing that comes off.

    data = encode_group(group)          # actor
    group = decode_group(data)          # learner; CodecError for anything that is not a well-formed group
    reason = validate_group(group, vocab_size=V, max_tokens=T, max_prompt_tokens=P, current=version)

A frame is a header of 32 bytes (magic, schema version, payload length, digest; little-endian) and a payload
of msgpack, in which a group's arrays are raw little-endian buffers: about 8 bytes per token. The digest is
the first 16 bytes of BLAKE3: it answers to corruption, not to forgery (a forger would compute it too), and
128 bits are plenty. Sizes are checked before anything is allocated for them. Decoded arrays are aligned
read-only views of buffers copied out of the message, which may then go. The encoder reads back what it
wrote, so it never emits what the decoder refuses.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from blake3 import blake3
from msgspec import Meta
from numpy.typing import NDArray

from aspo.errors import AspoError
from aspo.schemas import SCHEMA_VERSION, FinishReason, PolicyVersion, Purpose, RolloutGroup, Task, VersionSpan

MAX_GROUP_BYTES = 64 * 2**20
MAX_TASK_BYTES = 4 * 2**20
MAX_SAMPLES = 1024
MAX_TOKENS = 2**22  # completion tokens of a group, and prompt tokens
MAX_SPANS = 256  # policy versions within one completion
MAX_TURNS = 128  # of the model, in one completion
MAX_PARTS = 64  # of a reward
MAX_NAME = 128  # characters of a uid or an actor's name
MAX_TEMPERATURE = 100.0
MIN_TRAIN_TEMPERATURE = 0.01  # vLLM samples colder requests at 0.01, or greedily
MAX_REWARD = 1e6  # beyond it, means and deviations lose their digits in fp32
LOGPROB_TOLERANCE = 1e-4  # engines round: a certain token may come with a log-prob just above 0

CodecFault = Literal[
    "too-large",  # more bytes than the reader takes
    "truncated",  # fewer bytes than the header declares
    "magic",  # not a frame of this kind
    "schema-version",  # a frame of another schema version
    "length",  # bytes after the frame, or buffers that do not fit together
    "digest",  # the payload is not the one that was sent
    "schema",  # the payload's fields are not the schema's
    "nesting",  # deeper than Python's recursion limit
    "utf8",
    "range",  # a number outside its bounds
    "policy-version",  # not run/epoch/step
]
Poison = Literal[
    "empty-prompt",
    "empty-completion",
    "too-long",
    "token-out-of-range",
    "nan-logprob",
    "positive-logprob",
    "bad-reward",
    "bad-temperature",
    "foreign-run",
    "future-version",
]

_T = TypeVar("_T")
_HEADER = struct.Struct("<4sIQ16s")
HEADER_BYTES = _HEADER.size
_GROUP_MAGIC = b"ASPg"
_TASK_MAGIC = b"ASPt"
_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")
_BOOL = np.dtype("?")

_Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
_PerSample1 = Annotated[bytes, Meta(max_length=MAX_SAMPLES)]
_PerSample4 = Annotated[bytes, Meta(max_length=4 * MAX_SAMPLES)]
_PerToken4 = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
_Spans = Annotated[tuple[VersionSpan, ...], Meta(max_length=MAX_SPANS)]
_Turns = Annotated[tuple[int, ...], Meta(max_length=2 * MAX_TURNS - 1)]


class CodecError(AspoError, ValueError):
    """A frame cannot be written or read; `code` is one of `CodecFault`, the text is for people."""

    def __init__(self, code: CodecFault, text: str) -> None:
        super().__init__(text)
        self.code: CodecFault = code


class _WireGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`RolloutGroup` with its arrays as raw little-endian bytes.

    Fields with a default came later: one that holds nothing is not written, so that older readers take it.
    """

    uid: _Name
    actor: _Name
    purpose: Purpose
    temperature: Annotated[float, Meta(ge=0.0, le=MAX_TEMPERATURE)]
    prompt_ids: _PerToken4
    lengths: _PerSample4
    token_ids: _PerToken4
    behavior_logprobs: _PerToken4
    rewards: _PerSample4
    failed: _PerSample1
    finish_reasons: Annotated[tuple[FinishReason, ...], Meta(max_length=MAX_SAMPLES)]
    spans: Annotated[tuple[_Spans, ...], Meta(max_length=MAX_SAMPLES)]
    reward_parts: Annotated[dict[_Name, _PerSample4], Meta(max_length=MAX_PARTS)] = {}
    turns: Annotated[tuple[_Turns, ...], Meta(max_length=MAX_SAMPLES)] = ()


_ENCODER = msgspec.msgpack.Encoder()
_GROUP_DECODER = msgspec.msgpack.Decoder(_WireGroup)
_TASK_DECODER = msgspec.msgpack.Decoder(Task)
_parse_version = lru_cache(maxsize=4096)(PolicyVersion.parse)


def encode_group(group: RolloutGroup) -> bytes:
    """Write one group as a frame; raises `CodecError` for a group that `decode_group` would refuse."""
    _check_schema_version(group.schema)
    wire = _WireGroup(
        uid=group.uid,
        actor=group.actor,
        purpose=group.purpose,
        temperature=group.temperature,
        prompt_ids=_raw("prompt_ids", group.prompt_ids, _INT32),
        lengths=_raw("lengths", group.lengths, _INT32),
        token_ids=_raw("token_ids", group.token_ids, _INT32),
        behavior_logprobs=_raw("behavior_logprobs", group.behavior_logprobs, _FLOAT32),
        rewards=_raw("rewards", group.rewards, _FLOAT32),
        failed=_raw("failed", group.failed, _BOOL),
        finish_reasons=group.finish_reasons,
        spans=group.spans,
        reward_parts={
            name: _raw("reward_parts", values, _FLOAT32) for name, values in group.reward_parts.items()
        },
        turns=group.turns,
    )
    payload = _pack(wire)
    _read_group(payload)
    return _seal(_GROUP_MAGIC, payload, MAX_GROUP_BYTES)


def decode_group(data: bytes | memoryview, *, max_bytes: int = MAX_GROUP_BYTES) -> RolloutGroup:
    """Read one frame of at most `max_bytes` bytes; raises `CodecError` and nothing else, whatever the bytes.

    The group is well-formed (shapes, lengths, spans, names); whether its numbers make sense, `validate_group`
    says. A memoryview is C-contiguous and of bytes.
    """
    return _read_group(_open(_GROUP_MAGIC, data, max_bytes))


def encode_task(task: Task) -> bytes:
    """Write one task as a frame; raises `CodecError` for a task that `decode_task` would refuse."""
    payload = _pack(task)
    _read_task(payload)
    return _seal(_TASK_MAGIC, payload, MAX_TASK_BYTES)


def decode_task(data: bytes | memoryview, *, max_bytes: int = MAX_TASK_BYTES) -> Task:
    """Read one frame of at most `max_bytes` bytes; raises `CodecError` and nothing else."""
    return _read_task(_open(_TASK_MAGIC, data, max_bytes))


def validate_group(
    group: RolloutGroup,
    *,
    vocab_size: int,
    max_tokens: int,
    max_prompt_tokens: int | None,
    current: PolicyVersion | None,
    max_environment_tokens: int = 0,
) -> Poison | None:
    """Say why a well-formed group must not be trained on, or None.

    `max_tokens` bounds what the model says in a completion, `max_environment_tokens` what an environment
    says in between, `max_prompt_tokens` the prompt; None is no bound. `current` is the newest version that
    was published; None leaves the versions unchecked. The group comes from `decode_group`.
    """
    if len(group.prompt_ids) == 0:
        return "empty-prompt"
    if group.lengths.min() == 0:
        return "empty-completion"
    said = group.model_lengths
    if said.max() > max_tokens or (group.lengths - said).max() > max_environment_tokens:
        return "too-long"
    if max_prompt_tokens is not None and len(group.prompt_ids) > max_prompt_tokens:
        return "too-long"
    if any(ids.min() < 0 or ids.max() >= vocab_size for ids in (group.prompt_ids, group.token_ids)):
        return "token-out-of-range"
    if not np.isfinite(group.behavior_logprobs).all():
        return "nan-logprob"
    if group.behavior_logprobs.max() > LOGPROB_TOLERANCE:
        return "positive-logprob"
    rewards = (group.rewards, *group.reward_parts.values())
    if not all((np.abs(values) <= MAX_REWARD).all() for values in rewards):  # NaN is not either
        return "bad-reward"
    if group.purpose == "train" and group.temperature < MIN_TRAIN_TEMPERATURE:
        return "bad-temperature"
    return None if current is None else _version_poison(group, current)


def _version_poison(group: RolloutGroup, current: PolicyVersion) -> Poison | None:
    versions = _versions(group)
    if any(version.run != current.run for version in versions):
        return "foreign-run"
    if max(versions) > current:
        return "future-version"
    return None


def _seal(magic: bytes, payload: bytes, max_bytes: int) -> bytes:
    size = _HEADER.size + len(payload)
    if size > max_bytes:
        raise CodecError("too-large", f"the message has {size} bytes; at most {max_bytes} are sent")
    return _HEADER.pack(magic, SCHEMA_VERSION, len(payload), blake3(payload).digest(length=16)) + payload


def _open(magic: bytes, data: bytes | memoryview, max_bytes: int) -> memoryview:
    """The payload of a frame whose header, length and digest hold; copies nothing."""
    if len(data) > max_bytes:
        raise CodecError("too-large", f"the message has {len(data)} bytes; at most {max_bytes} are taken")
    if len(data) < _HEADER.size:
        raise CodecError("truncated", f"{len(data)} bytes are fewer than a header's {_HEADER.size}")
    found, version, size, digest = _HEADER.unpack_from(data)
    if found != magic:
        raise CodecError("magic", f"the message begins with {found!r}, not {magic!r}")
    _check_schema_version(version)
    payload = memoryview(data)[_HEADER.size :]
    if len(payload) < size:
        raise CodecError("truncated", f"the header declares {size} bytes of payload, {len(payload)} came")
    if len(payload) > size:
        raise CodecError("length", f"{len(payload) - size} bytes follow the {size} that the header declares")
    if blake3(payload).digest(length=16) != digest:
        raise CodecError("digest", f"the payload of {size} bytes does not match its digest; it was altered")
    return payload


def _check_schema_version(version: int) -> None:
    if version != SCHEMA_VERSION:
        raise CodecError(
            "schema-version",
            f"the message has schema version {version}, this process reads {SCHEMA_VERSION}; "
            "run the same release of aspo on both sides",
        )


def _pack(value: msgspec.Struct) -> bytes:
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError as error:
        raise CodecError("utf8", _quote(error)) from error
    except RecursionError as error:
        raise CodecError("nesting", _quote(error)) from error
    except (TypeError, OverflowError) as error:
        raise CodecError("schema", _quote(error)) from error


def _unpack(decoder: msgspec.msgpack.Decoder[_T], payload: bytes | memoryview) -> _T:
    try:
        return decoder.decode(payload)
    except UnicodeDecodeError as error:
        raise CodecError("utf8", _quote(error)) from error
    except RecursionError as error:
        raise CodecError("nesting", _quote(error)) from error
    except msgspec.MsgspecError as error:
        raise CodecError("schema", _quote(error)) from error


def _quote(error: Exception) -> str:
    """An error's text, short and printable: it may repeat what a stranger wrote."""
    return str(error)[:200].encode("unicode_escape").decode()


def _raw(name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    if array.ndim != 1 or not np.can_cast(array.dtype, dtype, casting="equiv"):
        raise CodecError("schema", f"{name} is {array.dtype} of shape {array.shape}; it must be 1-D {dtype}")
    return array.astype(dtype, copy=False).tobytes()


def _view(name: str, raw: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(raw) % dtype.itemsize:
        raise CodecError("length", f"{name} has {len(raw)} bytes, which is no whole number of {dtype}")
    return np.frombuffer(raw, dtype)


def _read_group(payload: bytes | memoryview) -> RolloutGroup:
    wire = _unpack(_GROUP_DECODER, payload)
    if max(wire.failed, default=0) > 1:
        raise CodecError("range", "failed holds a byte that is neither 0 nor 1")
    group = RolloutGroup(
        uid=wire.uid,
        actor=wire.actor,
        purpose=wire.purpose,
        temperature=wire.temperature,
        prompt_ids=_view("prompt_ids", wire.prompt_ids, _INT32),
        lengths=_view("lengths", wire.lengths, _INT32),
        token_ids=_view("token_ids", wire.token_ids, _INT32),
        behavior_logprobs=_view("behavior_logprobs", wire.behavior_logprobs, _FLOAT32),
        rewards=_view("rewards", wire.rewards, _FLOAT32),
        failed=_view("failed", wire.failed, _BOOL),
        finish_reasons=wire.finish_reasons,
        spans=wire.spans,
        reward_parts={name: _view("reward_parts", raw, _FLOAT32) for name, raw in wire.reward_parts.items()},
        turns=wire.turns,
    )
    _check_lengths(group)
    _check_spans(group)
    _check_turns(group)
    return group


def _check_lengths(group: RolloutGroup) -> None:
    samples = len(group)
    if samples == 0:
        raise CodecError("range", "the group holds no samples; send nothing instead")
    if group.lengths.min() < 0:
        raise CodecError("range", f"a sample has {group.lengths.min()} tokens")
    tokens = int(group.lengths.sum(dtype=np.int64))
    for name, found, expected in (
        ("token_ids", len(group.token_ids), tokens),
        ("behavior_logprobs", len(group.behavior_logprobs), tokens),
        ("rewards", len(group.rewards), samples),
        ("failed", len(group.failed), samples),
        ("finish_reasons", len(group.finish_reasons), samples),
        ("spans", len(group.spans), samples),
        *(("reward_parts", len(values), samples) for values in group.reward_parts.values()),
    ):
        if found != expected:
            raise CodecError("length", f"{name} has {found} entries; the lengths call for {expected}")


def _check_spans(group: RolloutGroup) -> None:
    for sample, (length, spans) in enumerate(zip(group.lengths.tolist(), group.spans, strict=True)):
        lengths = [span.length for span in spans]
        if min(lengths, default=1) < 1:
            raise CodecError("range", f"sample {sample} has a span of {min(lengths)} tokens")
        if sum(lengths) != length:
            raise CodecError(
                "length", f"the spans of sample {sample} cover {sum(lengths)} of {length} tokens"
            )
    _versions(group)


def _check_turns(group: RolloutGroup) -> None:
    if not group.turns:
        return
    if len(group.turns) != len(group):
        raise CodecError("length", f"turns has {len(group.turns)} entries; there are {len(group)} samples")
    for sample, (length, turns) in enumerate(zip(group.lengths.tolist(), group.turns, strict=True)):
        if len(turns) % 2 == 0 or min(turns) < 1:
            raise CodecError(
                "range", f"the turns of sample {sample} do not begin and end with a token of the model's"
            )
        if sum(turns) != length:
            raise CodecError("length", f"the turns of sample {sample} cover {sum(turns)} of {length} tokens")


def _versions(group: RolloutGroup) -> list[PolicyVersion]:
    return [_version(text) for text in {span.version for spans in group.spans for span in spans}]


def _version(text: str) -> PolicyVersion:
    try:
        return _parse_version(text)
    except ValueError as error:
        raise CodecError("policy-version", _quote(error)) from error


def _read_task(payload: bytes | memoryview) -> Task:
    task = _unpack(_TASK_DECODER, payload)
    _check_schema_version(task.schema)
    for name, value, low, high in (
        ("the length of uid", len(task.uid), 1, MAX_NAME),
        ("index", task.index, 0, 2**63 - 1),
        ("the length of prompt_ids", len(task.prompt_ids), 1, MAX_TOKENS),
        ("the least of prompt_ids", min(task.prompt_ids, default=0), 0, 2**31 - 1),
        ("the greatest of prompt_ids", max(task.prompt_ids, default=0), 0, 2**31 - 1),
        ("group_size", task.group_size, 1, MAX_SAMPLES),
        ("max_tokens", task.max_tokens, 1, MAX_TOKENS),
        ("group_size * max_tokens", task.group_size * task.max_tokens, 1, MAX_TOKENS),
        ("temperature", task.temperature, 0.0, MAX_TEMPERATURE),
        ("seed", task.seed or 0, -(2**63), 2**63 - 1),
    ):
        if not low <= value <= high:
            raise CodecError("range", f"{name} is {value}; it must lie in {low}..{high}")
    if task.min_version is not None:
        _version(task.min_version)
    return task
