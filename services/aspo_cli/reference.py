"""`aspo docs`: the reference in docs/reference, made from the code; a test fails while it is stale.

for name, text in pages().items():
    (folder / name).write_text(text)
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from aspo.config import AuthConfig, CanaryConfig, Config
from aspo.http import Scope
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges, unit_of

MADE = "<!-- Made by `aspo docs docs/reference`; edit the code, not this. -->\n"
Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """The pages by their file names."""
    made = {"config": config_page, "cli": cli_page, "http": http_page, "metrics": metrics_page}
    return {f"{name}.md": page() for name, page in made.items()}


def write_pages(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


def config_page() -> str:
    """Every setting by section, with type, bounds and default."""
    schema = Config.model_json_schema()
    lines = [
        MADE,
        "# Settings",
        "",
        "One TOML file, read by the learner and every actor. `--set section.key=value` goes before the",
        "variable `ASPO_SECTION__KEY`, which goes before the file, which goes before the default.",
        "`aspo config show` says what is in effect and why; `aspo config schema` prints this for editors.",
    ]
    for name in schema["properties"]:
        lines += _section(name, _resolved(schema["properties"][name], schema), schema)
    return "\n".join(lines) + "\n"


def _section(name: str, section: Schema, schema: Schema) -> Iterator[str]:
    yield from ("", f"## [{name}]", "", _line(section.get("description", "")), "")
    yield from ("| setting | type | default | |", "|---|---|---|---|")
    nested = []
    for key, field in section["properties"].items():
        target = _resolved(field, schema)
        if "properties" in target:
            nested.append((f"{name}.{key}", target))
            continue
        default = json.dumps(field.get("default"))
        shown = "unset" if default == "null" else f"`{default}`"
        shown = "required" if key in section.get("required", []) else shown
        yield f"| `{key}` | {_type(field, schema)} | {shown} | {_cell(field.get('description', ''))} |"
        nested += [(f"{name}.{key}", item) for item in _tables(field, schema)]
    for inner, target in nested:
        yield from _section(inner, target, schema)


def _tables(field: Schema, schema: Schema) -> Iterator[Schema]:
    """The sections that a list of tables is made of."""
    if "items" in field and "properties" in (item := _resolved(field["items"], schema)):
        yield item


def _resolved(field: Schema, schema: Schema) -> Schema:
    reference = field.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else field


def _type(field: Schema, schema: Schema) -> str:
    """A field's type and bounds in words."""
    if "anyOf" in field:
        return " or ".join(_type(one, schema) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        of = _resolved(field.get("items", {}), schema)
        return "list of tables" if "properties" in of else f"list of {_type(of, schema)}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in _BOUNDS.items() if key in field]
    names = {"integer": "int", "number": "float", "boolean": "bool", "object": "table", "array": "list"}
    return " ".join([names.get(kind, kind), *([", ".join(bounds)] if bounds else [])])


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def cli_page() -> str:
    """Every verb with its arguments, options and an example."""
    from aspo_cli.main import app

    command: Any = typer.main.get_command(app)
    lines = [MADE, "# The command line", "", str(command.help), "", str(command.epilog)]
    for name, verb in _verbs("aspo", command):
        context = verb.make_context(name, [], resilient_parsing=True)
        usage = " ".join([name, *verb.collect_usage_pieces(context)])
        lines += ["", f"## {name}", "", _line(verb.help or ""), "", "```", usage, "```", ""]
        if rows := list(_parameters(verb)):
            lines += ["| | | default |", "|---|---|---|", *rows, ""]
        lines += [f"`{(verb.epilog or '').removeprefix('Example: ')}`"]
    return "\n".join(lines) + "\n"


def _verbs(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for key, each in command.commands.items():
        if not each.hidden:
            yield from _verbs(f"{name} {key}", each)


def _parameters(verb: Any) -> Iterator[str]:
    for parameter in verb.params:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        is_plain = parameter.default is None or parameter.default is False
        # Whether a terminal watches is asked when the program starts.
        unsaid = is_plain or "--watch" in parameter.opts
        shown = "required" if parameter.required else "" if unsaid else f"`{parameter.default}`"
        variable = f" (variable `{parameter.envvar}`)" if parameter.envvar else ""
        yield f"| {names} | {_cell(parameter.help or '')}{variable} | {shown} |"


def http_page() -> str:
    """Every route of both services, with the scope of the token that it asks for."""
    lines = [
        MADE,
        "# HTTP",
        "",
        "Tokens go as `Authorization: Bearer TOKEN`; an operator's opens every route, an actor's also a",
        "reader's. Each service's `/openapi.json` has the bodies and answers; every refusal is JSON with a",
        "code, a message and a hint.",
    ]
    for title, app in _apps().items():
        lines += ["", f"## {title}", "", "| route | token | |", "|---|---|---|"]
        lines += [
            f"| `{method} {path}` | {scope} | {_cell(text)} |" for method, path, scope, text in _routes(app)
        ]
    return "\n".join(lines) + "\n"


def _apps() -> dict[str, Any]:
    """The services' apps, with nothing behind them."""
    import aspo_actor.app
    import aspo_learner.app
    from aspo.weights.blobs import BlobStore
    from aspo.weights.leases import Leases
    from aspo.weights.store import WeightStore
    from aspo_learner.live import Live
    from aspo_learner.releases import Releases

    nothing: Any = type("Nothing", (), {"not_ready": lambda: None})
    with tempfile.TemporaryDirectory() as folder:
        store, leases = WeightStore(Path(folder)), Leases()
        nothing.releases = Releases(store, leases, CanaryConfig())
        learner = Gauges("learner", LEARNER_METRICS), AuthConfig()
        actor = Gauges("actor", ACTOR_METRICS), AuthConfig()
        return {
            "Learner": aspo_learner.app.build_app(nothing, store, leases, *learner, Live("", list, None)),
            "Actor": aspo_actor.app.build_app(nothing, BlobStore(Path(folder) / "blobs"), *actor),
        }


def _routes(app: Any) -> Iterator[tuple[str, str, str, str]]:
    for path, methods in sorted(app.openapi()["paths"].items()):
        for method, described in methods.items():
            text = described.get("description", described["summary"])
            yield method.upper(), path, _scope(app, path, method), text


def _scope(app: Any, path: str, method: str) -> str:
    """The scope that the dependencies of a route name; see `aspo.http.require`."""
    for route in app.routes:
        if route.path_format == path and method.upper() in route.methods:
            checks = [inspect.getclosurevars(d.call).nonlocals for d in route.dependant.dependencies]
            scopes = [found["scope"].value for found in checks if isinstance(found.get("scope"), Scope)]
            return {"blob": "actor, or a ticket"}.get(scopes[0], scopes[0]) if scopes else "none"
    raise AssertionError(f"no route {method} {path}")


def metrics_page() -> str:
    """Both services' metrics: the name in metrics.jsonl, the one in Prometheus, the unit, the meaning."""
    lines = [
        MADE,
        "# Metrics",
        "",
        "`/metrics` of each service serves them as Prometheus gauges, and `process_*` of the process beside",
        "them. The learner's are in `metrics.jsonl`, in the trackers and in `/v1/status` by the first name.",
        "A name `x/y` stands for a value for each y, written `x/<its y>`: in Prometheus a label y.",
    ]
    for title, service, table in (("Learner", "learner", LEARNER_METRICS), ("Actor", "actor", ACTOR_METRICS)):
        lines += ["", f"## {title}", "", "| name | Prometheus | unit | |", "|---|---|---|---|"]
        lines += list(_metric_rows(service, table))
    return "\n".join(lines) + "\n"


def _metric_rows(service: str, table: Mapping[str, str]) -> Iterator[str]:
    for entry, text in table.items():
        name, _, label = entry.partition("/")
        exported = f"aspo_{service}_{name}" + (f"{{{label}}}" if label else "")
        yield f"| `{entry}` | `{exported}` | {unit_of(entry)} | {_cell(text)} |"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Text for a table's cell."""
    return _line(text).replace("|", "\\|")
