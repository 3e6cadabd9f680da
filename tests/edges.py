"""Which connections a set of NetworkPolicies lets through, by the rules of the Kubernetes API."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
Edge = tuple[str, str, int, str]  # from, to, port, protocol
OF_TORCH = (29500, 32768, 45678, 60999)  # the rendezvous's, and some of those that the kernel gives
PORTS = ((53, "UDP"), *((port, "TCP") for port in (53, 22, 443, 6379, 8000, 8001, *OF_TORCH, 61000)))
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection: a pod, or with `ip` an address outside the cluster."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    ip: str = ""
    port_names: dict[str, int] = field(default_factory=dict)


def allowed(objects: Iterable[Object], peers: Iterable[Peer], direction: str) -> set[Edge]:
    """What the policies of one end let through: the source's for Egress, the target's for Ingress.

    A connection needs both ends' leave; pods of namespaces without policies need none, and are left out.
    """
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    namespaces = {each["metadata"]["namespace"] for each in policies}
    return {
        (source.name, target.name, port, protocol)
        for source, target in itertools.product(list(peers), repeat=2)
        for end, other in [(source, target) if direction == "Egress" else (target, source)]
        if end.namespace in namespaces
        for port, protocol in PORTS
        if _lets(policies, end, other, target, (port, protocol), direction)
    }


def selects(selector: Object | None, labels: dict[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches all."""
    wanted = (selector or {}).get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_expression(each, labels) for each in (selector or {}).get("matchExpressions", []))


def _expression(each: Object, labels: dict[str, str]) -> bool:
    value = labels.get(each["key"])
    match each["operator"]:
        case "In":
            return value in each["values"]
        case "NotIn":
            return value not in each["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    raise AssertionError(f"unknown operator {each['operator']}")


def _lets(
    policies: Iterable[Object], end: Peer, other: Peer, target: Peer, port: tuple[int, str], direction: str
) -> bool:
    """Whether `end` may have this connection with `other`; an end that no policy selects may have any."""
    rules = list(_rules(policies, end, direction))
    return not rules or any(
        _names(rule, other, end.namespace, direction) and _opens(rule, target, *port)
        for found in rules
        for rule in found
    )


def _rules(policies: Iterable[Object], end: Peer, direction: str) -> Iterator[list[Object]]:
    for policy in policies:
        spec = policy["spec"]
        here = policy["metadata"]["namespace"] == end.namespace
        if here and direction in spec["policyTypes"] and selects(spec["podSelector"], end.labels):
            yield spec.get(direction.lower(), [])


def _names(rule: Object, other: Peer, namespace: str, direction: str) -> bool:
    """Whether a rule names the other end; a rule without names means everybody."""
    named = rule.get("to" if direction == "Egress" else "from")
    return not named or any(_is(each, other, namespace) for each in named)


def _is(named: Object, other: Peer, namespace: str) -> bool:
    if "ipBlock" in named:
        block = ipaddress.ip_network(named["ipBlock"]["cidr"])
        return bool(other.ip) and ipaddress.ip_address(other.ip) in block
    if other.ip:
        return False
    if "namespaceSelector" in named:
        if not selects(named["namespaceSelector"], {_NAMESPACE_LABEL: other.namespace}):
            return False
    elif other.namespace != namespace:
        return False
    return selects(named.get("podSelector"), other.labels)


def _opens(rule: Object, target: Peer, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(
        each.get("protocol", "TCP") == protocol and _within(each, target, port) for each in ports
    )


def _within(each: Object, target: Peer, port: int) -> bool:
    if "port" not in each:
        return True
    first = target.port_names.get(each["port"], each["port"])
    return first == port or ("endPort" in each and first <= port <= each["endPort"])
