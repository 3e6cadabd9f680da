"""Tasks and rollouts on Redis Streams: delivered at least once, sent idempotently, never trimmed unused.

    tasks = TaskQueue(redis, "demo")                # learner: put; actor: claim, renew, finish or hand back
    tasks.put([task])
    [claim] = tasks.claim("actor-1", count=1)
    RolloutWriter(redis, "demo", "actor-1").put(claim.task.uid, payload)
    tasks.finish([claim])                           # only after the rollout is stored
    reader = RolloutReader(redis, "demo")           # learner: read, train, checkpoint, then
    reader.acknowledge(reader.read(count=64))       # acknowledge frees the memory

Stream ids are explicit, so that a retried XADD cannot add twice: a task's is its index, a rollout's is the
writer's incarnation and its own count, on a stream per actor. Consumers still dedupe by uid, for a task may
be done twice.
Only commands of Redis 6.2 are used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from aspo.codec import MAX_NAME, CodecError, decode_task, encode_task
from aspo.errors import AspoError
from aspo.fence import Fence
from aspo.schemas import Purpose, Task

GROUP = "aspo"
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
QUARANTINE_LENGTH = 1000  # the newest unusable rollouts, kept for inspection
REQUEUED = "_requeued"  # no actor's name: those begin with a letter or a digit
QUARANTINE_SAMPLE = 4096  # bytes kept of one that is too large
_STALE_ID = "equal or smaller"
_HANDED_BACK_MS = 10**9
OUTAGE_S = 120  # of Redis that a learner waits out


class QueueError(AspoError, RuntimeError):
    """Redis cannot be used as configured; the text says what to do."""


class QueueUnreachable(QueueError):
    """No Redis answers, or no longer: nobody's mistake for certain, so worth another start."""

    exit_code = 1


def connect(url: str, *, retries: int = 5, timeout_s: float = 10.0) -> redis.Redis:
    """Connect, riding out outages of about `retries` seconds; raises `QueueError` when there is no Redis.

    A Redis that is silent for `timeout_s` is given up, `retries` times more.
    """
    options: dict[str, Any] = {"protocol": 2, "health_check_interval": 30, "socket_timeout": timeout_s}
    if not url.startswith("unix:"):
        options |= {"socket_connect_timeout": min(5.0, timeout_s), "socket_keepalive": True}
    try:
        redis.Redis.from_url(url, retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 3), **options).ping()
        client = redis.Redis.from_url(
            url, retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries), **options
        )
    except ValueError as error:
        raise QueueError(f"redis.url {url_without_password(url)!r} is not a Redis URL: {error}") from None
    except redis.AuthenticationError as error:
        raise QueueError(f"Redis at {url_without_password(url)} refused the password: {error}") from None
    except (OSError, redis.RedisError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise QueueError(
                f"the certificate of Redis at {url_without_password(url)} is not trusted ({error}); "
                "set redis.tls_ca to the file of the CA that signed it"
            ) from None
        raise QueueUnreachable(
            f"no Redis at {url_without_password(url)} ({error}); start redis-server or set redis.url"
        ) from None
    return client


def group_is_lost(error: Exception) -> bool:
    """Whether a command failed because a stream or its group is gone: Redis has lost data."""
    return "NOGROUP" in str(error)


def refuses_writes(error: Exception) -> bool:
    """Whether a command failed because Redis takes no writes for now: memory or disk full, or a replica."""
    if isinstance(error, redis.OutOfMemoryError | redis.ReadOnlyError):
        return True
    return isinstance(error, redis.ResponseError) and "MISCONF" in str(error)


def fault_of(url: str, timeout_s: float = 0.5) -> str | None:
    """Say why a Redis does not answer within the time, None if it does; for probes."""
    options: dict[str, Any] = {"protocol": 2, "socket_timeout": timeout_s, "retry": None}
    try:
        with redis.Redis.from_url(url, **options) as client:
            client.ping()
    except redis.RedisError as error:
        return f"Redis does not answer: {error}"
    return None


def url_without_password(url: str) -> str:
    """Hide the password of a Redis URL, for messages."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{'***@' if at and credentials else ''}{host.partition('?')[0]}"


@dataclass(frozen=True, slots=True)
class Claim:
    """A task that this actor holds until it finishes it, hands it back or its lease runs out."""

    task: Task
    stream: bytes
    entry_id: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """One stored rollout payload, pending until it is acknowledged; `uid` is what its writer calls it.

    `stamp` says what the writer scored by, see `Hello.stamp`; empty where it does not say.
    """

    uid: str
    payload: bytes
    stream: bytes
    entry_id: bytes
    stamp: str = ""

    @property
    def actor(self) -> str:
        """Whose stream it came by."""
        return _actor_of(self.stream)


class TaskQueue:
    """The learner's requests for rollouts; evaluation tasks go first. `fence` is the learner's."""

    def __init__(
        self, client: redis.Redis, run: str, *, lease_s: float = 120.0, fence: Fence | None = None
    ) -> None:
        self._redis, self._fence = client, fence
        self._lease_ms = int(lease_s * 1000)
        self._streams = {purpose: f"aspo:{run}:tasks:{purpose}".encode() for purpose in PURPOSES}
        for stream in self._streams.values():
            _ensure_group(client, stream)

    def reset(self, purpose: Purpose, tasks: Sequence[Task] = (), *, next_index: int = 0) -> None:
        """Put these tasks in the place of all of a purpose; the others below `next_index` have been put, too.

        For a learner that asks anew for what is still missing.
        """
        stream = self._streams[purpose]

        def commands(pipeline: Pipeline) -> None:
            pipeline.delete(stream)
            pipeline.xgroup_create(stream, GROUP, id="0", mkstream=True)
            for task in tasks:
                pipeline.xadd(*_entry(stream, task))
            if next_index > max((task.index + 1 for task in tasks), default=0):
                # An entry that comes and goes leaves its id as the stream's last.
                pipeline.xadd(stream, {"task": b""}, id=_task_id(next_index - 1))
                pipeline.xdel(stream, _task_id(next_index - 1))

        _execute(self._redis, self._fence, commands)

    def put(self, tasks: Iterable[Task]) -> None:
        """Store tasks in ascending index order; a task whose index is already stored is left as it is."""
        entries = [_entry(self._streams[task.purpose], task) for task in tasks]
        if not entries:
            return

        def commands(pipeline: Pipeline) -> None:
            for entry in entries:
                pipeline.xadd(*entry)

        for reply in _execute(self._redis, self._fence, commands, raise_on_error=False):
            if isinstance(reply, Exception) and _STALE_ID not in str(reply):
                raise reply

    def claim(self, consumer: str, *, count: int, block_ms: int | None = None) -> list[Claim]:
        """Take up to `count` tasks, abandoned ones first; waits `block_ms` when there are none.

        There are none either in a Redis that has lost them: until the learner asks for them again.
        """
        try:
            return self._claim(consumer, count, block_ms)
        except redis.ResponseError as error:
            if not group_is_lost(error):
                raise
        for stream in self._streams.values():
            _ensure_group(self._redis, stream)
        return []

    def _claim(self, consumer: str, count: int, block_ms: int | None) -> list[Claim]:
        claims: list[Claim] = []
        for purpose in reversed(PURPOSES):
            stream = self._streams[purpose]
            if len(claims) < count:
                reply = self._redis.xautoclaim(
                    stream, GROUP, consumer, min_idle_time=self._lease_ms, count=count - len(claims)
                )
                claims += self._decode(stream, reply[1])
            if len(claims) < count:
                claims += self._read([stream], consumer, count - len(claims), None)
        if not claims and block_ms is not None:
            claims = self._read(list(self._streams.values()), consumer, count, block_ms)
        return claims

    def renew(self, consumer: str, claims: Sequence[Claim]) -> None:
        """Restart the lease of tasks still being worked on."""
        self._reclaim(consumer, claims, idle_ms=0)

    def hand_back(self, consumer: str, claims: Sequence[Claim]) -> None:
        """Let another actor take these tasks at once."""
        self._reclaim(consumer, claims, idle_ms=_HANDED_BACK_MS)

    def finish(self, claims: Iterable[Claim]) -> None:
        """Acknowledge tasks whose rollouts are stored, and free them."""
        _acknowledge(self._redis, ((claim.stream, claim.entry_id) for claim in claims))

    def next_index(self, purpose: Purpose) -> int:
        """The lowest index above those of all tasks put."""
        last = self._redis.xinfo_stream(self._streams[purpose])["last-generated-id"]
        return int(last.decode().partition("-")[2])

    def depth(self) -> dict[str, int]:
        """Count the tasks waiting or being worked on, by purpose."""
        return {purpose: int(self._redis.xlen(stream)) for purpose, stream in self._streams.items()}

    def _read(self, streams: list[bytes], consumer: str, count: int, block_ms: int | None) -> list[Claim]:
        reply = self._redis.xreadgroup(
            GROUP, consumer, dict.fromkeys(streams, ">"), count=count, block=block_ms
        )
        return [claim for stream, entries in reply or [] for claim in self._decode(stream, entries)]

    def _decode(self, stream: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Claim]:
        claims = []
        for entry_id, fields in entries:
            try:
                claims.append(Claim(decode_task(fields[b"task"]), stream, entry_id))
            except (CodecError, KeyError, TypeError):
                # Only the learner writes here: an entry that is no task can never be done, by anyone.
                _acknowledge(self._redis, [(stream, entry_id)])
        return claims

    def _reclaim(self, consumer: str, claims: Sequence[Claim], *, idle_ms: int) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for claim in claims:
            pipeline.xclaim(claim.stream, GROUP, consumer, 0, [claim.entry_id], idle=idle_ms, justid=True)
        pipeline.execute()


def _entry(stream: bytes, task: Task) -> tuple[bytes, dict[str, bytes], str]:
    return stream, {"task": encode_task(task)}, _task_id(task.index)


def _task_id(index: int) -> str:
    return f"0-{index + 1}"


def rollout_keys(run: str, actor: str) -> tuple[str, str]:
    """The set of all rollout streams, and an actor's own, or that of `REQUEUED`."""
    return f"aspo:{run}:rollout-streams", f"aspo:{run}:rollouts:{actor}"


class RolloutWriter:
    """One actor incarnation's stream of rollouts; not thread-safe, for its ids must be sent in order."""

    def __init__(self, client: redis.Redis, run: str, actor: str, *, stamp: str = "") -> None:
        self._redis, self._stamp = client, stamp
        self._counter = f"aspo:{run}:incarnation"
        self._registry, self._stream = rollout_keys(run, actor)
        self._incarnation, self._sent = self._new_incarnation(), 0

    def put(self, uid: str, payload: bytes) -> None:
        """Store one encoded rollout group; sending it again after a lost reply adds nothing."""
        self._sent += 1
        while not self._store(uid, payload):
            # Another actor writes under our name, with higher ids: only a new incarnation can be stored.
            self._incarnation, self._sent = self._new_incarnation(), 1

    def _new_incarnation(self) -> int:
        return int(self._redis.incr(self._counter))

    def _store(self, uid: str, payload: bytes) -> bool:
        """Add the entry; False if its id is spent on another."""
        entry_id = f"{self._incarnation}-{self._sent}"
        fields: Any = {"uid": uid, "group": payload, "stamp": self._stamp}
        try:
            if self._redis.xadd(self._stream, fields, id=entry_id, nomkstream=True) is None:
                self._begin_stream(fields, entry_id)
        except redis.ResponseError as error:
            if _STALE_ID not in str(error):
                raise
            return bool(self._redis.xrange(self._stream, entry_id, entry_id))
        return True

    def _begin_stream(self, fields: Any, entry_id: str) -> None:
        """Register the stream with its first entry, all or none: the learner may be about to forget it."""
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.sadd(self._registry, self._stream)
            pipeline.xadd(self._stream, fields, id=entry_id)
            pipeline.execute()


class RolloutReader:
    """The learner's view of every actor's stream; what it reads stays pending until acknowledged."""

    def __init__(
        self, client: redis.Redis, run: str, *, consumer: str = "learner", fence: Fence | None = None
    ) -> None:
        self._redis, self._fence = client, fence
        self._unretried = _without_retries(client)
        self._consumer = consumer
        self._registry, _ = rollout_keys(run, "")
        self._quarantine = f"aspo:{run}:quarantine"
        self._replay: dict[bytes, bytes] = {}
        self._known: list[bytes] = []

    def read(self, *, count: int, block_ms: int | None = None) -> list[Delivery]:
        """Return up to `count` rollouts per stream, first those that a former learner left pending."""
        self._discover()
        while self._replay:
            if replayed := self._read_pending(count):
                return replayed
        if not self._known:
            return []
        try:
            reply = self._unretried.xreadgroup(
                GROUP, self._consumer, dict.fromkeys(self._known, ">"), count=count, block=block_ms
            )
        except (redis.ConnectionError, redis.TimeoutError):
            self.replay()  # what a lost reply held is no longer new
            return []
        return [delivery for stream, entries in reply or [] for delivery in _deliveries(stream, entries)]

    def replay(self) -> None:
        """Have `read` return everything unacknowledged again: a reply may have been lost on its way here."""
        self._replay = dict.fromkeys(self._known, b"0")

    def forget_all(self) -> None:
        """Know no stream any more, for Redis has lost them; `read` finds those that come anew."""
        self._known, self._replay = [], {}

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Give up rollouts that a durable checkpoint covers, and free them."""
        entries = ((delivery.stream, delivery.entry_id) for delivery in deliveries)
        _acknowledge(self._redis, entries, self._fence)

    def quarantine(self, delivery: Delivery, reason: str, *, max_bytes: int) -> None:
        """Keep a copy of a rollout that cannot be used, with the reason; it still is to be acknowledged.

        Of a payload beyond `max_bytes` only the beginning and the size are kept.
        """
        entry: dict[str, Any] = {"reason": reason, "uid": delivery.uid[:MAX_NAME], "actor": delivery.actor}
        if len(delivery.payload) > max_bytes:
            entry |= {"group": delivery.payload[:QUARANTINE_SAMPLE], "size": len(delivery.payload)}
        else:
            entry |= {"group": delivery.payload}

        def commands(pipeline: Pipeline) -> None:
            pipeline.xadd(self._quarantine, entry, maxlen=QUARANTINE_LENGTH, approximate=False)

        _execute(self._redis, self._fence, commands)

    def forget(self, alive: Collection[str]) -> int:
        """Delete the streams that hold nothing and whose actors are not `alive`; returns how many.

        An actor that stores a rollout all the same, at whatever moment, has its stream again.
        """
        absent = [stream for stream in self._known if _actor_of(stream) not in alive]
        return sum(self._forget(stream) for stream in absent)

    def _forget(self, stream: bytes) -> bool:
        def holds_nothing(pipeline: Pipeline) -> bool:
            pipeline.watch(stream)
            return int(pipeline.xlen(stream)) == 0

        def commands(pipeline: Pipeline) -> None:
            pipeline.delete(stream)
            pipeline.srem(self._registry, stream)

        if not _execute(self._redis, self._fence, commands, condition=holds_nothing):
            return False
        self._known.remove(stream)
        self._replay.pop(stream, None)
        return True

    @property
    def streams(self) -> int:
        """How many actors' streams are known."""
        return len(self._known)

    def depth(self) -> int:
        """Count the rollouts stored and not yet acknowledged."""
        return sum(int(self._redis.xlen(stream)) for stream in self._known)

    def _discover(self) -> None:
        # In order, so that one run of a learner is as the next.
        for stream in sorted(self._redis.smembers(self._registry).difference(self._known)):
            _ensure_group(self._redis, stream)
            self._known.append(stream)
            self._replay[stream] = b"0"

    def _read_pending(self, count: int) -> list[Delivery]:
        reply = self._redis.xreadgroup(GROUP, self._consumer, dict(self._replay), count=count)
        found = []
        for stream, entries in reply or []:
            if not entries:
                del self._replay[stream]
                continue
            self._replay[stream] = entries[-1][0]
            found += _deliveries(stream, entries)
        return found


def _deliveries(stream: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Delivery]:
    return [
        Delivery(
            fields.get(b"uid", b"").decode(errors="replace"),
            fields.get(b"group", b""),
            stream,
            entry_id,
            fields.get(b"stamp", b"").decode(errors="replace"),
        )
        for entry_id, fields in entries
    ]


def _actor_of(stream: bytes) -> str:
    return stream.rpartition(b":")[2].decode(errors="replace")


def _without_retries(client: redis.Redis) -> redis.Redis:
    """The same Redis for commands that must not be sent again unnoticed."""
    pool = client.connection_pool
    options = pool.connection_kwargs | {"retry": Retry(NoBackoff(), 0)}
    return redis.Redis.from_pool(redis.ConnectionPool(pool.connection_class, **options))  # closed with it


def _ensure_group(client: redis.Redis, stream: Any) -> None:
    try:
        client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def _execute(
    client: redis.Redis,
    fence: Fence | None,
    commands: Callable[[Pipeline], None],
    *,
    condition: Callable[[Pipeline], bool] | None = None,
    raise_on_error: bool = True,
) -> list[Any]:
    """Run the commands all or none, behind the learner's fence if there is one; see `Fence.execute`."""
    if fence is not None:
        return fence.execute(commands, condition=condition, raise_on_error=raise_on_error)
    with client.pipeline(transaction=True) as pipeline:
        if condition is not None and not condition(pipeline):
            return []
        pipeline.multi()
        commands(pipeline)
        replies: list[Any] = pipeline.execute(raise_on_error)
    return replies


def _acknowledge(
    client: redis.Redis, entries: Iterable[tuple[bytes, bytes]], fence: Fence | None = None
) -> None:
    """XACK alone frees no memory, so the entries are deleted in the same transaction."""
    by_stream: dict[bytes, list[bytes]] = {}
    for stream, entry_id in entries:
        by_stream.setdefault(stream, []).append(entry_id)
    if not by_stream:
        return

    def commands(pipeline: Pipeline) -> None:
        for stream, ids in by_stream.items():
            pipeline.xack(stream, GROUP, *ids)
            pipeline.xdel(stream, *ids)

    _execute(client, fence, commands)
