"""SIGTERM while a service still starts: in a container nothing but the service itself acts on it."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from rollouts import write_config
from services import Service


@pytest.mark.parametrize("role", ["learner", "actor"])
def test_a_service_that_waits_for_redis_leaves_by_itself(role: str, tmp_path: Path) -> None:
    """An exit code of its own, for a default action would be none in a container's first process."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        write_config(tmp_path, model="m", redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        service = Service(tmp_path, role, "--config", "config.toml")
        try:
            with silent.accept()[0]:
                assert service.stop() == 128 + signal.SIGTERM, service.text
        finally:
            service.kill()
    assert "Traceback" not in service.text
