"""One learner a run: an epoch that only grows, a lease that says who holds it, a folder that moves.

    fence = Fence.acquire(client, "demo", folder)       # refuses while another learner holds the run
    fence.execute(lambda pipeline: pipeline.xack(...))  # in Redis: all, and only under the highest epoch
    fence.folder / "checkpoints"                        # on disk: paths that end with this learner's hold

The lease keeps a second learner out while the first is alive; the epoch keeps the first out once a second
has taken over, however long it slept. What checks also acts, in one atomic step, so no clock decides: WATCH
and MULTI in Redis; and on disk all that a learner writes lies under `state-EPOCH`, which its successor
renames, so that the old paths lead nowhere. Only commands of Redis 6.2 are used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import redis
from redis.client import Pipeline

from aspo.errors import AspoError

log = logging.getLogger(__name__)
LEASE_S = 3.0
_LOOK_S = 0.1


class RunTakenError(AspoError, RuntimeError):
    """Another learner holds the run; the text says which."""


class FencedError(AspoError, RuntimeError):
    """Another learner has taken the run over: this one may change nothing any more."""

    exit_code = 1


class DataLostError(AspoError, RuntimeError):
    """Redis has lost what it held of the run, the epoch too; `Fence.restore` goes on."""

    exit_code = 1


class Fence:
    """The right to change a run, held by one learner at a time; safe from any thread."""

    def __init__(self, client: redis.Redis, run: str, folder: Path, owner: bytes) -> None:
        self._client, self._run, self._owner = client, run, owner
        self._epoch_key, self._lease_key = f"aspo:{run}:epoch", f"aspo:{run}:lease"
        self._run_folder = self.folder = folder
        self._epoch = 0
        self._left = threading.Event()
        self._lost: FencedError | None = None
        self._fault: str | None = None
        self._confirmed = time.monotonic()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    @classmethod
    def acquire(cls, client: redis.Redis, run: str, folder: Path) -> Self:
        """Take the run and a new epoch; waits out the lease of a learner that died.

        Raises `RunTakenError`, within `LEASE_S` seconds, when a living learner holds the run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        owner = f"{socket.gethostname()}, process {os.getpid()} ({uuid.uuid4().hex[:8]})"
        fence = cls(client, run, folder, owner.encode())
        fence._take_lease()
        fence._epoch = fence._raise_epoch(max(map(_epoch_of, _held(folder)), default=0))
        fence._take_folder()
        fence._thread.start()
        return fence

    @property
    def epoch(self) -> int:
        """This learner's epoch."""
        return self._epoch

    @property
    def lapsed(self) -> bool:
        """Whether another learner may hold the run by now, as far as this process' own clock can tell."""
        return self._lost is not None or time.monotonic() > self._confirmed + LEASE_S

    @property
    def trouble(self) -> str | None:
        """Why the lease is not renewed, None while it is: Redis takes no writes, or is silent."""
        silent_s = time.monotonic() - self._confirmed
        silence = f"Redis has not answered for {silent_s:.0f} s" if silent_s > LEASE_S else None
        return self._fault or silence

    def advance(self) -> int:
        """Go on under a higher epoch than any before; returns it."""
        self.require()
        self._epoch = self._raise_epoch(self._epoch)
        _write(self.folder / "epoch", str(self._epoch))
        return self._epoch

    def require(self) -> None:
        """Raise `FencedError` if another learner has taken the run over, as far as is known or to be seen."""
        if self._lost is None and not self.folder.exists():
            highest = max(map(_epoch_of, _held(self._run_folder)), default=0)
            self._lost = self._refusal(highest) if highest else FencedError(f"{self.folder} was removed")
        if self._lost is not None:
            raise self._lost

    def execute(
        self,
        queue: Callable[[Pipeline], Any],
        *,
        condition: Callable[[Pipeline], bool] | None = None,
        raise_on_error: bool = True,
    ) -> list[Any]:
        """Run the commands that `queue` puts into a pipeline, all or none, under the highest epoch only.

        Raises `FencedError`, nothing done, when there is a higher one, and `DataLostError` when this one is
        not known. After a lost reply the commands are sent again: they must bear it. `condition` is asked
        first and may watch keys of its own; if it does not hold, nothing is done and the result is empty.
        """
        self.require()
        with self._client.pipeline(transaction=True) as pipeline:
            while True:
                asked = time.monotonic()
                try:
                    pipeline.watch(self._epoch_key)
                    highest = int(pipeline.get(self._epoch_key) or 0)
                    self._refuse_below(highest)
                    if highest < self._epoch:
                        raise DataLostError(
                            f"Redis does not know epoch {self._epoch} of run {self._run!r}; run it with "
                            "--appendonly yes, and start the learner again if it has ended"
                        )
                    self._confirmed = asked
                    if condition is not None and not condition(pipeline):
                        return []
                    pipeline.multi()
                    queue(pipeline)
                    replies: list[Any] = pipeline.execute(raise_on_error)
                    return replies
                except redis.WatchError:
                    continue

    def restore(self) -> None:
        """Take the run again, under the same epoch, in a Redis that has lost its data.

        Raises `FencedError` if another learner has been quicker.
        """
        with self._client.pipeline(transaction=True) as pipeline:
            while True:
                try:
                    pipeline.watch(self._epoch_key)
                    self._refuse_below(int(pipeline.get(self._epoch_key) or 0))
                    pipeline.multi()
                    pipeline.set(self._epoch_key, self._epoch)
                    pipeline.set(self._lease_key, self._owner, px=int(LEASE_S * 1000))
                    pipeline.execute()
                    return
                except redis.WatchError:
                    continue

    def release(self) -> None:
        """Give the run up, so that the next learner need not wait."""
        self._left.set()
        self._thread.join()
        with contextlib.suppress(FencedError, DataLostError, redis.RedisError):
            if self._client.get(self._lease_key) == self._owner:
                self.execute(lambda pipeline: pipeline.delete(self._lease_key))

    def _take_lease(self) -> None:
        """Take the lease once it is free; one that is renewed meanwhile belongs to a living learner."""
        least = None
        while not self._client.set(self._lease_key, self._owner, nx=True, px=int(LEASE_S * 1000)):
            holder, left = self._client.get(self._lease_key), self._client.pttl(self._lease_key)
            if least is not None and left > least:
                name = (holder or b"?").decode(errors="replace")
                raise RunTakenError(
                    f"a learner on {name} holds run {self._run!r}; stop it first, or choose another run.name"
                )
            least = left
            time.sleep(_LOOK_S)

    def _keep_renewing(self) -> None:
        while not self._left.wait(LEASE_S / 3):
            try:
                self.execute(lambda p: p.set(self._lease_key, self._owner, px=int(LEASE_S * 1000)))
                self._fault = None
            except FencedError as error:
                log.error("%s", error)
                return
            except (DataLostError, redis.RedisError) as error:
                self._fault = f"Redis cannot be written to: {error}"

    def _raise_epoch(self, floor: int) -> int:
        with self._client.pipeline(transaction=True) as pipeline:
            while True:
                asked = time.monotonic()
                try:
                    pipeline.watch(self._epoch_key)
                    highest = int(pipeline.get(self._epoch_key) or 0)
                    if self._epoch:
                        self._refuse_below(highest)
                    epoch = max(highest, floor) + 1
                    pipeline.multi()
                    pipeline.set(self._epoch_key, epoch)
                    pipeline.execute()
                    self._confirmed = asked
                    return epoch
                except redis.WatchError:
                    continue

    def _refuse_below(self, highest: int) -> None:
        if highest > self._epoch:
            self._lost = self._refusal(highest)
            raise self._lost

    def _refusal(self, epoch: int) -> FencedError:
        return FencedError(
            f"another learner has taken run {self._run!r} over (epoch {epoch}, this is {self._epoch}); "
            "this one stops"
        )

    def _take_folder(self) -> None:
        """Rename what the learner before held, or begin; `state` leads people there."""
        self.folder = self._run_folder / f"state-{self._epoch}"
        while True:
            held = _held(self._run_folder)
            if held and _epoch_of(held[-1]) > self._epoch:
                raise self._refusal(_epoch_of(held[-1]))
            try:
                held[-1].rename(self.folder) if held else self.folder.mkdir()
                break
            except (FileNotFoundError, FileExistsError):
                continue  # another learner was quicker
        link = self._run_folder / f".state-{self._epoch}"
        link.unlink(missing_ok=True)
        link.symlink_to(self.folder.name)
        link.replace(self._run_folder / "state")
        self.require()


def _held(folder: Path) -> list[Path]:
    """What learners of the run have held, the last one last."""
    found = (path for path in folder.glob("state-*") if path.name.partition("-")[2].isdecimal())
    return sorted(found, key=_epoch_of)


def _epoch_of(folder: Path) -> int:
    """The last epoch under which the folder was written."""
    try:
        later = int((folder / "epoch").read_text())
    except (OSError, ValueError):
        later = 0
    return max(int(folder.name.partition("-")[2]), later)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)
