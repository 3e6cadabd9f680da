"""Named places at which a test has a process kill itself, to prove what a crash there leaves behind.

ASPO_FAILPOINT=checkpoint.renamed:2 aspo learner ...     # SIGKILL at the second time it gets there
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "ASPO_FAILPOINT"
_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Die here, as by kill -9, if the environment says so; else do nothing."""
    wanted, _, times = os.environ.get(VARIABLE, "").partition(":")
    if wanted != name:
        return
    _reached[name] += 1
    if _reached[name] == int(times or 1):
        os.kill(os.getpid(), signal.SIGKILL)
