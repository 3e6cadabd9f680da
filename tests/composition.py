"""What is shipped for containers, read as the tools read it, and what may be wrong with it.

    composition = Composition(root)
    for problem in wrong_ports(composition): ...

A check gives its findings in words, none for what is as it should be.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import yaml

from aspo.config import ConfigError, load_config
from aspo_cli.demo import write_config

Service = dict[str, Any]
Check = Callable[["Composition"], Iterator[str]]
ROLES = ("learner", "actor")
SECRETS = "/run/secrets/"
YAMLLINT = "{extends: default, rules: {document-start: disable, braces: {max-spaces-inside: 0}, \
comments: {min-spaces-from-content: 2}, line-length: {max: 140}, truthy: {check-keys: false}}}"


class Composition:
    """The folder `deploy` and the Dockerfiles' context of a tree; secrets are those of `secrets.sh`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "deploy" / "compose"
        self.text = (self.folder / "compose.yaml").read_text()
        self.defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", self.text))
        filled = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", self.text).replace("$$", "$")
        self.compose: dict[str, Any] = yaml.safe_load(filled)
        self.services: dict[str, Service] = self.compose["services"]
        self.prometheus = yaml.safe_load((self.folder / "prometheus.yml").read_text())

    def dockerfile(self, role: str) -> Path:
        return self.root / "deploy" / "docker" / f"{role}.Dockerfile"

    def role(self, name: str) -> str | None:
        """Which of our images a service runs."""
        return next(
            (role for role in ROLES if self.services[name]["image"].startswith(f"aspo-{role}:")), None
        )

    def instructions(self, role: str) -> list[tuple[str, str]]:
        """A Dockerfile's instructions and what follows them."""
        lines = [line for line in self.dockerfile(role).read_text().splitlines() if not line.startswith("#")]
        joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
        parts = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
        return [(name, rest) for name, rest in parts]

    def image(self, role: str) -> dict[str, str]:
        """The last of each instruction in the final stage."""
        found = self.instructions(role)
        final = max(i for i, (name, _) in enumerate(found) if name == "FROM")
        return dict(found[final:])

    def environment(self, name: str) -> dict[str, str]:
        """The variables that a service's process has of the image, the file of secrets and the service."""
        role, service = self.role(name), self.services[name]
        found = dict(re.findall(r"(\w+)=(\S+)", self.image(role)["ENV"])) if role else {}
        for file in service.get("env_file", ()):
            found |= dict(line.split("=", 1) for line in (self.folder / file).read_text().splitlines())
        return found | {key: str(value) for key, value in service.get("environment", {}).items()}

    def networks(self, name: str) -> set[str]:
        return set(self.services[name].get("networks", ()))

    def hosts(self, network: str) -> set[str]:
        """The names that are known in a network."""
        names = {name for name in self.services if network in self.networks(name)}
        joined = [self.services[name]["networks"] for name in names]
        aliases = [of[network]["aliases"] for of in joined if isinstance(of, dict) and of[network]]
        return names | {alias for group in aliases for alias in group}

    def settings(self, name: str) -> dict[str, Any]:
        """The settings that a service loads by the real loader; raises `ConfigError`."""
        with patch.dict(os.environ, clear=True):
            for key, value in self.environment(name).items():
                os.environ[key] = value.replace(SECRETS, f"{self.folder}/secrets/")
            return load_config(self.folder / self.defaults["CONFIG"]).model_dump()


def unlinted_dockerfiles(stack: Composition) -> Iterator[str]:
    files = [stack.dockerfile(role) for role in ROLES]
    yield from _said_by(_tool("hadolint"), "--no-color", *map(str, files))


def unlinted_yaml(stack: Composition) -> Iterator[str]:
    yield from _said_by(_tool("yamllint"), "--strict", "-d", YAMLLINT, str(stack.folder))


def broken_schema(stack: Composition) -> Iterator[str]:
    schema = ("--builtin-schema", "vendor.compose-spec")
    yield from _said_by(_tool("check-jsonschema"), *schema, str(stack.folder / "compose.yaml"))


def unknown_settings(stack: Composition) -> Iterator[str]:
    for name in stack.services:
        if stack.services[name].get("env_file"):
            try:
                stack.settings(name)
            except ConfigError as error:
                yield f"{name}: {error}"


def another_task(stack: Composition) -> Iterator[str]:
    """Where the config differs from the demo's own in more than addresses, folders and threads."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), seed=0)
        demo = tomllib.loads((Path(folder) / "config.toml").read_text())
    here = tomllib.loads((stack.folder / stack.defaults["CONFIG"]).read_text())
    places = {"run": {"name", "dir", "seed"}, "redis": {"url"}, "model": {"path"}, "data": {"path"}}
    places |= {"eval": {"path"}, "learner": {"threads", "port"}, "actor": {"id", "port", "learner_url"}}
    for section in demo.keys() | here.keys():
        ours, theirs = here.get(section, {}), demo.get(section, {})
        for key in (ours.keys() | theirs.keys()) - places.get(section, set()):
            if ours.get(key) != theirs.get(key):
                yield f"{section}.{key} is {ours.get(key)}, in the demo {theirs.get(key)}"


def wrong_addresses(stack: Composition) -> Iterator[str]:
    """URLs whose host and port no service answers at, in a network of the asker's."""
    for name, url in _urls(stack):
        address = urlsplit(url)
        known = set().union(*(stack.hosts(network) for network in stack.networks(name)))
        if address.hostname not in known:
            yield f"{name} asks {address.hostname}, which is nobody in its networks"
        elif address.port != _ports(stack).get(address.hostname):
            yield f"{name} asks {address.hostname} at {address.port}"


def _urls(stack: Composition) -> Iterator[tuple[str, str]]:
    for name, service in stack.services.items():
        if service.get("env_file"):
            yield name, stack.environment(name)["ASPO_REDIS__URL"]
            if stack.role(name) == "actor":
                yield name, _config(stack)["actor"]["learner_url"]
    for job in stack.prometheus["scrape_configs"]:
        for found in job["dns_sd_configs"]:
            yield from (("prometheus", f"http://{host}:{found['port']}") for host in found["names"])
    for source in yaml.safe_load((stack.folder / "grafana/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]:
        yield "grafana", source["url"]


def _config(stack: Composition) -> dict[str, Any]:
    return tomllib.loads((stack.folder / stack.defaults["CONFIG"]).read_text())


def _ports(stack: Composition) -> dict[str, int]:
    config = _config(stack)
    ports = {role: config[role]["port"] for role in ROLES} | {"redis": 6379, "prometheus": 9090}
    return ports | {f"{role}-gpu": ports[role] for role in ROLES}


def wrong_ports(stack: Composition) -> Iterator[str]:
    """Where image, health check, config and what is published disagree."""
    config = _config(stack)
    for role in ROLES:
        image, port = stack.image(role), str(config[role]["port"])
        for instruction in ("EXPOSE", "HEALTHCHECK"):
            if not re.search(rf"(^|:){port}\b", image[instruction]):
                yield f"{role} serves on {port}, not so {instruction} {image[instruction]}"
    for name in stack.services:
        role = stack.role(name)
        for published in stack.services[name].get("ports", ()):
            if role and not published.endswith(f":{config[role]['port']}"):
                yield f"{name} publishes {published}"


def wrong_probes(stack: Composition) -> Iterator[str]:
    """Health checks that ask for no probe, or dependencies on health that nobody checks."""
    for role in ROLES:
        if "/readyz'" not in stack.image(role)["HEALTHCHECK"]:
            yield f"the image of {role} does not ask /readyz"
    for name, service in stack.services.items():
        for needed, how in service.get("depends_on", {}).items():
            other = stack.services[needed]
            checked = "healthcheck" in other or stack.role(needed)
            if how["condition"] == "service_healthy" and not checked:
                yield f"{name} waits for the health of {needed}, which has no check"
            if how["condition"] == "service_completed_successfully" and other["restart"] != "no":
                yield f"{name} waits for the end of {needed}, which is started again"


def told_secrets(stack: Composition) -> Iterator[str]:
    """Secrets that are written down, or named and not given."""
    for file in ("compose.yaml", ".env.example", "demo.toml"):
        for found in re.findall(r"\w+://[^\s/@$]*:[^\s/@$]+@", (stack.folder / file).read_text()):
            yield f"{file} holds a password: {found}"
    for name, service in stack.services.items():
        for key, value in service.get("environment", {}).items():
            if re.search("TOKEN|PASSWORD|SECRET", key) and not str(value).startswith(SECRETS):
                yield f"{name}: {key} is no file of {SECRETS}"
        text = json.dumps([service.get("environment"), service.get("command"), service.get("healthcheck")])
        for secret in set(re.findall(rf"{SECRETS}(\w+)", text)) - set(service.get("secrets", ())):
            yield f"{name} reads the secret {secret}, which it is not given"
    for name, secret in stack.compose["secrets"].items():
        if not (stack.folder / secret["file"]).is_file():
            yield f"nobody makes the secret {name}"


def too_many_rights(stack: Composition) -> Iterator[str]:
    for name, service in stack.services.items():
        if service.get("read_only") is not True:
            yield f"{name} may write to its root file system"
        if not re.fullmatch(r"[1-9]\d*:\d+", str(service.get("user"))):
            yield f"{name} may run as root"
        if service.get("cap_drop") != ["ALL"] or "cap_add" in service or "privileged" in service:
            yield f"{name} keeps capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", ()):
            yield f"{name} may gain privileges"
        if any(not published.startswith("127.0.0.1:") for published in service.get("ports", ())):
            yield f"{name} is published to other machines"
    if "ports" in stack.services["redis"]:
        yield "Redis is published"
    if stack.networks("redis") != {"queue"} or not stack.compose["networks"]["queue"]["internal"]:
        yield "Redis is reached from elsewhere than the queue's network"
    if "operator_token" in stack.services["actor"]["secrets"] + stack.services["actor-gpu"]["secrets"]:
        yield "an actor may operate the learner"


def missing_limits(stack: Composition) -> Iterator[str]:
    for name, service in stack.services.items():
        if "restart" not in service:
            yield f"{name} has no restart policy"
        limits = service["deploy"].get("resources", {}).get("limits", {})
        wanted = {"pids"} if name.endswith("-gpu") else {"cpus", "memory", "pids"}
        if not wanted <= limits.keys():
            yield f"{name} has no limit of {sorted(wanted - limits.keys())}"


def nowhere_to_write(stack: Composition) -> Iterator[str]:
    """Folders that a service writes to and that are read-only; volumes that are shared and should not be."""
    for name, service in stack.services.items():
        mounts = [mount for mount in service.get("volumes", ()) if not mount.get("read_only")]
        writable = {mount["target"] for mount in mounts}
        writable |= {mount.partition(":")[0] for mount in service.get("tmpfs", ())}
        environment = stack.environment(name)
        wanted = {"/tmp", environment["HOME"]} if stack.role(name) else set()
        wanted |= {_config(stack)["run"]["dir"]} if service.get("env_file") else set()
        for folder in wanted - writable:
            yield f"{name} cannot write to {folder}"
        if stack.role(name) == "actor" and any(m["target"] == "/runs" and "source" in m for m in mounts):
            yield f"replicas of {name} share /runs"


def missing_folders(stack: Composition) -> Iterator[str]:
    """Volumes at folders that the image does not hand to its user, so that root would own them."""
    for name, service in stack.services.items():
        role = stack.role(name)
        for mount in service.get("volumes", ()):
            made = role and re.search(rf"install -d .*{mount['target']}\b", stack.image(role)["RUN"])
            if role and mount["type"] == "volume" and not made:
                yield f"the image of {role} has no {mount['target']}"


def nothing_to_mount(stack: Composition) -> Iterator[str]:
    for name, service in stack.services.items():
        for mount in service.get("volumes", ()):
            if mount["type"] == "bind" and not (stack.folder / mount["source"]).exists():
                yield f"{name} mounts {mount['source']}, which is not there"


def clumsy_images(stack: Composition) -> Iterator[str]:
    """What makes an image run as root, hide from SIGTERM, or not be told from another."""
    version = tomllib.loads((stack.root / "pyproject.toml").read_text())["project"]["version"]
    for role in ROLES:
        image = stack.image(role)
        if image.get("USER") != "10001:10001":
            yield f"{role} runs as {image.get('USER')}"
        if not image["ENTRYPOINT"].startswith("[") or json.loads(image["ENTRYPOINT"]) != ["aspo", role]:
            yield f"{role} does not get signals, or is another: {image['ENTRYPOINT']}"
        if f'image.version="{version}"' not in image["LABEL"]:
            yield f"{role} is not labelled {version}"
        if "curl" in stack.dockerfile(role).read_text():
            yield f"{role} needs curl"
        if len([name for name, _ in stack.instructions(role) if name == "FROM"]) < 3:
            yield f"{role} is built in one stage"


def missing_context(stack: Composition) -> Iterator[str]:
    """What a Dockerfile copies and .dockerignore keeps from it, and what that lets in beside it."""
    allowed = {line[1:] for line in (stack.root / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied: set[str] = set()
    for role in ROLES:
        copies = [rest for name, rest in stack.instructions(role) if name == "COPY" and "--from" not in rest]
        copied |= {source for copy in copies for source in copy.split()[:-1]}
    for path in copied ^ allowed:
        yield f"{path} is copied and ignored, or let in for nothing"


def untold_variables(stack: Composition) -> Iterator[str]:
    """Where .env.example and the variables of compose.yaml differ."""
    lines = (stack.folder / ".env.example").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    told.pop("COMPOSE_PROFILES")
    for name in told.items() ^ stack.defaults.items():
        yield f"{name[0]} has not the default of .env.example"


def wrong_variants(stack: Composition) -> Iterator[str]:
    """GPU services without GPUs, on each other's GPU, or with an image of the other kind."""
    for name in stack.services:
        role, service = stack.role(name), stack.services[name]
        if role is None:
            continue
        variant = "cuda" if name.endswith("-gpu") else "cpu"
        if service["image"] != f"aspo-{role}:{variant}" or service["build"]["args"] != {"VARIANT": variant}:
            yield f"{name} does not run the {variant} image of {role}"
        devices = service["deploy"]["resources"].get("reservations", {}).get("devices", [])
        if (variant == "cuda") != any("gpu" in device["capabilities"] for device in devices):
            yield f"{name} has GPUs reserved: {devices}"
        if (variant == "cuda") != (service.get("profiles") == ["gpu"]):
            yield f"{name} starts with the wrong profile"
    seen = [stack.environment(f"{role}-gpu")["CUDA_VISIBLE_DEVICES"].split(",") for role in ROLES]
    if set(seen[0]) & set(seen[1]):
        yield "learner and actor share a GPU"


CHECKS: tuple[Check, ...] = (
    unlinted_dockerfiles,
    unlinted_yaml,
    broken_schema,
    unknown_settings,
    another_task,
    wrong_addresses,
    wrong_ports,
    wrong_probes,
    told_secrets,
    too_many_rights,
    missing_limits,
    nowhere_to_write,
    missing_folders,
    nothing_to_mount,
    clumsy_images,
    missing_context,
    untold_variables,
    wrong_variants,
)


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _said_by(*command: str) -> Iterator[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        yield done.stdout + done.stderr
