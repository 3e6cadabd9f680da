"""Who follows the weights: what each client runs, and where it serves blobs to others."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

from aspo.schemas import PolicyVersion

LEASE_S = 120.0
MAX_CLIENTS = 10_000


@dataclass(frozen=True, slots=True)
class Lease:
    """One client's last word: its role, the version it holds, and where it serves blobs, if it does."""

    role: str
    version: PolicyVersion | None
    url: str | None
    expires: float


class Leases:
    """Renewed with every poll and forgotten after `LEASE_S` seconds of silence; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}

    def renew(
        self, client: str, version: PolicyVersion | None, url: str | None = None, role: str = "actor"
    ) -> None:
        """Note that a client is there; beyond `MAX_CLIENTS` the one renewed longest ago is forgotten."""
        with self._lock:
            self._leases.pop(client, None)
            while len(self._leases) >= MAX_CLIENTS:
                self._leases.pop(next(iter(self._leases)))
            self._leases[client] = Lease(role, version, url, time.monotonic() + LEASE_S)

    def forget(self, client: str) -> None:
        """Take a client for gone until it asks again."""
        with self._lock:
            self._leases.pop(client, None)

    def versions(self) -> set[PolicyVersion]:
        """The versions that somebody runs."""
        return {lease.version for lease in self._alive().values() if lease.version is not None}

    def clients(self, role: str | None = None) -> dict[str, PolicyVersion | None]:
        """Every client, or those of one role, and what it holds."""
        alive = self._alive().items()
        return {client: lease.version for client, lease in alive if role in (None, lease.role)}

    def peers(self, version: PolicyVersion, asking: str | None, *, count: int = 3) -> tuple[str, ...]:
        """Some URLs of clients that have a version, the asking one left out."""
        found = [
            lease.url
            for client, lease in self._alive().items()
            if lease.url is not None and lease.version == version and client != asking
        ]
        return tuple(random.sample(found, min(count, len(found))))

    def _alive(self) -> dict[str, Lease]:
        now = time.monotonic()
        with self._lock:
            for client in [client for client, lease in self._leases.items() if lease.expires < now]:
                del self._leases[client]
            return dict(self._leases)
