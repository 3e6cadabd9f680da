"""Runs Python that a model wrote, in a process of its own that can reach nothing.

    sandbox = Sandbox(config.reward.code)
    sandbox.check()                                  # once, at the start: ConfigError if it cannot work here
    result = sandbox.run("print(input() * 2)", stdin="ab")
    result.fault, result.output                      # None, "abab\\n"

By bubblewrap: namespaces of its own (no network, no other processes), a file system of the interpreter and a
small tmpfs that goes with the process, no environment, no capabilities, no further user namespaces, the user
`nobody`. Memory, CPU time, processes and files are limited by rlimits, which are set inside: there they count
the sandbox's processes alone. Memory is bounded for each process, so a program can hold `processes` times it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aspo.config import CodeConfig, ConfigError

_NOBODY = 65534
_OLDEST = (0, 8)  # the first bubblewrap that can forbid further user namespaces
_MIB = 2**20
_PR_SET_CHILD_SUBREAPER = 36
_PYTHON = "/mnt/python"  # where root shows nobody the interpreter
# Runs inside, before the program: arguments are resource=limit pairs, then `--` and the program's command.
_LIMIT = """
import os, resource, sys
cut = sys.argv.index("--")
for pair in sys.argv[1:cut]:
    name, _, limit = pair.partition("=")
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(limit), int(limit)))
os.execv(sys.argv[cut + 1], sys.argv[cut + 1:])
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a program: `fault` is None if it ended well; `output` what it wrote to standard output."""

    fault: str | None
    output: str


class Sandbox:
    """Runs programs under the limits of `reward.code`."""

    def __init__(self, config: CodeConfig) -> None:
        self._config = config
        self._python = os.path.realpath(sys.executable)

    def check(self) -> None:
        """Run a trivial program; raises ConfigError, saying what to do, if that does not work here."""
        if self._config.sandbox == "off":
            raise ConfigError(
                "the reward function runs code that the model writes, and reward.code.sandbox is 'off'; set "
                "it to 'bubblewrap'"
            )
        if self._config.sandbox == "bubblewrap":
            _require_bubblewrap()
        result = self.run("print(6 * 7)")
        if result.output != "42\n":
            raise ConfigError(
                f"reward.code.sandbox = {self._config.sandbox!r} does not work here ({result.fault}); in a "
                "container it needs leave for user namespaces. 'none' runs the code without a sandbox"
            )

    def run(self, program: str, stdin: str = "") -> Result:
        """Run a program to its end, or to the end of its time; never raises for what the program does."""
        with contextlib.ExitStack() as files:
            source, given, output, errors = (files.enter_context(tempfile.TemporaryFile()) for _ in range(4))
            _fill(source, program)
            _fill(given, stdin)
            fault = self._run(source, given, output, errors)
            text = _read(output, self._config.output_kib * 1024)
            return Result(fault and f"{fault}: {_last_line(errors)}", text)

    def _run(self, source: IO[bytes], given: IO[bytes], output: IO[bytes], errors: IO[bytes]) -> str | None:
        with contextlib.ExitStack() as stack:
            if self._config.sandbox == "bubblewrap":
                command, folder = self._confined(source.fileno()), "/"
            else:
                command = self._limited(f"/dev/fd/{source.fileno()}")
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aspo-code-"))
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=output,
                stderr=errors,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "PATH": os.environ.get("PATH", os.defpath)},
                pass_fds=[source.fileno()],
                start_new_session=True,
            )
            stack.callback(_end, process)
            try:
                code = process.wait(self._config.wall_s)
            except subprocess.TimeoutExpired:
                return f"took longer than {self._config.wall_s} s"
            return None if code == 0 else f"ended with {code}"

    def _confined(self, source: int) -> list[str]:
        prefix = str(Path(self._python).parent.parent)
        root = os.geteuid() == 0
        binds = ["--ro-bind", "/usr", "/usr", "--ro-bind", _PYTHON if root else prefix, prefix]
        for path in (Path("/lib"), Path("/lib64"), Path("/bin")):
            if path.is_symlink():
                binds += ["--symlink", os.readlink(path), str(path)]
            elif path.exists():
                binds += ["--ro-bind", str(path), str(path)]
        for name in ("null", "zero", "urandom"):
            binds += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        return [
            *(_as_nobody(prefix) if root else ()),
            *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
            *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"),
            *("--uid", str(_NOBODY), "--gid", str(_NOBODY), *binds),
            *("--size", str(self._config.files_mib * _MIB), "--tmpfs", "/tmp", "--chdir", "/tmp"),
            *("--perms", "0444", "--ro-bind-data", str(source), "/main.py", "--remount-ro", "/", "--"),
            *self._limited("/main.py", NPROC=self._config.processes),
        ]

    def _limited(self, program: str, **further: int) -> list[str]:
        limits = {
            "AS": self._config.memory_mib * _MIB,
            "CPU": self._config.cpu_s,
            "FSIZE": max(self._config.files_mib * _MIB, self._config.output_kib * 1024),
            "NOFILE": 64,
            "CORE": 0,
        } | further
        python = [self._python, "-I", "-S", "-B"]
        return [*python, "-c", _LIMIT, *(f"{k}={v}" for k, v in limits.items()), "--", *python, program]


def adopt_orphans() -> None:
    """Have processes that a sandbox leaves behind become children of this process, for `reap_orphans`.

    A container's first process need not reap them. For a process that has no other children.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap_orphans() -> None:
    """Take note of the end of all children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _as_nobody(prefix: str) -> list[str]:
    """What makes of root the user nobody, who then makes the sandbox: the kernel exempts the real root, in
    whatever namespace, from the limit on processes. The interpreter may lie where only root can look."""
    user = str(_NOBODY)
    return [
        *("bwrap", "--die-with-parent", "--bind", "/", "/", "--dev-bind", "/dev", "/dev"),
        *("--tmpfs", "/mnt", "--ro-bind", prefix, _PYTHON, "--"),
        *("setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--"),
    ]


def _require_bubblewrap() -> None:
    if shutil.which("bwrap") is None:
        raise ConfigError(
            "reward.code.sandbox needs bubblewrap, which is not installed; apt install bubblewrap"
        )
    said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(int(part) for part in re.findall(r"\d+", said)[:2])
    if version < _OLDEST:
        raise ConfigError(
            f"reward.code.sandbox needs bubblewrap 0.8 or newer, not {said.strip()!r}; update it"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what may be left; bubblewrap's process takes its whole sandbox with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fill(file: IO[bytes], text: str) -> None:
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)


def _read(file: IO[bytes], size: int) -> str:
    file.seek(0)
    return file.read(size).decode("utf-8", "replace")


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 300))
    lines = errors.read(300).decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
