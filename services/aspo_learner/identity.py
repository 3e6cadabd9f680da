"""Which run a name means: a folder and what Redis holds under its name must be of one life."""

from __future__ import annotations

import uuid
from pathlib import Path

import redis

from aspo.config import ConfigError
from aspo.weights.blobs import write_file


def claim_run(client: redis.Redis, run: str, folder: Path) -> None:
    """Tie a run's folder to its keys in Redis; raises ConfigError if Redis holds another run of that name.

    Its tasks and rollouts would pass for ours: same names, same prompts, other weights.
    """
    path, key = folder / "id", f"aspo:{run}:id"
    begun = path.exists()
    if not begun:
        write_file(path, uuid.uuid4().hex.encode())
    mine = path.read_text()
    client.setnx(key, mine)
    if client.get(key) != mine.encode():
        if not begun:
            path.unlink()
        raise ConfigError(
            f"Redis holds another run named {run!r}, whose folder is not {folder}; choose another run.name, "
            f"or forget that run: redis-cli --scan --pattern 'aspo:{run}:*' | xargs redis-cli del"
        )
