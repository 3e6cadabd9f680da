"""The server that test processes are forked from: it imports and compiles once for all of their lives."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_PRELOAD = ["aspo_learner.learner", "aspo_cli.services", "publishing", "compiled"]


def forkserver() -> ForkServerContext:
    """The context to make processes of; the server starts with the first."""
    os.environ.update(QUIET)
    tests = str(Path(__file__).parent)
    if tests not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context
