"""Parts that live and end together: a death is reported with its last lines, nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from aspo_cli.processes import PartFailed, Processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(60)",
]


def watch(parts: Processes) -> None:
    while not parts.finished("learner"):
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_a_death_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with Processes(tmp_path) as parts:
        parts.start("redis", SLEEP)
        parts.start("learner", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
        with pytest.raises(PartFailed, match=r"learner ended with code 3; .*\n(.*\n)*the reason"):
            watch(parts)


def test_a_part_that_should_go_on_may_not_end_even_well(tmp_path: Path) -> None:
    with Processes(tmp_path) as parts:
        parts.start("actor", [sys.executable, "-c", ""])
        parts.start("learner", SLEEP)
        with pytest.raises(PartFailed, match="actor ended with code 0"):
            watch(parts)


def test_nothing_is_left_behind_not_even_a_childs_child(tmp_path: Path) -> None:
    with Processes(tmp_path) as parts:
        parts.start("actor", PARENT)
        deadline = time.monotonic() + 20
        while not parts.tail("actor"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        grandchild = int(parts.tail("actor"))
        assert alive(grandchild)
    deadline = time.monotonic() + 10
    while alive(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_part_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aspo_cli.processes.STOP_GRACE_S", 0.5)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with Processes(tmp_path) as parts:
        parts.start("actor", [sys.executable, "-c", f"import signal, time; {stubborn}"])
        while not parts.tail("actor"):
            time.sleep(0.02)
    assert parts._parts["actor"].returncode == -signal.SIGKILL
