"""Code that a model wrote, run in a real sandbox: what it may do, what it may not, and what is left of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aspo.config import CodeConfig, ConfigError, RewardConfig
from aspo_actor.rewards.calls import Answers
from aspo_actor.rewards.sandbox import Sandbox
from aspo_actor.rewards.scorer import Scorer
from hostile import ATTACKS, MARK, hostile_program

TIGHT = CodeConfig(
    sandbox="bubblewrap", wall_s=1.0, cpu_s=1, memory_mib=192, processes=4, files_mib=4, output_kib=16
)
DOUBLE = "```python\nprint(2 * int(input()))\n```"
INPUTS = [{"input": "2", "output": "4"}, {"input": "-1\n", "output": "-2"}]


def fault_here() -> str | None:
    try:
        Sandbox(TIGHT).check()
    except ConfigError as error:
        return str(error)
    return None


FAULT = fault_here()
sandboxed = pytest.mark.skipif(FAULT is not None, reason=str(FAULT))


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    config = RewardConfig(
        function="aspo_actor.rewards:code_tests", code=TIGHT, concurrency=2, timeout_s=20.0, failed_score=-1.0
    )
    with Scorer(config, ["tests"]) as scorer:
        yield scorer


def score(scorer: Scorer, completions: list[str], **columns: Any) -> list[float]:
    answers = Answers("?", completions, [[0]] * len(completions), 100, columns)
    return asyncio.run(scorer.score(answers)).rewards.tolist()


def test_without_bubblewrap_code_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs bubblewrap, which is not installed; apt install bubblewrap"):
        Sandbox(TIGHT).check()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bubblewrap 0.6.1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(
        ConfigError, match=r"needs bubblewrap 0\.8 or newer, not 'bubblewrap 0\.6\.1'; update"
    ):
        Sandbox(TIGHT).check()


def test_with_leave_code_runs_under_its_limits_alone() -> None:
    sandbox = Sandbox(TIGHT.model_copy(update={"sandbox": "none"}))
    sandbox.check()
    assert sandbox.run("import os; print(os.listdir(), 'SHELL' in os.environ)").output == "[] False\n"
    assert sandbox.run("bytearray(1 << 30)").fault == "ended with 1: MemoryError"


@sandboxed
@pytest.mark.parametrize(
    ("completion", "tests", "reward"),
    [
        (f"Double it:\n{DOUBLE}\nDone.", INPUTS, 1),
        ("print(2 * int(input()))", INPUTS, 1),
        (f"```python\nprint(3)\n```\nNo:\n{DOUBLE}", INPUTS, 1),
        (DOUBLE.removesuffix("```"), INPUTS, 1),  # cut at max_tokens
        ("```python\nprint(4)\n```", INPUTS, 0),
        ("```python\nprint(2 * int(input())\n```", INPUTS, 0),
        ("print(2 * int(input()), end='  \\n\\n')", INPUTS, 1),
        ("print(2 * int(input())); raise SystemExit(1)", INPUTS, 0),
        ("", INPUTS, 0),
        ("I cannot do that.", INPUTS, 0),
        ("def f(x): return 2 * x", "assert f(2) == 4", 1),
        ("def f(x): return 3 * x", "assert f(2) == 4", 0),
        ("import sys; sys.exit(0)", "assert f(2) == 4", 0),
        ("import os; os._exit(0)", "assert f(2) == 4", 0),
        ("print('passed')\nquit()", "assert f(2) == 4", 0),
        ("def f(x): return 4", "", -1),
        ("def f(x): return 4", [{"in": "2"}], -1),
        ("def f(x): return 4", "# none", -1),
        ("def f(x): return 4", "  ", -1),
        ("print(4)", '{"inputs": ["2"], "outputs": ["4"]}', -1),
        ("print(4)", "[]", -1),
        (DOUBLE, json.dumps(INPUTS), 1),
        ("print(4)", json.dumps(INPUTS), 0),
        ("pass", json.dumps(INPUTS), 0),
        (f"```bash\npython double.py\n```\n{DOUBLE}", INPUTS, 1),
        (f"{DOUBLE}\nIt gives\n```\n4\n```\nor\n```text\n6\n```", INPUTS, 1),
        (DOUBLE.replace("python", "Python3"), INPUTS, 1),
        (DOUBLE.replace("python", "python {.numberLines}"), INPUTS, 1),
        (DOUBLE.replace("\n", "\r\n"), INPUTS, 1),
        ("1. So:\n" + textwrap.indent(DOUBLE, "   "), INPUTS, 1),
    ],
)
def test_code_is_scored_by_its_tests(scorer: Scorer, completion: str, tests: Any, reward: float) -> None:
    assert score(scorer, [completion], tests=tests) == [reward]


@sandboxed
def test_part_of_the_tests_may_count() -> None:
    config = RewardConfig(
        function="aspo_actor.rewards:code_tests", options={"partial": True}, code=TIGHT, concurrency=1
    )
    with Scorer(config, ["tests"]) as scorer:
        assert score(scorer, ["print(4)"], tests=INPUTS) == [0.5]


def digest(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def left_over() -> list[str]:
    """Sandboxes that this process and its workers still have running."""
    children = psutil.Process().children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child.name() for child in alive if child.name() == "bwrap" or "/main.py" in child.cmdline()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that must not change; the file system's own rights are not to be what saves them."""
    monkeypatch.setenv("ASPO_TEST_SECRET", "hunter2")
    (tmp_path / "kept").write_text("precious")
    for path in (tmp_path, tmp_path / "kept"):
        path.chmod(0o777)
    return tmp_path


@pytest.fixture
def listening(folder: Path) -> Iterator[socket.socket]:
    """A TCP server that nobody but the test reaches; a unix socket listens in the folder."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
        unix.listen()
        server.settimeout(0)
        yield server


@sandboxed
@pytest.mark.parametrize("count", [len(ATTACKS), pytest.param(1000, marks=pytest.mark.faults)])
@pytest.mark.timeout(900)
def test_hostile_code_gets_nowhere(folder: Path, listening: socket.socket, count: int) -> None:
    port, me = listening.getsockname()[1], os.getpid()
    programs = [hostile_program(n, folder=str(folder), port=port, worker=me) for n in range(count)]
    before, temporary = digest(folder), set(os.listdir("/tmp"))
    config = RewardConfig(function="hostile:succeeds", code=TIGHT, concurrency=2, timeout_s=20.0)
    with Scorer(config, []) as scorer:
        for start in range(0, count, 50):
            rewards = score(scorer, programs[start : start + 50])
            assert rewards == [0.0] * len(rewards)
        assert score(scorer, [f"print({MARK!r})"]) == [1]
        assert scorer.failures == 0  # no worker died or hung
        deadline = time.monotonic() + 10
        while (left := left_over()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []
    with pytest.raises(BlockingIOError):
        listening.accept()
    assert digest(folder) == before
    assert not {name for name in set(os.listdir("/tmp")) - temporary if name.startswith("aspo-code-")}


@pytest.mark.parametrize("attack", ["network", "unix sockets", "read outside", "proc"])
def test_the_attacks_would_succeed_without_a_sandbox(
    folder: Path, listening: socket.socket, attack: str
) -> None:
    number = list(ATTACKS).index(attack)
    port = listening.getsockname()[1]
    program = hostile_program(number, folder=str(folder), port=port, worker=os.getpid())
    assert MARK in Sandbox(TIGHT.model_copy(update={"sandbox": "none"})).run(program).output
