"""Parts that live and end together: a death is reported with its last lines, nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
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
    assert parts._parts["actor"].process.returncode == -signal.SIGKILL


def restarted(parts: Processes, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        assert not parts.finished("learner")
        time.sleep(0.02)


def test_a_part_that_dies_is_started_again_until_it_has_died_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo_cli.processes.FIRST_DELAY_S", 0.05)
    with Processes(tmp_path) as parts:
        parts.start("learner", SLEEP)
        parts.start("actor", [sys.executable, "-c", "print('here', flush=True); exit(1)"], restarts=2)
        with pytest.raises(PartFailed, match="actor ended with code 1"):
            restarted(parts, lambda: False)
        assert parts.tail("actor") == "here\nhere\nhere"
        assert list(parts.news()) == [("actor", "here")] * 3
        assert list(parts.news()) == []


def test_a_part_that_has_been_steady_may_die_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aspo_cli.processes.FIRST_DELAY_S", 0.0)
    monkeypatch.setattr("aspo_cli.processes.STEADY_S", 0.0)
    with Processes(tmp_path) as parts:
        parts.start("learner", SLEEP)
        parts.start("actor", [sys.executable, "-c", "print('here', flush=True); exit(1)"], restarts=1)
        restarted(parts, lambda: parts.tail("actor").count("here") >= 4)


def test_a_killed_part_takes_its_children_with_it_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aspo_cli.processes.FIRST_DELAY_S", 0.05)
    with Processes(tmp_path) as parts:
        parts.start("learner", SLEEP)
        parts.start("actor", PARENT, restarts=1)
        restarted(parts, lambda: bool(parts.tail("actor")))
        first, child = parts.pid("actor"), int(parts.tail("actor"))
        os.kill(first, signal.SIGKILL)
        restarted(parts, lambda: len(parts.tail("actor").split()) == 2)
        assert parts.pid("actor") != first
        restarted(parts, lambda: not alive(child))


def test_a_mistake_is_not_tried_again_and_who_leaves_is_let_go(tmp_path: Path) -> None:
    with Processes(tmp_path) as parts:
        parts.start("learner", SLEEP)
        parts.start("actor-0", [sys.executable, "-c", ""], role="actors", restarts=1, may_leave=True)
        restarted(parts, lambda: parts._parts["actor-0"].left)
        parts.start("actor-1", [sys.executable, "-c", "exit(2)"], role="actors", restarts=1)
        with pytest.raises(PartFailed, match="actor-1 ended with code 2") as caught:
            restarted(parts, lambda: False)
        assert caught.value.exit_code == 2


def test_parts_of_one_role_are_stopped_together_and_last_roles_first(tmp_path: Path) -> None:
    """Both actors take a second, the same one, and Redis outlives them."""
    slow = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print(time.time()), sys.exit()))"
    program = f"import signal, sys, time; {slow}; print('up', flush=True); time.sleep(60)"
    quick = program.replace("time.sleep(1), ", "")
    with Processes(tmp_path) as parts:
        parts.start("redis", [sys.executable, "-c", quick])
        for name in ("actor-0", "actor-1"):
            parts.start(name, [sys.executable, "-c", program], role="actors")
        for name in ("redis", "actor-0", "actor-1"):
            while not parts.tail(name):
                time.sleep(0.02)
    ended = {name: float(parts.tail(name).split()[1]) for name in ("redis", "actor-0", "actor-1")}
    assert abs(ended["actor-0"] - ended["actor-1"]) < 0.9
    assert ended["redis"] >= max(ended["actor-0"], ended["actor-1"])
