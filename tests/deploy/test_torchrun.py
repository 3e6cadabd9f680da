"""The overlay for several nodes relies on torchrun to give rank 0 to the first name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aspo_cli.processes import free_port
from manifests import main
from overlays import LEARNER, rendered
from torchrun import flags


@pytest.mark.faults
def test_rank_0_is_the_first_name_whoever_comes_first(tmp_path: Path) -> None:
    """Two nodes with the overlay's flags, but for addresses and GPUs; the later name comes first."""
    (tmp_path / "tell.py").write_text("import os\nprint('rank', os.environ['RANK'])\n")
    given = flags(main(rendered("multi-node"), LEARNER))
    given |= {"nproc-per-node": "1", "rdzv-endpoint": f"127.0.0.1:{free_port()}"}
    nodes = []
    for address in ("127.0.0.3", "127.0.0.2"):
        arguments = [f"--{key}={value}" for key, value in (given | {"local-addr": address}).items()]
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "tell"]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert ["rank 1" in said[0], "rank 0" in said[1]] == [True, True], said
