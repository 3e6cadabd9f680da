"""The compose file's services as plain processes, each in a sandbox like its container.

The command, variables, user, mounts and read-only root are those that the files name. Each has a network
namespace of its own, whose firewall lets through what the NetworkPolicies of deploy/kubernetes name.

It needs root, bubblewrap and nftables, and says nothing of the images' own files: the sandbox has this
environment's.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aspo.queue import connect
from aspo_cli.processes import find_redis_server
from aspo_cli.status import fetch_status
from cluster import Cluster, can_be_made
from composition import ROLES, Composition
from edges import Peer
from overlays import DESIGN, rendered
from services import wait_until

ROOT = Path(__file__).parents[2]
NAME = "app.kubernetes.io/name"
PODS = (
    *(Peer(f"{role}-1", {NAME: role}, "aspo") for role in ("redis", "learner", "demo")),
    *(Peer(f"actor-{number}", {NAME: "actor"}, "aspo") for number in (1, 2, 3)),
    Peer("stranger", {NAME: "stranger"}, "aspo"),
    Peer("neighbour", {NAME: "actor"}, "other"),
)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
pytestmark = [
    pytest.mark.faults,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(not can_be_made(), reason="needs root, iproute2 and nftables"),
]


class Container:
    """One replica of a service; what it prints goes to `log`."""

    def __init__(
        self, composed: Composition, cluster: Cluster, folder: Path, service: str, name: str
    ) -> None:
        self.log = folder / f"{name}.log"
        self._composed, self._folder, self._service, self._name = composed, folder, service, name
        self._cluster = cluster
        information, told = os.pipe()
        with self.log.open("wb") as log:
            self._outer = subprocess.Popen(
                [*self._sandbox(), "--info-fd", str(told), "--", *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(told,),
            )
        os.close(told)
        with os.fdopen(information) as answer:
            self._pid = int(json.load(answer)["child-pid"])

    def healthy(self) -> bool:
        """Run the health check as the engine would."""
        role = self._composed.role(self._service)
        check = self._composed.services[self._service].get("healthcheck")
        if role and not check:
            instruction = self._composed.image(role)["HEALTHCHECK"]
            command = json.loads(instruction[instruction.index("[") :])
        else:
            command = ["sh", "-c", check["test"][1]]
        return self.run(*command).returncode == 0

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as one more process of the container."""
        return subprocess.run([*self._sandbox(), "--", *command], capture_output=True, text=True, timeout=60)

    def finish(self, timeout_s: float) -> int:
        """Wait for the exit code."""
        return self._outer.wait(timeout_s)

    def stop(self) -> int:
        """Send SIGTERM to the container's first process and wait as long as compose would."""
        grace = self._composed.services[self._service].get("stop_grace_period", "10s")
        os.kill(self._pid, signal.SIGTERM)
        return self._outer.wait(float(grace.removesuffix("s")))

    def alive(self) -> bool:
        return self._outer.poll() is None

    def kill(self) -> None:
        self._outer.kill()  # takes the sandbox with it
        self._outer.wait(10)

    def _command(self) -> list[str]:
        service, role = self._composed.services[self._service], self._composed.role(self._service)
        if role is None:
            return list(service["command"])
        image = self._composed.image(role)
        arguments = [] if "entrypoint" in service else json.loads(image["CMD"])
        return [*service.get("entrypoint", json.loads(image["ENTRYPOINT"])), *arguments]

    def _sandbox(self) -> list[str]:
        service = self._composed.services[self._service]
        user, group = service["user"].split(":")
        arguments = [
            *self._cluster.within(self._name),
            "bwrap",
            "--unshare-user",
            "--uid",
            user,
            "--gid",
            group,
        ]
        arguments += ["--unshare-pid", "--as-pid-1"]
        arguments += ["--unshare-ipc", "--unshare-uts", "--hostname", self._name, "--cap-drop", "ALL"]
        arguments += ["--die-with-parent", "--clearenv", *self._mounts(), *self._files()]
        arguments += ["--dir", "/project", "--chdir", "/project"]
        for name, value in self._environment().items():
            arguments += ["--setenv", name, value]
        return [*arguments, "--remount-ro", "/"]

    def _environment(self) -> dict[str, str]:
        found = self._composed.environment(self._service)
        path = found.get("PATH", "$PATH").replace("$PATH", SYSTEM_PATH)
        extra = {"PATH": f"{Path(find_redis_server()).parent}:{path}"}
        extra["PYTHONPATH"] = f"{ROOT}/shared:{ROOT}/services"
        extra["ASPO_EVAL__MIN_STEPS"] = "200"  # lest the run end before it has been scaled
        if "LD_LIBRARY_PATH" in os.environ:
            extra["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        return found | extra

    def _files(self) -> Iterator[str]:
        """What stands for the image: the system, Python and this repository."""
        yield from ("--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys")
        for name in ("bin", "sbin", "lib", "lib64"):
            if Path("/", name).is_symlink():
                yield from ("--symlink", os.readlink(f"/{name}"), f"/{name}")
        parts = {"/usr", "/etc/ld.so.cache", sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")}
        parts |= {f"{ROOT}/shared", f"{ROOT}/services", str(Path(find_redis_server()).parent)}
        parts |= {path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path}
        for path in sorted(parts):
            if not path.startswith("/usr/"):
                yield from ("--ro-bind", path, path)
        yield from ("--symlink", sys.prefix, "/opt/aspo")
        hosts = "".join(f"{self._cluster.address(f'{name}-1')} {name}\n" for name in ("redis", "learner"))
        for name, text in (("hosts", hosts), ("nsswitch.conf", "hosts: files\n")):
            (self._folder / name).write_text(text)
            yield from ("--ro-bind", str(self._folder / name), f"/etc/{name}")

    def _mounts(self) -> Iterator[str]:
        """What the compose file mounts; a volume without a name is the replica's own."""
        service = self._composed.services[self._service]
        for secret in service.get("secrets", ()):
            yield from ("--ro-bind", f"{self._composed.folder}/secrets/{secret}", f"/run/secrets/{secret}")
        for mount in service.get("volumes", ()):
            source = self._folder / "volumes" / mount.get("source", self._name)
            if mount["type"] == "bind":
                source = self._composed.folder / mount["source"]
            else:
                source.mkdir(parents=True, exist_ok=True)
            yield from ("--ro-bind" if mount.get("read_only") else "--bind", str(source), mount["target"])
        for mount in service.get("tmpfs", ()):
            size = re.search(r"size=(\d+)m", mount)
            yield from ("--size", str(int(size[1]) << 20)) if size else ()
            yield from ("--tmpfs", mount.partition(":")[0])


Start = Callable[..., Container]


@pytest.fixture
def composed(tmp_path: Path) -> Composition:
    """What is shipped, with secrets; Redis's users are those that the server at hand understands."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("secrets", ".env"))
    version = subprocess.run([find_redis_server(), "--version"], capture_output=True, text=True, check=True)
    users = "users.acl" if "v=6." in version.stdout else "users-7.acl"
    folder = tmp_path / "deploy" / "compose"
    subprocess.run([folder / "secrets.sh", folder / "secrets", tmp_path / "deploy/redis" / users], check=True)
    return Composition(tmp_path)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(rendered("cpu-demo"), PODS) as cluster:
        yield cluster


@pytest.fixture
def start(composed: Composition, cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Start a replica of a service; all are ended with the test."""
    with ExitStack() as started:

        def start(service: str, number: int = 1) -> Container:
            container = Container(composed, cluster, tmp_path, service, f"{service}-{number}")
            started.callback(container.kill)
            return container

        yield start


def await_that(condition: Callable[[], Any], timeout_s: float, *containers: Container) -> None:
    """Wait until `condition` holds; fails with the log of a container that ends meanwhile."""

    def held() -> bool:
        for container in containers:
            assert container.alive(), container.log.read_text(errors="replace")[-4000:]
        return bool(condition())

    wait_until(held, timeout_s)


def test_it_comes_up_trains_and_scales(
    composed: Composition, cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    """From nothing: the order, health, rights and commands of the compose file; 1 actor, then 3, then 1."""
    demo, redis = start("demo"), start("redis")
    await_that(redis.healthy, 20, redis)
    assert demo.finish(400) == 0, demo.log.read_text()
    learner = start("learner")
    await_that(learner.healthy, 120, redis, learner)
    token = (composed.folder / "secrets/reader_token").read_text()
    url = f"http://{cluster.address('learner-1')}:8000"

    def status() -> dict[str, Any]:
        return fetch_status(url, token)

    def sampling() -> list[str]:
        actors = status()["actors"]
        return sorted(actor["id"] for actor in actors if actor["state"] == "sampling" and actor["groups"])

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/v1/status", timeout=10)
    first = start("actor")
    await_that(first.healthy, 180, redis, learner, first)
    await_that(lambda: status()["step"] >= 1, 240, redis, learner, first)

    others = [start("actor", number) for number in (2, 3)]
    await_that(lambda: len(sampling()) == 3, 300, redis, learner, first, *others)
    assert sampling() == ["actor-1-1", "actor-2-1", "actor-3-1"]
    assert [pod.name for pod in PODS[:-1] if cluster.refused(pod.name)] == []  # nobody has tried more
    assert connections(cluster) == designed()
    assert [other.stop() for other in others] == [0, 0], [other.log.read_text() for other in others]
    await_that(lambda: len(status()["actors"]) == 1, 30, redis, learner, first)
    reached = status()["step"]
    await_that(lambda: status()["step"] >= reached + 2, 240, redis, learner, first)

    for container in (learner, first):
        for folder in ("/", "/project", "/opt/aspo", "/etc/aspo", "/run/secrets"):
            assert container.run("sh", "-c", f"touch {folder}/x").returncode != 0, folder
    assert first.run("cat", "/run/secrets/operator_token").returncode != 0
    assert (first.stop(), learner.stop()) == (0, 0), learner.log.read_text()[-3000:]
    assert list((tmp_path / "volumes/runs/demo/state/checkpoints").iterdir())
    assert redis.stop() == 0
    assert list((tmp_path / "volumes/redis").rglob("*.aof*"))


def designed() -> set[tuple[str, str, int]]:
    """Which the design names, pod by pod."""
    ours = [(pod.name, pod.labels[NAME]) for pod in PODS if pod.namespace == "aspo"]
    pairs = itertools.permutations(ours, 2)
    return {(a, b, port) for (a, s), (b, t) in pairs for *ends, port, _ in DESIGN if ends == [s, t]}


def connections(cluster: Cluster) -> set[tuple[str, str, int]]:
    """Which pods reach which ports of others now."""
    ports = (22, 6379, 8000, 8001)
    return {(pod.name, *end) for pod in PODS for end in cluster.reached(pod.name, ports)}


def test_a_queue_outlives_redis_and_is_closed_to_strangers(
    composed: Composition, cluster: Cluster, start: Start
) -> None:
    url = f"redis://{cluster.address('redis-1')}:6379/0"
    admin = (composed.folder / "secrets/admin.env").read_text().strip().partition("=")[2]
    for expected in (None, b"kept"):
        redis = start("redis")
        await_that(redis.healthy, 20, redis)
        with pytest.raises(Exception, match="Authentication required"), connect(url) as stranger:
            stranger.ping()
        with connect(admin.replace("@redis:", f"@{cluster.address('redis-1')}:")) as client:
            assert client.get("aspo:x") == expected
            client.set("aspo:x", "kept")
        assert redis.stop() == 0


@pytest.mark.parametrize("role", ROLES)
def test_what_starts_without_secrets_says_so(composed: Composition, start: Start, role: str) -> None:
    """An empty token is no token: the service must not serve everybody."""
    token = composed.folder / "secrets/reader_token"
    token.chmod(0o644)
    token.write_text("")
    container = start(role)
    assert container.finish(60) == 2
    assert "reader_token" in container.log.read_text()
