"""Runs a command that is killed when the process that starts it, PID, ends.

    python -m aspo_cli.bound PID COMMAND...

For processes in a session of their own, which whoever ends their parent's session does not reach.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def bind_to(parent: int) -> None:
    """Have the kernel kill this process, whatever it executes, when its parent ends; exits if it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGKILL)


if __name__ == "__main__":
    bind_to(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
