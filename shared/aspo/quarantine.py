"""The rollouts that a learner set aside as unusable: to be looked at, judged again, or forgotten.

    quarantine = Quarantine(redis, "demo")
    for entry in quarantine.entries(): print(entry.id, entry.reason)
    print(describe(quarantine.entry(entry.id)[1]))
    quarantine.requeue(entry.id)        # the learner judges it again, by its settings of today
    quarantine.purge(older_s=86400)

A task whose answer was set aside counts as ended, so that training goes on. The ledger remembers that it
ended untrained: a valid answer that comes later, requeued or from another actor, is trained then, once. No
other rule is lifted: what is too stale by then is dropped and counted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import redis

from aspo.codec import HEADER_BYTES, CodecError, decode_group
from aspo.errors import AspoError
from aspo.queue import REQUEUED, rollout_keys
from aspo.text import MAX_TEXT, printable

_PAGE = 4  # entries fetched at once: each may be as large as a rollout group
_SAMPLE = 16  # values shown of an array, and bytes of what is none
_FIELDS = 32
_ARRAYS = {
    "prompt_ids": "<i4",
    "lengths": "<i4",
    "token_ids": "<i4",
    "behavior_logprobs": "<f4",
    "rewards": "<f4",
    "failed": "?",
}
_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = MAX_TEXT


class QuarantineError(AspoError):
    """An entry cannot be had or requeued; the text says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One rollout set aside; `size` is the bytes that came, of which `whole` says whether all were kept.

    Its text is made printable, for a stranger wrote it.
    """

    id: str
    reason: str
    uid: str
    actor: str
    size: int
    whole: bool

    @property
    def kind(self) -> str:
        """The reason without its details, to count by."""
        return ":".join(self.reason.split(":")[:2]) if self.reason.startswith("undecodable") else self.reason

    def as_json(self) -> dict[str, Any]:
        """The entry as JSON data."""
        return asdict(self)


class Quarantine:
    """One run's quarantine in Redis."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self._redis, self._run = client, run
        self._stream = f"aspo:{run}:quarantine"

    def entries(self) -> Iterator[Entry]:
        """Give all entries, the newest first."""
        before = "+"
        while page := self._redis.xrevrange(self._stream, before, count=_PAGE):
            yield from (_entry(*found) for found in page)
            before = f"({page[-1][0].decode()}"

    def entry(self, entry_id: str) -> tuple[Entry, bytes]:
        """Give one entry and what was kept of its payload; raises `QuarantineError` if there is none."""
        found_id, fields = self._find(entry_id)
        return _entry(found_id, fields), fields.get(b"group", b"")

    def requeue(self, entry_id: str) -> None:
        """Move an entry back to the rollouts, in one step: it is never in neither place, nor in both."""
        registry, stream = rollout_keys(self._run, REQUEUED)

        def move(pipeline: Any) -> None:
            found_id, fields = self._find(entry_id)  # after WATCH: whoever moves it too makes EXEC fail
            if b"size" in fields:
                raise QuarantineError(f"{entry_id} was too large to be kept whole; it cannot be requeued")
            self._redis.xlen(stream)  # what is no stream fails here: EXEC undoes nothing
            pipeline.multi()
            pipeline.sadd(registry, stream)
            pipeline.xadd(stream, {name: fields.get(name, b"") for name in (b"uid", b"group")})
            pipeline.xdel(self._stream, found_id)  # an id may be given without its number

        self._redis.transaction(move, self._stream, stream)

    def purge(self, older_s: float | None = None) -> int:
        """Forget entries older than so many seconds by Redis' clock, all if None; returns how many."""
        if older_s is None:
            return int(self._redis.xtrim(self._stream, maxlen=0, approximate=False))
        seconds, microseconds = self._redis.time()
        oldest = int((seconds - older_s) * 1000) + microseconds // 1000
        return int(self._redis.xtrim(self._stream, minid=max(0, oldest), approximate=False))

    def _find(self, entry_id: str) -> tuple[bytes, dict[bytes, bytes]]:
        try:
            found = self._redis.xrange(self._stream, entry_id, entry_id)
        except redis.ResponseError:
            raise QuarantineError(
                f"{printable(entry_id)} is no entry's id; see `aspo quarantine ls`"
            ) from None
        if not found:
            raise QuarantineError(f"the quarantine of run {self._run} holds no {printable(entry_id)}")
        result: tuple[bytes, dict[bytes, bytes]] = found[0]
        return result


def describe(payload: bytes) -> dict[str, Any]:
    """What can be told of a payload: why it does not decode, and its fields as far as they do.

    JSON data whose text is printable; arrays are cut to their first values.
    """
    fault = None
    try:
        decode_group(payload, max_bytes=len(payload))
    except CodecError as error:
        fault = printable(f"{error.code}: {error}")
    return {"fault": fault, "begins_with": payload[:_SAMPLE].hex(" "), "fields": _fields(payload)}


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    def text(name: bytes) -> str:
        return printable(fields.get(name, b"").decode(errors="backslashreplace"))

    return Entry(
        id=entry_id.decode(),
        reason=text(b"reason"),
        uid=text(b"uid"),
        actor=text(b"actor"),
        size=int(fields.get(b"size", len(fields.get(b"group", b"")))),
        whole=b"size" not in fields,
    )


def _fields(payload: bytes) -> dict[str, Any]:
    """The fields of a payload that is msgpack, whatever they hold."""
    try:
        found = msgspec.msgpack.decode(payload[HEADER_BYTES:])
        known = list(found.items())[:_FIELDS] if isinstance(found, dict) else []
        return {printable(str(name)): _sample(name, value) for name, value in known}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}


def _sample(name: Any, value: Any) -> Any:
    if not isinstance(value, bytes) or name not in _ARRAYS:
        return value if isinstance(value, int) else printable(_REPR.repr(value))
    dtype = np.dtype(_ARRAYS[name])
    count = len(value) // dtype.itemsize
    values = np.frombuffer(value, dtype, min(count, _SAMPLE)).tolist()
    return f"{count} values: {', '.join(map(str, values))}{', …' if count > _SAMPLE else ''}"
