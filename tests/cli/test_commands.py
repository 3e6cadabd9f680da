"""Every verb of `aspo` shows an example in its help that its own parser takes."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from aspo_cli.main import app
from commands import parse, verbs

VERBS = dict(verbs())
PRINTS_NO_DATA = {
    "actor",
    "config schema",
    "demo",
    "docs",
    "export",
    "learner",
    "relay",
    "up",
}  # schema is JSON
PRINTS_NO_DATA |= {"study run", "study confirm", "study publish"}  # into files


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_has_an_example_that_parses(verb: str) -> None:
    command = VERBS[verb]
    example = re.fullmatch(r"Example: (aspo .*)", command.epilog or "")
    assert example, f"aspo {verb} --help shows no example"
    assert parse(example[1]) == verb
    assert command.help, verb
    for parameter in command.params:
        assert parameter.name == "help" or parameter.help, f"aspo {verb}: {parameter.name} is not explained"


@pytest.mark.parametrize("line", ["aspo statuss", "aspo status --jsn", "aspo up", "aspo weights show"])
def test_a_line_that_is_no_command_is_refused(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing"):
        parse(line)


def test_what_prints_data_prints_json_too() -> None:
    told = {
        "promote",
        "rollback",
        "snapshot",
        "pull",
        "verify",
        "requeue",
        "purge",
        "plot",
    }  # a sentence each
    for verb, command in VERBS.items():
        takes = any("--json" in parameter.opts for parameter in command.params)
        assert takes or verb in PRINTS_NO_DATA or verb.split(" ")[-1] in told, verb


def test_a_shell_is_given_completions() -> None:
    asked = {"_ASPO_COMPLETE": "complete_bash", "COMP_WORDS": "aspo weights p", "COMP_CWORD": "2"}
    completed = CliRunner().invoke(app, [], env=asked, prog_name="aspo")
    assert completed.output.split() == ["pull", "promote"]
