"""SIGTERM while a service still starts: in a container nothing but the service itself acts on it."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from aspo_cli.status import fetch_status
from crashing import Project
from rollouts import write_config
from scripted import ScriptedActor
from services import Service, wait_until


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


def test_a_finished_learner_serves_on_where_it_would_be_started_again(
    project: Project, redis_url: str
) -> None:
    """A StatefulSet starts again whatever ends; the weights stay to be had."""
    with ScriptedActor(redis_url, project.run, project.runs):
        learner = project.learner("learner.steps=1", "learner.keep_serving=true")
        wait_until(lambda: "done: the model is in" in learner.text, 90, (learner,))
        with pytest.raises(subprocess.TimeoutExpired):
            learner.process.wait(1.0)
        assert fetch_status(project.url)["phase"] == "done"
        assert learner.stop() == 0, learner.text
