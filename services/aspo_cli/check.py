"""`aspo check`: what would keep a service from starting, before one is started."""

from __future__ import annotations

from pathlib import Path

import typer

from aspo.config import load_config
from aspo.errors import AspoError
from aspo.preflight import Role, preflight
from aspo.queue import url_without_password


def run_check(path: Path, role: Role, overrides: list[str]) -> int:
    """Print each finding on a line and return the exit code: 2 if there is an error among them."""
    config = load_config(path, overrides)
    findings = preflight(role, config)
    for finding in findings:
        typer.echo(f"{finding.severity}: {finding.text}")
    if any(finding.severity == "error" for finding in findings):
        return AspoError.exit_code
    typer.echo(f"ok: {role} of run {config.run.name}, Redis at {url_without_password(config.redis.url)}")
    return 0
