"""Pods as network namespaces on one bridge, with a cluster's NetworkPolicies as their firewalls.

Each namespace drops what its own pod's policies do not name, in and out, as a cluster's network does. The
bridge's address stands for the node, whence probes come, which no policy stops. Needs root, iproute2 and
nftables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from edges import Object, Peer, allowed

_START = """
table inet policies {
  chain ingress {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iif lo accept
    ip saddr %(node)s accept
%(ingress)s
    counter name refused_ingress
  }
  chain egress {
    type filter hook output priority 0; policy drop;
    ct state established,related accept
    oif lo accept
%(egress)s
    counter name refused_egress
  }
  counter refused_ingress { }
  counter refused_egress { }
}
"""


_CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def connects(end):
    try:
        socket.create_connection(end, timeout=2).close()
    except ConnectionRefusedError:
        pass  # let through, to a port on which nobody listens
    except OSError:
        return False
    return True

with ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(connects, json.load(sys.stdin)))))
"""


class Cluster:
    """Use as a context manager; a pod of a namespace without policies has no firewall.

    with Cluster(policies, [Peer("learner-1", labels, "aspo"), Peer("actor-1", labels, "aspo")]) as cluster:
        subprocess.run([*cluster.within("actor-1"), "curl", cluster.address("learner-1")])
    """

    def __init__(self, objects: Iterable[Object], pods: Sequence[Peer]) -> None:
        objects = [each for each in objects if each["kind"] == "NetworkPolicy"]
        namespaces = {each["metadata"]["namespace"] for each in objects}
        self._names = [pod.name for pod in pods]
        self._walled = {pod.name for pod in pods if pod.namespace in namespaces}
        self._edges = {way: sorted(allowed(objects, pods, way)) for way in ("Ingress", "Egress")}
        self._bridge = f"aspo{os.getpid()}"
        # Of the range for tests of networks; several suites may run at once.
        self._subnet = f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}"
        self.node = f"{self._subnet}.1"

    def __enter__(self) -> Self:
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.node}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for name in self._names:
            self._join(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names:
            _run("ip", "netns", "delete", self._namespace(name))
        _run("ip", "link", "delete", self._bridge)

    def within(self, name: str) -> tuple[str, ...]:
        """What makes a command run in a pod's network."""
        return ("ip", "netns", "exec", self._namespace(name))

    def address(self, name: str) -> str:
        """A pod's address."""
        return f"{self._subnet}.{self._names.index(name) + 2}"

    def reached(self, source: str, ports: Sequence[int]) -> set[tuple[str, int]]:
        """Which ports of other pods a pod's packets reach, whether somebody listens there or nobody."""
        ends = [(name, port) for name in self._names if name != source for port in ports]
        told = json.dumps([(self.address(name), port) for name, port in ends])
        answers = json.loads(_run(*self.within(source), sys.executable, "-c", _CONNECT, told=told))
        return {end for end, answer in zip(ends, answers, strict=True) if answer}

    def refused(self, name: str) -> int:
        """The packets that a pod's firewall has dropped."""
        listed = _run(*self.within(name), "nft", "--json", "list", "counters")
        found = [each["counter"] for each in json.loads(listed)["nftables"] if "counter" in each]
        return sum(each["packets"] for each in found)

    def _join(self, name: str) -> None:
        namespace, index = self._namespace(name), self._names.index(name)
        near, far = f"{self._bridge}p{index}", "eth0"
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace)
        _run("ip", "link", "set", near, "master", self._bridge, "up")
        _run("ip", "-n", namespace, "address", "add", f"{self.address(name)}/24", "dev", far)
        # Else the kernel looks for neighbours by IPv6, which nobody here speaks.
        _run(*self.within(name), "sysctl", "--write", "net.ipv6.conf.all.disable_ipv6=1")
        for device in ("lo", far):
            _run("ip", "-n", namespace, "link", "set", device, "up")
        if name in self._walled:
            _run(*self.within(name), "nft", "--file", "-", told=self._rules(name))

    def _rules(self, name: str) -> str:
        ingress = [(self.address(s), *how) for s, t, *how in self._edges["Ingress"] if t == name]
        egress = [(self.address(t), *how) for s, t, *how in self._edges["Egress"] if s == name]
        return _START % {
            "node": self.node,
            "ingress": "\n".join(f"ip saddr {other} {_port(*how)} accept" for other, *how in ingress),
            "egress": "\n".join(f"ip daddr {other} {_port(*how)} accept" for other, *how in egress),
        }

    def _namespace(self, name: str) -> str:
        return f"{self._bridge}-{name}"


_ALONE: list[Object] = [
    {
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "try"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
    }
]


def _port(port: int, protocol: str) -> str:
    return f"{protocol.lower()} dport {port}"


def can_be_made() -> bool:
    """Whether this machine lets us make one."""
    try:
        with Cluster(_ALONE, [Peer("try", namespace="try")]):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _run(*command: str, told: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=told).stdout
