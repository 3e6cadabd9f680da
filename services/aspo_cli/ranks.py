"""Several processes of one learner on this machine: python -m aspo_cli.ranks 4 --config my.toml

What `torchrun --standalone` does, but that the exit code is that of the process that failed first, so that a
supervisor knows a user's mistake from a crash.
"""

from __future__ import annotations

import os
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SHUTDOWN_S = 110  # to end a step and write a checkpoint


def run_ranks(size: int, arguments: list[str]) -> int:
    """Run `size` processes of `aspo learner ARGUMENTS`, one a device, and return the exit code."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        # Each has a session of its own: whoever kills ours would leave them with the run and the devices.
        bound = ("-m", "aspo_cli.bound", str(os.getpid()), sys.executable)
        elastic_launch(config, sys.executable)(*bound, "-m", "aspo_cli", "learner", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval.value
    return 0


if __name__ == "__main__":
    raise SystemExit(run_ranks(int(sys.argv[1]), sys.argv[2:]))
