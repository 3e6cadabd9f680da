"""The systemd units, and what may be wrong with them: each check gives its findings in words.

A unit is read as systemd reads it, but for continued lines, which it has none of; a setting may come again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import typer
import typer.exceptions

from aspo.config import Config, ConfigError, load_config
from aspo.errors import AspoError
from aspo_cli.main import app
from aspo_cli.up import CLOSING_S, LEARNER_GRACE_S

Unit = dict[str, list[str]]
Check = Callable[[Path], Iterator[str]]
ROLES = ("learner", "actor", "relay")
INSTANCES = {"learner": "sums", "actor": "0", "relay": "sums"}
SPECIFIERS = {"%S": "/var/lib", "%C": "/var/cache", "%d": "/run/credentials", "%l": "box"}
PROGRAM = "/opt/aspo/bin/aspo"
TOKENS = ("reader_token", "actor_token", "operator_token")
MOST_EXPOSED = 2.0  # of 10, by systemd's own count
HARDENED = {
    "DynamicUser": "yes",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
}
TOML = '[model]\npath = "m"\n[data]\npath = "d.jsonl"\n'


def file_of(folder: Path, role: str) -> Path:
    return folder / f"aspo-{role}@.service"


def unit(folder: Path, role: str) -> Unit:
    """A unit's settings for one instance, with all specifiers but the shell's variables filled in."""
    text = file_of(folder, role).read_text()
    for name, value in (SPECIFIERS | {"%i": INSTANCES[role]}).items():
        text = text.replace(name, value)
    found: Unit = {}
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def variables(found: Unit) -> dict[str, str]:
    """The variables that a unit itself sets."""
    return dict(word.split("=", 1) for line in found["Environment"] for word in line.split())


def settings(folder: Path, role: str) -> Config:
    """The settings that a unit's process starts with, by the real loader; raises `ConfigError`."""
    found = unit(folder, role)
    with tempfile.TemporaryDirectory() as scratch, patch.dict(os.environ, clear=True):
        for line in found["LoadCredential"]:
            (Path(scratch) / line.partition(":")[0]).write_text("secret\n")
        (Path(scratch) / "aspo.toml").write_text(TOML)
        for name, value in variables(found).items():
            os.environ[name] = value.replace(SPECIFIERS["%d"], scratch)
        return load_config(Path(scratch) / "aspo.toml")


def unverified(folder: Path) -> Iterator[str]:
    """What systemd itself finds: unknown settings, values it cannot read."""
    with tempfile.TemporaryDirectory() as scratch:
        for role in ROLES:
            text = file_of(folder, role).read_text().replace(PROGRAM, "/bin/true")  # which it looks for
            file_of(Path(scratch), role).write_text(text)
        names = [f"aspo-{role}@{instance}.service" for role, instance in INSTANCES.items()]
        environment = {"PATH": os.environ["PATH"], "SYSTEMD_UNIT_PATH": f"{scratch}:"}
        yield from _said_by("systemd-analyze", "verify", "--man=no", *names, environment=environment)


def exposed(folder: Path) -> Iterator[str]:
    """Units that may do more than they need, as systemd counts it."""
    for role in ROLES:
        files = str(file_of(folder, role))
        done = _run("systemd-analyze", "security", "--offline=true", "--no-pager", files)
        level = float(re.findall(r"exposure level for .*: ([\d.]+)", done.stdout)[0])
        if level > MOST_EXPOSED:
            yield f"{role} is exposed by {level}"


def too_many_rights(folder: Path) -> Iterator[str]:
    for role in ROLES:
        found = unit(folder, role)
        for key, value in HARDENED.items():
            if found.get(key) != [value]:
                yield f"{role}: {key} is not {value}"
        if ("PrivateDevices" in found) == ("DeviceAllow" in found):
            yield f"{role} sees all devices, or none and some"


def wrong_commands(folder: Path) -> Iterator[str]:
    """Commands and options that `aspo` does not have."""
    command = typer.main.get_command(app)
    for role in ROLES:
        words = unit(folder, role)["ExecStart"][0].replace("${PORT}", "1").split()
        chosen = command.commands.get(words[1])  # type: ignore[attr-defined]
        try:
            chosen.make_context(words[1], words[2:]).close()
        except (AttributeError, typer.exceptions.TyperException) as error:
            yield f"{role}: {error}"
        if words[:2] != [PROGRAM, role]:
            yield f"{role} runs {words[:2]}"


def unknown_settings(folder: Path) -> Iterator[str]:
    for role in ("learner", "actor"):
        try:
            config = settings(folder, role)
        except (ConfigError, KeyError) as error:
            yield f"{role}: {error}"
            continue
        if not (config.auth.reader_token and config.auth.actor_token):
            yield f"{role} has no tokens"
        if bool(config.auth.operator_token) != (role == "learner"):
            yield f"{role} and the operator's token"


def nowhere_to_write(folder: Path) -> Iterator[str]:
    """Folders that are written to and are not the unit's own."""
    for role in ROLES:
        found = unit(folder, role)
        state, cache = f"/var/lib/{found['StateDirectory'][0]}", f"/var/cache/{found['CacheDirectory'][0]}"
        written = variables(found).get("ASPO_RUN__DIR", found["ExecStart"][0].split()[2])
        if written != state:
            yield f"{role} writes to {written}, not to {state}"
        if variables(found)["HOME"] != cache:
            yield f"{role} is at home in {variables(found)['HOME']}, not in {cache}"


def wrong_restarts(folder: Path) -> Iterator[str]:
    """A mistake is not tried twice, a failure is, and SIGTERM while it starts is none."""
    wanted = {
        "Restart": "on-failure",
        "RestartPreventExitStatus": str(AspoError.exit_code),
        "SuccessExitStatus": str(128 + signal.SIGTERM),
        "KillMode": "mixed",
    }
    for role in ROLES:
        found = unit(folder, role)
        for key, value in wanted.items():
            if found.get(key) != [value]:
                yield f"{role}: {key} is not {value}"
    for role, least in (
        ("learner", LEARNER_GRACE_S),
        ("actor", settings(folder, "actor").actor.grace_s + CLOSING_S),
    ):
        if _seconds(unit(folder, role)["TimeoutStopSec"][0]) < least:
            yield f"{role} is killed within {least} s"


def told_secrets(folder: Path) -> Iterator[str]:
    """Secrets in units, which everybody can read, or credentials that nobody reads."""
    for role in ROLES:
        text = file_of(folder, role).read_text()
        if re.search(r"://[^\s/@]*:[^\s/@]+@|(?m:^Environment=.*(?:TOKEN|PASSWORD)=)", text):
            yield f"{role} tells a secret"
        loaded = set(re.findall(r"^LoadCredential=(\w+):", text, re.MULTILINE))
        if loaded != set(re.findall(r"[= ]%d/(\w+)", text)):
            yield f"{role} is handed {loaded}, and reads others"
        if not re.search(r"^EnvironmentFile=/", text, re.MULTILINE):
            yield f"{role} knows no Redis, or no learner"


def _seconds(text: str) -> float:
    number, unit_name = re.fullmatch(r"(\d+)(s|min)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "min": 60}[unit_name]


def _run(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _said_by(*command: str, environment: dict[str, str]) -> Iterator[str]:
    done = _run(*command, environment=environment)
    yield from (done.stdout + done.stderr).splitlines()


BY_SYSTEMD: tuple[Check, ...] = (unverified, exposed)
CHECKS: tuple[Check, ...] = (
    too_many_rights,
    wrong_commands,
    unknown_settings,
    nowhere_to_write,
    wrong_restarts,
    told_secrets,
)
HAS_SYSTEMD = shutil.which("systemd-analyze") is not None
