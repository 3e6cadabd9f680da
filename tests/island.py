"""A network namespace reached by links that can be cut or made slow and lossy, each direction by itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

DIRECTIONS = ("requests", "replies")  # to the island, and from it


class Island:
    """What runs `within` it is reached at another address over each link; needs root and iproute2.

    with Island(["learner", "actor"]) as island:
        server = RedisServer(folder, "--bind", "0.0.0.0", within=island.within, host=island.far("actor"))
        island.shape("actor", "replies", *CUT)      # what Redis says to this address is lost
        island.heal("actor")
    """

    def __init__(self, links: Sequence[str]) -> None:
        self._name, self._links = f"aspo-{os.getpid()}", list(links)
        self.within = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> Self:
        _run("ip", "netns", "add", self._name)
        for link in self._links:
            near, far = self._device(link, "requests"), self._device(link, "replies")
            # Of the smallest packets that every host takes, so that there are many to lose.
            ends = (near, "mtu", "576", "type", "veth", "peer", "name", far, "mtu", "576")
            _run("ip", "link", "add", *ends, "netns", self._name)
            _run("ip", "address", "add", f"{self.near(link)}/30", "dev", near)
            _run("ip", "link", "set", near, "up")
            _run("ip", "-n", self._name, "address", "add", f"{self.far(link)}/30", "dev", far)
            _run("ip", "-n", self._name, "link", "set", far, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self._links:
            _run("ip", "link", "delete", self._device(link, "requests"))
        _run("ip", "netns", "delete", self._name)

    def near(self, link: str) -> str:
        """The address of this machine on a link."""
        return self._address(link, 1)

    def far(self, link: str) -> str:
        """The address of the island on a link."""
        return self._address(link, 2)

    def shape(self, link: str, direction: str, *limits: str) -> None:
        """Bound one direction of a link by a token bucket; what finds no room in its queue is lost."""
        device = self._device(link, direction)
        _run("tc", *self._place(direction), "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def heal(self, link: str, direction: str) -> None:
        """Let everything through again."""
        device = self._device(link, direction)
        _run("tc", *self._place(direction), "qdisc", "delete", "dev", device, "root")

    def lost(self, link: str, direction: str) -> int:
        """The packets lost since that direction was shaped."""
        show = ("qdisc", "show", "dev", self._device(link, direction))
        found: list[dict[str, Any]] = json.loads(_run("tc", *self._place(direction), "-s", "-j", *show))
        return sum(each["drops"] for each in found)

    def _place(self, direction: str) -> tuple[str, ...]:
        return ("-n", self._name) if direction == "replies" else ()

    def _device(self, link: str, direction: str) -> str:
        return f"a{os.getpid()}{direction[2]}{self._links.index(link)}"

    def _address(self, link: str, end: int) -> str:
        # Of the range for tests of networks; several suites may run at once.
        return f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}.{4 * self._links.index(link) + end}"


CUT = ("rate", "8bit", "burst", "1", "limit", "1")  # no packet is that small


def can_be_made() -> bool:
    """Whether this machine lets us make one."""
    try:
        with Island(["try"]) as island:
            island.shape("try", "requests", *CUT)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
