"""`aspo bench`: runs the scripts of the source tree's bench folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from aspo.config import ConfigError
from aspo.errors import AspoError

FOLDER = Path(__file__).parents[2] / "bench"


def run_bench(name: str, options: Sequence[str], *, as_json: bool) -> None:
    """Run `bench/NAME.py` and print its figures; raises AspoError when there is none or it fails."""
    known = sorted(path.stem for path in FOLDER.glob("*.py"))
    if name not in known:
        raise ConfigError(
            f"no benchmark {name!r}; there are: {', '.join(known) or 'none without the source tree'}"
        )
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise AspoError(f"the benchmark {name} ended with code {done.returncode}; see the messages above")
    line = done.stdout.strip().splitlines()[-1]
    if as_json:
        typer.echo(line)
        return
    table = Table(title=f"bench {name}", title_justify="left", show_header=False)
    for key, value in json.loads(line).items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
