"""The documentation: the real parser takes its commands, its marked blocks run, its links lead somewhere.

Every block of shell commands is marked, after ```sh, with what is done with it here:

    run             it is executed, in the repository's root
    parse           it speaks to a run or starts one, or another test runs it: its `aspo` and `make` lines are
                    parsed, its scripts are there
    needs=WHAT      the same, and no test here runs it as it stands: gpu, cluster, docker, network or root
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from aspo.config import load_config
from commands import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])
COMMANDS = {"aspo", "make", "pip", "python", "python3", "torchrun", "kubectl", "docker", "redis-server"}
COMMANDS |= {"curl", "systemctl", "git", "source", "cd", "install", "pytest"}
NEEDS = {"gpu", "cluster", "docker", "network", "root"}
_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    mark: str
    lines: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.page}: {self.lines[0][:50] if self.lines else ''}"

    @property
    def is_shell(self) -> bool:
        """Whether it is one, or looks like one."""
        return self.language == "sh" or (
            not self.language and any((line.split() or [""])[0] in COMMANDS for line in self.lines)
        )


def read_blocks(path: Path) -> list[Block]:
    page, found = str(path.relative_to(ROOT)), []
    for _, info, text in _BLOCK.findall(path.read_text()):
        language, _, mark = info.strip().partition(" ")
        joined = re.sub(r" *\\\n\s*", " ", text)
        lines = [line.strip() for line in joined.splitlines() if line.strip()]
        found.append(Block(page, language, mark, tuple(lines)))
    return found


def is_generated(path: Path) -> bool:
    return path.parent.name == "reference"


BLOCKS = [b for path in PAGES if not is_generated(path) for b in read_blocks(path) if b.is_shell]


def aspo_command(line: str) -> str | None:
    """The `aspo ...` in a line: after variables, in a container, or as a module under torchrun."""
    if match := re.search(r"-m aspo_cli (.*)", line):
        return f"aspo {match[1]}"
    match = re.match(r"(?:[A-Z_]+=(?:\$\([^)]*\)|\S*) )*(aspo .*)", line)
    return match[1] if match else None


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.title)
def test_a_block_of_commands_is_marked_and_its_commands_are_taken(block: Block) -> None:
    assert block.mark in {"run", "parse"} | {f"needs={what}" for what in NEEDS}, f"mark it: {block.title}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in block.lines:
        if command := aspo_command(line):
            parse(command)
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        for script in re.findall(r"python3? ([\w/]+\.py)", line):
            assert (ROOT / script).is_file(), line


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "run"], ids=lambda block: block.title)
def test_a_block_to_be_run_runs(block: Block) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(block.lines)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_run_is_some_of_it() -> None:
    marks = [block.mark for block in BLOCKS]
    assert marks.count("run") >= 1
    assert marks.count("parse") >= 10


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = _BLOCK.sub("", path.read_text())
    seen: dict[str, int] = {}
    found = []
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.append(slug if slug not in seen else f"{slug}-{seen[slug]}")
        seen[slug] = seen.get(slug, 0) + 1
    return frozenset(found)


def dead_links(path: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", path.read_text()))
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue  # elsewhere in the world
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        fits = not anchor or (there.suffix == ".md" and there.exists() and anchor in anchors(there))
        if not there.exists() or not fits:
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_and_a_wrong_command_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b, `c`\n[x](#a-b-c) [y](#a-b) [z](none.md) `[w](code)` [v](page.md#a-b-c)\n")
    assert dead_links(page) == ["#a-b", "none.md"]
    assert aspo_command("ASPO_TOKEN=$(kubectl get x) aspo status") == "aspo status"
    assert aspo_command("torchrun --nnodes 2 -m aspo_cli learner -c a.toml") == "aspo learner -c a.toml"
    assert aspo_command("aspo-learner@sums") is None
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse("aspo status --looong")


SETTINGS = [
    (str(path.relative_to(ROOT)), text)
    for path in PAGES
    for _, info, text in _BLOCK.findall(path.read_text())
    if info.strip() == "toml"
]


@pytest.mark.parametrize(("page", "text"), SETTINGS, ids=lambda value: value[:40])
def test_a_config_in_the_docs_is_taken(page: str, text: str, tmp_path: Path) -> None:
    given = tomllib.loads(textwrap.dedent(text))
    path = tmp_path / "my.toml"
    path.write_text(textwrap.dedent(text))
    needed = [] if "model" in given else ["model.path=m"]
    needed += [] if {"path", "sets"} & given.get("data", {}).keys() else ["data.path=d"]
    assert load_config(path, needed).model.path
