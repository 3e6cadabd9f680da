"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="TOML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a setting: section.key=value; may be repeated."),
]
LearnerUrl = Annotated[str, typer.Option("--learner", help="URL of the learner.")]
Token = Annotated[
    str | None, typer.Option("--token", envvar="ASPO_TOKEN", help="Bearer token, if the learner asks.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_LEARNER = "http://127.0.0.1:8000"
