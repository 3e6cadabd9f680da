"""Real `aspo` processes for tests: started, watched, and ended with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aspo_cli.processes import free_port, redis_command, wait_for_port
from forking import QUIET, forkserver


class RedisServer:
    """A real redis-server as the demo runs it, but for the options; it may be killed and started again.

    `within` is put before its command, and `host` is where it then answers.
    """

    def __init__(
        self, folder: Path, *options: str, within: Sequence[str] = (), host: str = "127.0.0.1"
    ) -> None:
        self.port, self._host, self._log = free_port(), host, folder / "log"
        self.url = f"redis://{host}:{self.port}/0"
        self._command = [*within, *redis_command(folder, self.port), *options]
        self.start()

    def start(self) -> None:
        """Start it, on the same port and with what it finds in its folder."""
        with self._log.open("ab") as log:
            # Signals stay ignored as Python ignores them: a file size limit is to fail writes, not to kill.
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, restore_signals=False)
        assert wait_for_port(self.port, 10.0, self._host), self._log.read_text()

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[str]:
    """Run a `RedisServer`; gives its URL."""
    server = RedisServer(folder, *options)
    try:
        yield server.url
    finally:
        server.stop()


class Service:
    """One `aspo` command in a process group of its own, its output in `log`.

    A forked one is off within a second, for it comes from a process that has imported the learner already.
    `within` is put before the command of another.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        forked: bool = False,
        within: Sequence[str] = (),
    ) -> None:
        self.log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        self.process: subprocess.Popen[bytes] | ForkedProcess
        self.log.touch()
        if forked:
            self.process = ForkedProcess(folder, self.log, arguments, environment or {})
            return
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", "aspo_cli", *arguments],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, **QUIET, **(environment or {})},
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> int:
        """Wait for the exit code; fails with the log when it does not come."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text}") from None

    def stop(self, signum: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(signum)
        return self.wait(timeout_s)

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End the process and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(10)


class ForkedProcess:
    """What `Service` needs of `subprocess.Popen`, forked from a server that has the imports behind it."""

    def __init__(
        self, folder: Path, log: Path, arguments: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        self._process = forkserver().Process(target=run_forked, args=(folder, log, arguments, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("aspo", timeout_s)
        return self._process.exitcode

    def send_signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)


def run_forked(folder: Path, log: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    """Become the `aspo` command, in the forked process."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["aspo", *arguments]
    from aspo_cli.main import run

    run()


def wait_until(condition: Callable[[], Any], timeout_s: float, services: tuple[Service, ...] = ()) -> Any:
    """Poll until `condition` gives something true; fails when a service dies or the time is up."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        for service in services:
            assert service.process.poll() is None, service.text[-4000:]
        time.sleep(0.1)
    raise AssertionError("\n".join(["time is up", *(service.text[-3000:] for service in services)]))
