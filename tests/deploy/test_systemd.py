"""The systemd units are what systemd takes, and agree with the settings and commands of the services."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import units
from units import BY_SYSTEMD, CHECKS, HAS_SYSTEMD, Check

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
MUTANTS: tuple[tuple[Check, str, str, str], ...] = (
    (units.unverified, "actor", "ProtectClock", "ProtectClok"),
    (units.unverified, "learner", "TimeoutStopSec=10min", "TimeoutStopSec=long"),
    (units.exposed, "relay", "SystemCallFilter=@system-service\n", ""),
    (units.too_many_rights, "learner", "ProtectSystem=strict", "ProtectSystem=yes"),
    (units.too_many_rights, "actor", "DynamicUser=yes\n", ""),
    (units.too_many_rights, "actor", "DeviceAllow=char-nvidia* rw\n", ""),
    (units.wrong_commands, "learner", "--config", "--conf"),
    (units.wrong_commands, "relay", "--advertise", "--url"),
    (units.wrong_commands, "actor", "aspo actor", "aspo act"),
    (units.unknown_settings, "actor", "ASPO_ACTOR__GRACE_S", "ASPO_ACTOR__GRACE"),
    (units.unknown_settings, "learner", "_FILE=%d/reader_token", "_FILE=%d/reader"),
    (units.unknown_settings, "learner", "Environment=ASPO_AUTH__OPERATOR_TOKEN_FILE=%d/operator_token\n", ""),
    (units.nowhere_to_write, "actor", "StateDirectory=aspo-actor/%i", "StateDirectory=aspo-actor"),
    (units.nowhere_to_write, "relay", "HOME=%C/aspo-relay/%i", "HOME=/root"),
    (units.nowhere_to_write, "learner", "ASPO_RUN__DIR=%S/aspo", "ASPO_RUN__DIR=/srv/aspo"),
    (units.wrong_restarts, "learner", "RestartPreventExitStatus=2", "RestartPreventExitStatus=1"),
    (units.wrong_restarts, "actor", "GRACE_S=120", "GRACE_S=150"),
    (units.wrong_restarts, "actor", "KillMode=mixed", "KillMode=control-group"),
    (units.wrong_restarts, "learner", "TimeoutStopSec=10min", "TimeoutStopSec=90s"),
    (units.told_secrets, "learner", "USER=aspo\n", "USER=aspo ASPO_REDIS__URL=redis://a:b@c:1/0\n"),
    (units.told_secrets, "actor", "LoadCredential=actor_token:/etc/aspo/tokens/actor_token\n", ""),
    (units.told_secrets, "relay", "EnvironmentFile=/", "#EnvironmentFile=/"),
    (units.told_secrets, "relay", " --token-file %d/actor_token", ""),
    (units.wrong_commands, "relay", "--token-file", "--tokens"),
)
needs_systemd = pytest.mark.skipif(not HAS_SYSTEMD, reason="systemd-analyze is not installed")


def marked(check: Check) -> object:
    return pytest.param(check, marks=[needs_systemd] if check in BY_SYSTEMD else [])


@pytest.mark.parametrize("check", [marked(check) for check in (*BY_SYSTEMD, *CHECKS)])
def test_the_units_are_sound(check: Check) -> None:
    assert list(check(FOLDER)) == []


@pytest.mark.parametrize(
    ("check", "role", "old", "new"),
    [pytest.param(*m, marks=[needs_systemd] if m[0] in BY_SYSTEMD else []) for m in MUTANTS],
)
def test_each_check_sees_a_mistake(check: Check, role: str, old: str, new: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "systemd")
    text = units.file_of(folder, role).read_text()
    assert old in text, "the mutant is of a former file"
    units.file_of(folder, role).write_text(text.replace(old, new))
    assert list(check(folder))


def test_every_check_has_a_mutant() -> None:
    assert {mutant[0] for mutant in MUTANTS} == {*CHECKS, *BY_SYSTEMD}
