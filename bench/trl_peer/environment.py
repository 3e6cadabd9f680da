"""TRL's virtual environment, made on first use, and a process that runs there.

    with Peer("step.py", threads=1) as peer:
        answer = peer.ask(settings)

What is installed is pinned in `bench/trl-requirements.txt`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from aspo.errors import AspoError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-trl"
REQUIREMENTS = ROOT / "bench" / "trl-requirements.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def python() -> Path:
    """The environment's interpreter; installs what is pinned where that is not there yet."""
    interpreter, stamp = FOLDER / "bin" / "python", FOLDER / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    print(f"installing TRL into {FOLDER.name} (once, a few minutes) ...", file=sys.stderr)
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--retries", "0"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", FOLDER],
        [*pip, "--extra-index-url", TORCH_INDEX, "--requirement", REQUIREMENTS],
    ]
    for step in steps:
        if subprocess.run(step, stdout=sys.stderr).returncode != 0:
            raise AspoError(f"TRL's environment could not be made in {FOLDER.name}; see pip's messages above")
    stamp.write_text(wanted)
    return interpreter


class Peer:
    """A script of this folder, run in TRL's environment, that answers lines of JSON."""

    def __init__(self, script: str, *, threads: int) -> None:
        self._command = [str(python()), str(Path(__file__).with_name(script))]
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT / "services"),
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }

    def __enter__(self) -> Peer:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def send(self, order: dict[str, Any]) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer; raises AspoError if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AspoError("TRL's process has ended; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        self.send(order)
        return self.receive()
