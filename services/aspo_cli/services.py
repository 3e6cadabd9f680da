"""Running a learner or an actor in the foreground."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis
from pydantic import ValidationError
from redis.exceptions import NoPermissionError

from aspo.config import AuthConfig, Config, ConfigError, HttpConfig, describe_validation_error, load_config
from aspo.effective import effective
from aspo.errors import AspoError
from aspo.fence import Fence
from aspo.preflight import require
from aspo.queue import OUTAGE_S, QueueError, QueueUnreachable, connect
from aspo.telemetry import setup_logging
from aspo.weights.blobs import write_file
from aspo.weights.manifest import WeightsError

log = logging.getLogger(__name__)
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def _leave_on_sigterm() -> None:
    """Have SIGTERM end the process also before it trains or samples.

    A container's first process has no default action for it, and would be killed after the grace.
    """
    signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(128 + signum))


class DiskError(AspoError, RuntimeError):
    """The disk does not take what a run must keep; the text says what to do."""

    exit_code = 1


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        raise DiskError(
            f"the disk of {error.filename or folder} does not take writes ({error.strerror}); free some, or "
            "mend it, and start the learner again: it resumes from its last checkpoint"
        ) from error


@contextmanager
def _denials() -> Iterator[None]:
    try:
        yield
    except NoPermissionError as error:
        raise QueueError(
            f"Redis denies the user of redis.url a command ({error}); each role's rights are in deploy/redis"
        ) from None


def run_learner(path: Path, overrides: list[str]) -> None:
    """Train to the end; a SIGTERM or SIGINT ends the run after the current step, a second one at once."""
    _leave_on_sigterm()
    setup_logging()
    config = load_config(path, overrides)
    if os.environ.get("RANK", "0") != "0":  # torchrun has started it beside the learner itself
        from aspo_learner.follower import follow

        return follow(config)
    require("learner", config)
    with _disk_faults(config.run.path):
        with _denials():
            fence = hold_run(config)
        try:
            _keep_record(path, overrides, config.run.path)
            _train(config, fence)
        finally:
            fence.release()


def _keep_record(path: Path, overrides: list[str], folder: Path) -> None:
    """Leave in the run's folder what it was started with, but for secrets, and from now on what it logs."""
    from aspo_learner.events import EventLog

    settings = {s.name: {"value": s.value, "source": s.source} for s in effective(path, overrides)}
    write_file(folder / "config.json", f"{json.dumps(settings, indent=1)}\n".encode())
    logging.getLogger().addHandler(EventLog(folder / "events.jsonl"))


def hold_run(config: Config) -> Fence:
    """Take the run before anything heavy is loaded, so that a second learner is refused at once."""
    from aspo_learner.identity import claim_run

    client = connect(config.redis.location, retries=OUTAGE_S)
    config.run.path.mkdir(parents=True, exist_ok=True)
    claim_run(client, config.run.name, config.run.path)
    fence = Fence.acquire(client, config.run.name, config.run.path)
    log.info("this learner holds run %s, as of epoch %d", config.run.name, fence.epoch)
    return fence


def _train(config: Config, fence: Fence) -> None:
    from aspo_learner.learner import Learner
    from aspo_learner.ranks import losses_named

    with _denials(), losses_named():
        learner = Learner(config, fence)

    def stop(signum: int, frame: object) -> None:
        if learner.controls.stop.is_set():
            sys.exit(128 + signum)
        log.info("stopping after this step; once more stops at once")
        learner.controls.stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    try:
        with _denials(), losses_named():
            learner.run()
    except (OSError, WeightsError):
        fence.require()  # the folder is gone because another learner has taken it over
        raise
    except redis.RedisError as error:
        raise QueueUnreachable(
            f"Redis or its data was lost ({error}); run it with --appendonly yes and start the learner "
            "again: it resumes from its last checkpoint"
        ) from error


def run_actor(path: Path, overrides: list[str]) -> None:
    """Sample until told to leave by SIGTERM or SIGINT."""
    _leave_on_sigterm()
    setup_logging()
    # Reward functions named in the config may lie in the folder the command is run from.
    sys.path.insert(0, os.getcwd())
    config = load_config(path, overrides)
    require("actor", config)
    from aspo_actor.actor import Actor

    async def main() -> None:
        await Actor(config).run()

    with _denials():
        asyncio.run(main())


def run_relay(
    folder: Path,
    learner: str,
    advertise: str | None,
    auth: Mapping[str, object],
    http: Mapping[str, object],
) -> None:
    """Re-serve weights until told to stop; the token is the one for the learner and the one it asks for.

    `auth` and `http` are fields of `AuthConfig` and `HttpConfig`.
    """
    setup_logging()
    from aspo.weights.relay import Relay

    try:
        tokens, served = AuthConfig.model_validate(auth), HttpConfig.model_validate(http)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from None
    try:
        relay = Relay(learner, folder, tokens, served, advertise_url=advertise)
    except OSError as error:
        raise ConfigError(f"cannot keep weights in {folder}: {error.strerror}; name another folder") from None
    asyncio.run(relay.run())
