"""What services and benchmarks never do, by their syntax trees: run what comes from outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"pickle", "_pickle", "cloudpickle", "marshal", "dill", "shelve", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
ALLOWED: dict[tuple[str, str], str] = {}  # (file, what): why


def name_of(node: ast.expr) -> str:
    """The dotted name of what is called, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_constant(call: ast.Call, keyword: str, value: object) -> bool:
    given = [found.value for found in call.keywords if found.arg == keyword]
    return any(isinstance(found, ast.Constant) and found.value is value for found in given)


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Give (line, what) for all that is banned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in CALLS:
                yield node.lineno, name
            if name == "torch.load" and not is_constant(node, "weights_only", True):
                yield node.lineno, "torch.load without weights_only=True"
            if name.endswith("np.load") and is_constant(node, "allow_pickle", True):
                yield node.lineno, "np.load with allow_pickle"
            banned = [
                found.arg
                for found in node.keywords
                if found.arg in ("shell", "trust_remote_code") and not is_constant(node, found.arg, False)
            ]
            yield from ((node.lineno, str(argument)) for argument in banned)
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Constant):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            if node.value.value is True and "trust_remote_code" in map(name_of, targets):
                yield node.lineno, "trust_remote_code"


def test_nothing_from_outside_is_run() -> None:
    files = [path for folder in ("shared", "services", "bench") for path in (ROOT / folder).glob("**/*.py")]
    assert len(files) > 50
    found = {
        (str(path.relative_to(ROOT)), line, what)
        for path in files
        for line, what in offences(ast.parse(path.read_bytes()))
    }
    assert {place for place in found if (place[0], place[2]) not in ALLOWED} == set()
    assert set(ALLOWED) <= {(file, what) for file, _, what in found}  # no leave outlives its reason


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "import cloudpickle as p",
        "from marshal import loads",
        "def f():\n    import dill",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "Popen('ls', shell=flag)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
        "class C:\n    trust_remote_code: bool = True",
    ],
)
def test_a_planted_offence_is_found(planted: str) -> None:
    assert list(offences(ast.parse(planted)))


def test_what_is_safe_is_let_be() -> None:
    safe = "torch.load(path, weights_only=True)\nyaml.safe_load(text)\nre.compile('x')\nmodel.eval()\n"
    safe += "run(['ls'], shell=False)\nload(path, trust_remote_code=False)"
    assert not list(offences(ast.parse(safe)))
