"""The `aspo` command as typer sees it: its verbs, and whether a command line would be taken."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from aspo_cli.main import app


def verbs() -> Iterator[tuple[str, Any]]:
    """All commands that do something, as (`weights pull`, command)."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield name, command
            return
        for key, each in command.commands.items():
            yield from below(f"{name} {key}".strip(), each)

    return below("", typer.main.get_command(app))


def parse(line: str | Sequence[str]) -> str:
    """Read `aspo ...` as the command would, without running it; gives the verb, raises typer's errors."""
    words = shell_words(line) if isinstance(line, str) else list(line)
    assert words[0] == "aspo", line
    command: Any = typer.main.get_command(app)
    context, name, rest = None, "aspo", words[1:]
    verb = []
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        context = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(context, rest)
        verb.append(name)
    with contextlib.suppress(typer.Exit):  # --help and --version answer and leave
        command.make_context(name, rest, parent=context)
    return " ".join(verb)


def shell_words(line: str) -> list[str]:
    """The words of a shell's first command, up to a pipe, a redirection or a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: not set(word) <= set("|&;<>()"), lexer))
