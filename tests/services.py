"""Real `aspo` processes for tests: started, watched, and ended with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Service:
    """One `aspo` command in a process group of its own, its output in `log`."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aspo_cli", *arguments],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
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
