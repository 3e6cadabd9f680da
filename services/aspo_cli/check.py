"""`aspo check`: what would keep a service from starting, before one is started."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from aspo.config import load_config
from aspo.errors import AspoError
from aspo.preflight import Role, preflight
from aspo.queue import url_without_password


def run_check(path: Path, role: Role, overrides: list[str], *, as_json: bool = False) -> int:
    """Print each finding on a line and return the exit code: 2 if there is an error among them."""
    config = load_config(path, overrides)
    findings = preflight(role, config)
    code = AspoError.exit_code if any(finding.severity == "error" for finding in findings) else 0
    if as_json:
        typer.echo(json.dumps({"ok": code == 0, "findings": [asdict(finding) for finding in findings]}))
        return code
    for finding in findings:
        typer.echo(f"{finding.severity}: {finding.text}")
    if code:
        return code
    typer.echo(f"ok: {role} of run {config.run.name}, Redis at {url_without_password(config.redis.url)}")
    return 0
