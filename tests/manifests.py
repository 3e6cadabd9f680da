"""What no schema sees in Kubernetes manifests: each check gives its findings, none if all is well."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import aspo_actor.app
import aspo_learner.app
from aspo.config import AuthConfig, Config, ConfigError, load_config
from aspo.telemetry import ACTOR_METRICS, LEARNER_METRICS, Gauges
from aspo.weights.blobs import BlobStore
from aspo.weights.leases import Leases
from aspo.weights.store import WeightStore
from aspo_learner.live import Live
from edges import Edge, Object, Peer, allowed, selects

OLDEST_KUBERNETES = "1.29"  # the first whose ReadWriteOncePod is stable
SCHEMAS = Path(__file__).parent / "deploy" / "schemas"
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
NAME = "app.kubernetes.io/name"
SPOT = "karpenter.sh/capacity-type"
INDEX = "batch.kubernetes.io/job-completion-index"
RENDEZVOUS = 29500
Secrets = dict[str, dict[str, str]]
_POD_VOLUMES = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "downwardAPI"}
_METRIC = re.compile(r"\b(?:aspo|process)_[a-z0-9_]+\b")
_URL = re.compile(r"\b(?:https?|rediss?)://(?:[^\s@/]*@)?([A-Za-z0-9.-]+):(\d+)")


def workloads(objects: list[Object]) -> list[Object]:
    """The objects that make pods."""
    return [each for each in objects if "template" in each.get("spec", {})]


def workload(objects: list[Object], name: str) -> Object:
    """The workload of a name."""
    return next(each for each in workloads(objects) if each["metadata"]["name"] == name)


def pod(each: Object) -> Object:
    """The spec of a workload's pods."""
    spec: Object = each["spec"]["template"]["spec"]
    return spec


def main(objects: list[Object], name: str) -> Object:
    """The container that a workload is for."""
    container: Object = pod(workload(objects, name))["containers"][0]
    return container


def labels(each: Object) -> dict[str, str]:
    """The labels of a workload's pods; of an indexed Job, those of the first."""
    found: dict[str, str] = each["spec"]["template"]["metadata"]["labels"]
    return found | {INDEX: "0"} if each["kind"] == "Job" else found


def budget_of(objects: list[Object], each: Object) -> Object:
    """The disruption budget of a workload; an empty one if it has none."""
    budgets = of_kind(objects, "PodDisruptionBudget")
    return next((b for b in budgets if selects(b["spec"]["selector"], labels(each))), {"spec": {}})


def containers(spec: Object) -> list[Object]:
    """The containers of a pod, those that come first too."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    """The objects of a kind."""
    return [each for each in objects if each["kind"] == kind]


def environment(container: Object) -> dict[str, Any]:
    """A container's variables: values, or where they come from."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}


def check_schema(objects: list[Object]) -> Iterator[str]:
    """Every field is one that the API knows, and of its type."""
    for each in objects:
        try:
            if each["kind"] in CUSTOM:
                jsonschema.validate(each, json.loads((SCHEMAS / f"{each['kind'].lower()}.json").read_text()))
            else:
                kubernetes_validate.validate(each, OLDEST_KUBERNETES, strict=True)
        except jsonschema.ValidationError as error:
            yield f"{each['kind']} {each['metadata']['name']}: {error.message}"


def check_selectors(objects: list[Object]) -> Iterator[str]:
    """Whatever selects pods or services selects some."""
    pods = [labels(each) for each in workloads(objects)]
    for each in workloads(objects):
        spread = [c["labelSelector"] for c in pod(each).get("topologySpreadConstraints", [])]
        own = [] if each["kind"] == "Job" else [each["spec"]["selector"]]  # a Job makes its own
        for selector in [*own, *spread]:
            if not selects(selector, labels(each)) or not selector:
                yield f"{each['metadata']['name']} does not select its own pods"
    services = of_kind(objects, "Service")
    selectors = [(each, {"matchLabels": each["spec"]["selector"]}, pods) for each in services]
    selectors += [(each, each["spec"]["selector"], pods) for each in of_kind(objects, "PodDisruptionBudget")]
    selectors += [(each, each["spec"]["podSelector"], pods) for each in of_kind(objects, "NetworkPolicy")]
    marked = [each["metadata"]["labels"] for each in services]
    selectors += [(each, each["spec"]["selector"], marked) for each in of_kind(objects, "ServiceMonitor")]
    for each, selector, candidates in selectors:
        if not any(selects(selector, candidate) for candidate in candidates):
            yield f"{each['kind']} {each['metadata']['name']} selects nothing"
    names = {each["metadata"]["name"] for each in of_kind(objects, "Deployment")}
    for each in of_kind(objects, "ScaledObject"):
        if each["spec"]["scaleTargetRef"]["name"] not in names:
            yield "the autoscaler's target does not exist"
    for each in of_kind(objects, "StatefulSet"):
        if each["spec"]["serviceName"] not in {service["metadata"]["name"] for service in services}:
            yield f"{each['metadata']['name']} names a service that does not exist"


@functools.cache
def routes(folder: Path) -> dict[str, dict[str, Object]]:
    """The paths of each service's OpenAPI document; `folder` is scratch."""
    auth, stub = AuthConfig(), SimpleNamespace(not_ready=lambda: None, status=None)
    learner = aspo_learner.app.build_app(
        stub,
        WeightStore(folder / "learner"),
        Leases(),
        Gauges("learner", LEARNER_METRICS),
        auth,
        Live("r", list, None),
    )
    actor = aspo_actor.app.build_app(stub, BlobStore(folder / "actor"), Gauges("actor", ACTOR_METRICS), auth)
    return {"learner": learner.openapi()["paths"], "actor": actor.openapi()["paths"]}


def check_ports(objects: list[Object], known: dict[str, dict[str, Object]]) -> Iterator[str]:
    """Ports are those that the services listen on, and probes ask for routes that are there."""
    for each in workloads(objects):
        name = each["metadata"]["name"]
        main = pod(each)["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in main["ports"]}
        listens = environment(main).get(f"ASPO_{name.upper()}__PORT", "6379")
        more, probes = set(), ("startupProbe", "readinessProbe", "livenessProbe")
        if each["kind"] == "Job":  # torchrun watches its ranks, of which one alone serves
            more, probes = {str(RENDEZVOUS)}, ()
        if {str(port) for port in ports.values()} != {listens} | more:
            yield f"{name} listens on {listens} and says {ports}"
        for probe in probes:
            if probe not in main:
                yield f"{name} has no {probe}"
                continue
            how = main[probe].get("httpGet") or main[probe]["tcpSocket"]
            if how["port"] not in ports:
                yield f"{name}'s {probe} asks port {how['port']}"
            if "path" in how and "get" not in known.get(name, {}).get(how["path"], {}):
                yield f"{name} has no GET {how['path']}"
        if main.get("readinessProbe", {}).get("httpGet", {"path": "/readyz"})["path"] != "/readyz":
            yield f"{name}'s readiness is not /readyz"
        hook = " ".join(main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
        for host, port, path in re.findall(r"http://([\d.]+):(\d+)(/[\w/]+)", hook):
            if "post" not in known[name].get(path, {}) or (host, port) != ("127.0.0.1", listens):
                yield f"{name}'s preStop asks for {path} at {host}:{port}"
    yield from _check_service_ports(objects, known)


def _check_service_ports(objects: list[Object], known: dict[str, dict[str, Object]]) -> Iterator[str]:
    for each in of_kind(objects, "Service"):
        target = workload(objects, each["spec"]["selector"][NAME])
        offered = {port["name"] for port in pod(target)["containers"][0]["ports"]}
        for port in each["spec"]["ports"]:
            if port["targetPort"] not in offered:
                yield f"service {each['metadata']['name']} leads to port {port['targetPort']}"
    for each in of_kind(objects, "ServiceMonitor"):
        for service in of_kind(objects, "Service"):
            if not selects(each["spec"]["selector"], service["metadata"]["labels"]):
                continue
            ports = {port["name"] for port in service["spec"]["ports"]}
            for end in each["spec"]["endpoints"]:
                if end["port"] not in ports or end["path"] not in known[service["metadata"]["name"]]:
                    yield f"nothing is scraped from {end['port']}{end['path']}"


def load_settings(each: Object, toml: str, secrets: Secrets, folder: Path) -> Config:
    """The settings that a workload's pods would start with; `folder` stands for what is mounted."""
    main, spec = pod(each)["containers"][0], pod(each)
    (mounted,) = (m["mountPath"] for m in main["volumeMounts"] if m["name"] == "tokens")
    (tokens,) = (volume["secret"] for volume in spec["volumes"] if volume["name"] == "tokens")
    for item in tokens["items"]:
        (folder / item["path"]).write_text(secrets[tokens["secretName"]][item["key"]] + "\n")
    (folder / "aspo.toml").write_text(toml)
    with pytest.MonkeyPatch.context() as patch:
        for name, source in environment(main).items():
            value = source
            if isinstance(source, dict):
                ref = source.get("secretKeyRef")
                value = secrets[ref["name"]][ref["key"]] if ref else "actor-5d8f-x7"
            patch.setenv(name, value.replace("$(POD_IP)", "10.1.2.3").replace(mounted, str(folder)))
        return load_config(folder / "aspo.toml")


def check_settings(objects: list[Object], secrets: Secrets, folder: Path) -> Iterator[str]:
    """Every variable and every key of aspo.toml is a setting, and together they fit the pods."""
    (toml,) = (m["data"]["aspo.toml"] for m in of_kind(objects, "ConfigMap") if "aspo.toml" in m["data"])
    for name in ("learner", "actor"):
        each = workload(objects, name)
        main = pod(each)["containers"][0]
        try:
            config = load_settings(each, toml, secrets, folder)
        except (ConfigError, OSError) as error:
            yield f"{name}: {error}"
            continue
        own = config.learner if name == "learner" else config.actor
        arguments = main["args"]
        if main["command"] == ["torchrun"]:
            arguments = arguments[arguments.index("-m") + 1 :]
        program = ["aspo_cli"] if main["command"] == ["torchrun"] else []
        if own.host != "0.0.0.0" or arguments != [*program, name, "--config", "/etc/aspo/aspo.toml"]:
            yield f"{name} serves nobody, or is started as another"
        if config.redis.url != secrets["redis-urls"][name]:
            yield f"{name} logs in to Redis as another"
        if config.run.dir not in {Path(mount["mountPath"]) for mount in main["volumeMounts"]}:
            yield f"{name} keeps its run in {config.run.dir}, which is no volume"
        if not (config.auth.actor_token and config.auth.operator_token):
            yield f"{name} has no tokens"
        if name == "actor" and (config.actor.id, config.actor.advertise_url) != (
            "actor-5d8f-x7",
            f"http://10.1.2.3:{config.actor.port}",
        ):
            yield "actors do not find each other"


def check_urls(objects: list[Object]) -> Iterator[str]:
    """Every URL names a service that is there, by its port; KEDA's Prometheus is another namespace's."""
    services = {
        (each["metadata"]["name"], str(port["port"]))
        for each in of_kind(objects, "Service")
        for port in each["spec"]["ports"]
    }
    for each in objects:
        if each["kind"] == "ConfigMap" and "dashboard.json" in each["data"]:
            continue
        for host, port in _URL.findall(yaml.safe_dump(each, width=10**6)):
            if (host, port) not in services and host != "127.0.0.1" and not host.endswith(".monitoring.svc"):
                yield f"{each['kind']} {each['metadata']['name']} names {host}:{port}, which is no service"


def check_references(objects: list[Object], secrets: Secrets) -> Iterator[str]:
    """Mounts name volumes; volumes and variables name secrets, config maps and claims that are there."""
    accounts = {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")}
    for each in workloads(objects):
        name, spec = each["metadata"]["name"], pod(each)
        if spec["serviceAccountName"] not in accounts:
            yield f"{name} has no service account {spec['serviceAccountName']}"
        volumes = {volume["name"] for volume in spec["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in each["spec"].get("volumeClaimTemplates", [])}
        for container in containers(spec):
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{name} mounts {mount['name']}, which is no volume"
            for source in environment(container).values():
                ref = source.get("secretKeyRef") if isinstance(source, dict) else None
                if ref and ref["key"] not in secrets.get(ref["name"], {}):
                    yield f"{name} wants {ref['key']} of the secret {ref['name']}"
        for volume in spec["volumes"]:
            yield from (f"{name}: {fault}" for fault in _check_volume(objects, volume, secrets))


def _check_volume(objects: list[Object], volume: Object, secrets: Secrets) -> Iterator[str]:
    if "configMap" in volume:
        wanted = ("ConfigMap", volume["configMap"]["name"])
    elif "persistentVolumeClaim" in volume:
        wanted = ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    elif "secret" in volume:
        keys = {item["key"] for item in volume["secret"].get("items", [])}
        if not keys <= secrets.get(volume["secret"]["secretName"], {"": ""}).keys():
            yield f"wants {keys} of the secret {volume['secret']['secretName']}"
        return
    else:
        return
    if wanted not in {(each["kind"], each["metadata"]["name"]) for each in objects}:
        yield f"there is no {wanted}"


def check_security(objects: list[Object]) -> Iterator[str]:
    """Pods are what the standard `restricted` admits, read-only, and have no token of the API."""
    for each in of_kind(objects, "Namespace"):
        if each["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the standard"
    for each in of_kind(objects, "ServiceAccount"):
        if each.get("automountServiceAccountToken") is not False:
            yield f"the service account {each['metadata']['name']} hands out tokens"
    for each in workloads(objects):
        name, spec = each["metadata"]["name"], pod(each)
        context = spec.get("securityContext", {})
        if not (context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0):
            yield f"{name} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name} has no seccomp profile"
        if (
            spec.get("automountServiceAccountToken") is not False
            or spec.get("enableServiceLinks") is not False
        ):
            yield f"{name} gets the API's token, or variables for other services"
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name} shares the host's namespaces"
        if any(not volume.keys() - {"name"} <= _POD_VOLUMES for volume in spec["volumes"]):
            yield f"{name} mounts what the standard forbids"
        for container in containers(spec):
            own = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if own != wanted or any("hostPort" in port for port in container.get("ports", [])):
                yield f"{name}'s container {container['name']} may do more than it needs"


def check_availability(objects: list[Object]) -> Iterator[str]:
    """The learner stays and is one; actors leave in order and on time."""
    learner, actor = workload(objects, "learner"), workload(objects, "actor")
    if learner["kind"] == "StatefulSet":
        yield from _check_single(objects, learner)
    for each in of_kind(objects, "StatefulSet"):
        for claim in each["spec"]["volumeClaimTemplates"]:
            if claim["spec"]["accessModes"] != ["ReadWriteOncePod"]:
                yield f"two pods might write to {claim['metadata']['name']}"
    main = pod(actor)["containers"][0]
    grace = float(environment(main)["ASPO_ACTOR__GRACE_S"])
    if not pod(actor).get("terminationGracePeriodSeconds", 30) >= grace + 10:
        yield "actors are killed before they have handed back their tasks"
    if "preStop" not in main.get("lifecycle", {}):
        yield "actors do not drain"
    if pod(learner)["securityContext"].get("fsGroupChangePolicy") != "OnRootMismatch":
        yield "every start of the learner changes the owner of all its files"


def _check_single(objects: list[Object], learner: Object) -> Iterator[str]:
    if learner["spec"]["replicas"] != 1:
        yield "there is to be one learner"
    if budget_of(objects, learner)["spec"].get("maxUnavailable") != 0:
        yield "a drain may evict the learner"
    if environment(pod(learner)["containers"][0]).get("ASPO_LEARNER__KEEP_SERVING") != "true":
        yield "a learner that is done is started again for ever"


def check_resources(objects: list[Object]) -> Iterator[str]:
    """Memory is bounded, shared memory within it, and what is written lies on a volume."""
    for each in workloads(objects):
        name, spec = each["metadata"]["name"], pod(each)
        for container in containers(spec):
            resources = container["resources"]
            if "memory" not in resources.get("limits", {}) or "cpu" not in resources.get("requests", {}):
                yield f"{name}'s {container['name']} is not bounded"
    spec = pod(workload(objects, "actor"))
    main = spec["containers"][0]
    shared = [m["name"] for m in main["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    volume = next((v for v in spec["volumes"] if [v["name"]] == shared), {})
    empty = volume.get("emptyDir", {})
    if empty.get("medium") != "Memory":
        yield "actors have no shared memory"
    elif not _gibibytes(empty["sizeLimit"]) < _gibibytes(main["resources"]["limits"]["memory"]):
        yield "an actor's shared memory is not within its memory"
    for name in ("learner", "actor"):
        mounts = pod(workload(objects, name))["containers"][0]["volumeMounts"]
        writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
        if not {"/runs", "/cache", "/tmp"} <= writable:
            yield f"{name} cannot write to { ({'/runs', '/cache', '/tmp'} - writable) }"


def _gibibytes(text: str) -> float:
    return float(text.removesuffix("Gi"))


def check_gpu_pool(objects: list[Object]) -> Iterator[str]:
    """Learner and actors have a GPU each; the learner keeps off spot nodes, actors seek them and spread."""
    for name in ("learner", "actor"):
        spec = pod(workload(objects, name))
        wanted = "8" if workload(objects, name)["kind"] == "Job" else "1"
        if spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") != wanted:
            yield f"{name} has no GPU"
        if spec.get("nodeSelector") != {"nvidia.com/gpu.present": "true"}:
            yield f"{name} may land on a node without a GPU"
        tolerated = {each["key"] for each in spec.get("tolerations", [])}
        if "nvidia.com/gpu" not in tolerated:
            yield f"{name} does not tolerate the taint of GPU nodes"
        if (SPOT in tolerated) != (name == "actor"):
            yield f"{name} and spot nodes"
    affinity = pod(workload(objects, "learner")).get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []})
    terms = [selects(term, {SPOT: "spot"}) for term in required["nodeSelectorTerms"]]
    if not terms or any(terms):
        yield "the learner may land on a spot node"
    actor = pod(workload(objects, "actor"))
    preferred = actor["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    if not any(selects(each["preference"], {SPOT: "spot"}) for each in preferred):
        yield "actors do not prefer spot nodes"
    if "kubernetes.io/hostname" not in {c["topologyKey"] for c in actor.get("topologySpreadConstraints", [])}:
        yield "actors do not spread over nodes"


def check_scaling(objects: list[Object]) -> Iterator[str]:
    """Actors grow with the learner's wait, never with the queue, and stay while there is nothing to go by."""
    if "replicas" in workload(objects, "actor")["spec"]:
        yield "the deployment and the autoscaler both count the actors"
    (scaled,) = of_kind(objects, "ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    metadata = trigger["metadata"]
    if "aspo_learner_wait_seconds" not in metadata["query"] or "queue" in metadata["query"]:
        yield "the autoscaler does not go by the learner's wait"
    # Value: replicas * query / threshold. The default, AverageValue, would ask for query / threshold of them.
    if trigger.get("metricType") != "Value" or not 1.1 < float(metadata["threshold"]) < 2:
        yield "the autoscaler's step is not in proportion to the actors there are"
    if metadata.get("ignoreNullValues") != "false":
        yield "the autoscaler takes actors away while the learner restarts"
    if scaled["spec"]["minReplicaCount"] < 1:
        yield "the learner may be left without an actor"


@functools.cache
def exported() -> frozenset[str]:
    """The names of all metrics that the two services export."""
    found = []
    for service, table in (("learner", LEARNER_METRICS), ("actor", ACTOR_METRICS)):
        for family in Gauges(service, table).registry.collect():
            found += [sample.name for sample in family.samples]
    return frozenset(found)


def unknown_metrics(query: str) -> list[str]:
    """The metrics of a PromQL query that no service exports; a query without a metric is unknown itself."""
    names = _METRIC.findall(query)
    return sorted(set(names) - exported()) if names else [query]


def check_queries(objects: list[Object]) -> Iterator[str]:
    """Alerts and autoscaler ask for metrics that are there."""
    rules = [rule for each in of_kind(objects, "PrometheusRule") for rule in _rules(each)]
    queries = [rule["expr"] for rule in rules]
    for each in of_kind(objects, "ScaledObject"):
        queries += [trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]]
    for query in queries:
        for name in unknown_metrics(query):
            yield f"no service exports {name}"
    for rule in rules:
        if not {"summary", "description"} <= rule["annotations"].keys() or "severity" not in rule["labels"]:
            yield f"{rule['alert']} does not say what to do"


def _rules(each: Object) -> list[Object]:
    return list(itertools.chain.from_iterable(group["rules"] for group in each["spec"]["groups"]))


PEERS = (
    Peer("dns", {"k8s-app": "kube-dns"}, "kube-system"),
    Peer("prometheus", {NAME: "prometheus"}, "monitoring"),
    Peer("neighbour", {NAME: "actor"}, "other"),
    Peer("stranger", {NAME: "stranger"}, "aspo"),
    Peer("internet", ip="198.51.100.7"),
    Peer("their-redis", ip="10.20.30.40"),
)


def check_edges(objects: list[Object], expected: set[Edge]) -> Iterator[str]:
    """The policies permit each edge of the design, and no other."""
    pods = [
        Peer(
            each["metadata"]["name"],
            labels(each),
            "aspo",
            port_names={port["name"]: port["containerPort"] for port in pod(each)["containers"][0]["ports"]},
        )
        for each in workloads(objects)
    ]
    names = {each.name for each in pods}
    for direction, end in (("Egress", 0), ("Ingress", 1)):
        wanted = {edge for edge in expected if edge[end] in names}
        found = allowed(objects, [*pods, *PEERS], direction)
        yield from (f"{direction} forbidden: {edge}" for edge in sorted(wanted - found))
        yield from (f"{direction} permitted: {edge}" for edge in sorted(found - wanted))
