"""Who is alive: actors announce themselves in Redis with a time to live, so no clocks are compared."""

from __future__ import annotations

import logging
import threading
import time

import redis
from pydantic import BaseModel, ValidationError

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0


class ActorStatus(BaseModel):
    """What an actor says of itself; `GET /v1/status` of an actor, and its heartbeat."""

    id: str
    run: str
    url: str
    state: str
    version: str
    groups: int = 0
    groups_in_flight: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    weight_syncs: int = 0
    weight_patches: int = 0
    weight_repairs: int = 0
    weight_plan: str = ""
    weight_versions_behind: int = 0
    weight_bytes: int = 0
    weight_bytes_from_peers: int = 0
    weight_retries: int = 0
    weight_pull_seconds: float = 0.0
    weight_apply_seconds: float = 0.0
    weight_pause_seconds: float = 0.0
    reward_failures: int = 0
    environment_failures: int = 0


def announce(client: redis.Redis, status: ActorStatus, *, ttl_s: float) -> None:
    """Say that an actor is alive for the next `ttl_s` seconds."""
    pipeline = client.pipeline(transaction=False)
    pipeline.sadd(_members(status.run), status.id)
    pipeline.set(_key(status.run, status.id), status.model_dump_json(), px=int(ttl_s * 1000))
    pipeline.execute()


def withdraw(client: redis.Redis, run: str, actor: str) -> None:
    """Say that an actor has left."""
    client.delete(_key(run, actor))
    client.srem(_members(run), actor)


def present(client: redis.Redis, run: str) -> list[ActorStatus]:
    """The actors alive now, by id; forgets those that fell silent."""
    alive = []
    for actor in sorted(member.decode() for member in client.smembers(_members(run))):
        data = client.get(_key(run, actor))
        if data is None:
            client.srem(_members(run), actor)
            continue
        try:
            alive.append(ActorStatus.model_validate_json(data))
        except ValidationError:
            continue  # an actor of another release; its rollouts are judged by their own schema
    return alive


class Attendance:
    """A learner's eye on its actors: logs when none is left and when one comes; safe from any thread."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self._client, self._run = client, run
        self._lock = threading.Lock()
        self._looked = self._changed = time.monotonic()
        self._any: bool | None = None  # None: never seen

    def look(self) -> list[ActorStatus]:
        """The actors alive now; raises `redis.RedisError`."""
        actors = present(self._client, self._run)
        with self._lock:
            self._looked = time.monotonic()
            if bool(actors) != self._any:
                self._any, self._changed = bool(actors), self._looked
                if actors:
                    log.info("actor %s is here", actors[0].id)
                else:
                    log.warning("no actor is alive; waiting for one: start it with aspo actor --config FILE")
        return actors

    @property
    def due(self) -> bool:
        """Whether nobody has looked for a while."""
        return time.monotonic() > self._looked + LOOK_EVERY_S

    @property
    def absent_s(self) -> float | None:
        """For how many seconds no actor has been alive, as far as seen; None if there is one."""
        return time.monotonic() - self._changed if self._any is False else None


def _members(run: str) -> str:
    return f"aspo:{run}:actors"


def _key(run: str, actor: str) -> str:
    return f"aspo:{run}:actor:{actor}"
