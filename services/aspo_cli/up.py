"""`aspo up`: the whole service on one machine, as processes: Redis, the learner and its actors.

What dies is started again; the end of the training, a SIGTERM or Ctrl-C ends all in order.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from aspo.config import Config, ConfigError, load_config
from aspo.telemetry import setup_logging
from aspo.text import printable
from aspo_cli.processes import PartFailed, Processes, is_served, redis_command, wait_for_port
from aspo_cli.shares import Shares, split_machine

INTERRUPTED = 130
RESTARTS = 5  # in a row, of any part
LEARNER_GRACE_S = 120.0  # to end its step and write a checkpoint
CLOSING_S = 40.0  # an actor's engine and server, once it has finished what it samples
LOOPBACK = ("127.0.0.1", "localhost")
_POLL_S = 0.2
_MAX_LINE = 4000


@dataclass(frozen=True, kw_only=True)
class Service:
    """The processes of one run on one machine; without `own_redis` there is one already."""

    config: Config
    path: Path
    overrides: list[str]
    shares: Shares
    own_redis: bool
    ranks: int = 1
    restarts: int = RESTARTS

    def start(self, parts: Processes) -> None:
        """Start Redis, the learner and the actors, in this order; the last wait for the one before."""
        if self.own_redis:
            self._start_redis(parts)
        known = {"ASPO_REDIS__URL": self.config.redis.url}  # not on the command line, where all can read it
        command = [sys.executable, "-m", "aspo_cli"]
        ranked = [sys.executable, "-m", "aspo_cli.ranks", str(self.ranks)]
        flags = ["--config", str(self.path)] + [part for text in self.overrides for part in ("--set", text)]
        parts.start(
            "learner",
            [*(ranked if self.ranks > 1 else [*command, "learner"]), *flags],
            environment=known | self.shares.learner,
            restarts=self.restarts,
            grace_s=LEARNER_GRACE_S,
        )
        for number, share in enumerate(self.shares.actors):
            own = [part for text in self._own_settings(number) for part in ("--set", text)]
            parts.start(
                f"actor-{number}",
                [*command, "actor", *flags, *own],
                environment=known | share,
                role="actors",
                restarts=self.restarts,
                may_leave=self.restarts > 0,
                grace_s=self.config.actor.grace_s + CLOSING_S,
            )

    def _start_redis(self, parts: Processes) -> None:
        port = urlsplit(self.config.redis.url).port or 6379
        if is_served(port):
            raise ConfigError(
                f"something serves on port {port} already, where Redis was to be started; if that is the "
                "Redis to use say --redis URL, else set redis.url to another port"
            )
        parts.start("redis", redis_command(self.config.run.path / "redis", port), restarts=self.restarts)
        if not wait_for_port(port, 30.0):
            raise PartFailed(f"redis-server does not answer; its log:\n{parts.tail('redis')}")

    def _own_settings(self, number: int) -> Iterator[str]:
        """What must differ from actor to actor."""
        actor, several = self.config.actor, len(self.shares.actors) > 1
        if several or not actor.id:
            yield f'actor.id="{actor.id or "actor"}-{number}"'
        if actor.port:
            yield f"actor.port={actor.port + number}"
        if actor.probe_port:
            yield f"actor.probe_port={actor.probe_port + number}"


def run_up(path: Path, actors: int, redis_url: str | None, overrides: list[str], *, ranks: int = 1) -> int:
    """Run the service until its training is complete, and return the exit code."""
    setup_logging()
    service = plan(path, actors, redis_url, overrides, ranks=ranks)
    console = Console(highlight=False)
    url, logs = service.config.actor.learner_url, service.config.run.path / "logs"
    try:
        with ended_by_signals(), _followed(logs, console) as parts:
            service.start(parts)
            _say(console, f"run {service.config.run.name}: {service.shares.words}; logs in {logs}")
            _say(console, f"watch it at {url}, or by aspo top --learner {url}; Ctrl-C stops all")
            while not parts.finished("learner"):
                _tell(parts, console)
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        _say(console, "stopped as told; the same command continues the run")
        return INTERRUPTED
    except PartFailed as error:
        print_failure(console, "up", error)
        return error.exit_code
    _say(console, f"training is complete; the results are in {service.config.run.path}")
    return 0


def plan(path: Path, actors: int, redis_url: str | None, overrides: list[str], *, ranks: int = 1) -> Service:
    """Read the config and divide the machine; raises ConfigError for what cannot work on one machine."""
    config = load_config(path, [*overrides, f"redis.url={redis_url}"] if redis_url else overrides)
    _check_addresses(config, actors)
    return Service(
        config=config,
        path=path,
        overrides=[text for text in overrides if not (redis_url and text.startswith("redis.url="))],
        shares=split_machine(config, actors, ranks),
        ranks=ranks,
        own_redis=redis_url is None and is_plain_loopback(config.redis.url),
    )


def is_plain_loopback(url: str) -> bool:
    """Whether a Redis that `up` starts is reached by this URL: on this machine, without TLS or password."""
    parts = urlsplit(url)
    return parts.scheme == "redis" and parts.hostname in LOOPBACK and "@" not in parts.netloc


def _check_addresses(config: Config, actors: int) -> None:
    learner, actor = config.learner, config.actor
    target = urlsplit(actor.learner_url)
    if target.hostname in LOOPBACK and target.port != learner.port:
        raise ConfigError(
            f"learner.port is {learner.port} and actors ask {actor.learner_url}; set the same port in both"
        )
    if actors > 1 and actor.advertise_url:
        raise ConfigError("actor.advertise_url cannot be that of several actors; unset it")
    bases = [port for port in (actor.port, actor.probe_port) if port]
    ports = [base + number for base in bases for number in range(actors)]
    ports += [port for port in (learner.port, learner.probe_port) if port]
    if max(ports, default=0) > 65535 or len(set(ports)) < len(ports):
        raise ConfigError(
            f"{actors} actors on ports from {' and '.join(map(str, bases))} upwards clash with each other or "
            "with the learner; set actor.port (0 picks free ones) or actor.probe_port"
        )


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and a closed terminal end a block as Ctrl-C does."""
    former = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    for signum in former:
        signal.signal(signum, signal.default_int_handler)
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def print_failure(console: Console, command: str, error: PartFailed) -> None:
    """Say which part has failed, with the last lines of its log."""
    console.print(Text(f"aspo {command}: {error}", style="red"))


@contextmanager
def _followed(logs: Path, console: Console) -> Iterator[Processes]:
    """Processes whose last lines are told too, once they have ended."""
    parts = Processes(logs)
    try:
        with parts:
            yield parts
    finally:
        _tell(parts, console)


def _say(console: Console, text: str) -> None:
    console.print(text, style="bold", markup=False, soft_wrap=True)


def _tell(parts: Processes, console: Console) -> None:
    for name, line in parts.news():
        console.print(
            Text(f"{name:<8} | ", style="dim"), Text(printable(line, _MAX_LINE)), sep="", soft_wrap=True
        )
