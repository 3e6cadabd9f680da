"""Each check of the Kubernetes manifests catches its mutants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import manifests
from edges import Object
from manifests import environment, main, of_kind, pod, workload
from overlays import ACTOR, CHECKS, LEARNER, findings, rendered

Mutation = Callable[[list[Object]], Any]


def named(objects: list[Object], kind: str, name: str) -> Object:
    return next(each for each in of_kind(objects, kind) if each["metadata"]["name"] == name)


def policy(objects: list[Object], name: str) -> Object:
    spec: Object = named(objects, "NetworkPolicy", name)["spec"]
    return spec


def trigger(objects: list[Object]) -> Object:
    found: Object = named(objects, "ScaledObject", ACTOR)["spec"]["triggers"][0]
    return found


def rule(objects: list[Object]) -> Object:
    found: Object = named(objects, "PrometheusRule", "aspo")["spec"]["groups"][0]["rules"][0]
    return found


def set_variable(objects: list[Object], workload_name: str, name: str, value: str) -> None:
    found = next((v for v in main(objects, workload_name)["env"] if v["name"] == name), None)
    if found is None:
        main(objects, workload_name)["env"].append({"name": name, "value": value})
    else:
        found["value"] = value


def edit_toml(objects: list[Object], old: str, new: str) -> None:
    data = next(each["data"] for each in of_kind(objects, "ConfigMap") if "aspo.toml" in each["data"])
    assert old in data["aspo.toml"]
    data["aspo.toml"] = data["aspo.toml"].replace(old, new)


def drop(objects: list[Object], kind: str, name: str) -> None:
    objects.remove(named(objects, kind, name))


def volume(objects: list[Object], name: str, volume_name: str) -> Object:
    found: Object = next(v for v in pod(workload(objects, name))["volumes"] if v["name"] == volume_name)
    return found


MEETING = "--rdzv-endpoint=learner-0.learner-nodes:29500"
OWN_NAME = "--local-addr=learner-$(JOB_COMPLETION_INDEX).learner-nodes"


def service(objects: list[Object], name: str) -> Object:
    spec: Object = named(objects, "Service", name)["spec"]
    return spec


def budget(objects: list[Object]) -> Object:
    return named(objects, "PodDisruptionBudget", LEARNER)


def edit_flag(objects: list[Object], old: str, new: str) -> None:
    arguments = main(objects, LEARNER)["args"]
    arguments[arguments.index(old)] = new


G, M, A, X, N = "gpu-pool", "monitoring", "autoscaling", "external-redis", "multi-node"
MUTANTS: dict[str, tuple[str, str, Mutation]] = {
    "a misspelt field": ("schema", G, lambda o: main(o, LEARNER).update(livenessprobe={})),
    "a wrong type": ("schema", G, lambda o: workload(o, ACTOR)["spec"].update(replicas="4")),
    "a misspelt trigger": ("schema", A, lambda o: trigger(o).update(querry="x")),
    "a misspelt alert": ("schema", M, lambda o: rule(o).update(exp="x")),
    "a misspelt endpoint": (
        "schema",
        M,
        lambda o: named(o, "ServiceMonitor", "aspo")["spec"]["endpoints"][0].update(prot="http"),
    ),
    "a service without pods": (
        "selectors",
        G,
        lambda o: named(o, "Service", LEARNER)["spec"]["selector"].update({manifests.NAME: "lerner"}),
    ),
    "a budget for nobody": (
        "selectors",
        G,
        lambda o: of_kind(o, "PodDisruptionBudget")[0]["spec"]["selector"].update(matchLabels={"a": "b"}),
    ),
    "pods that are not one's own": ("selectors", G, lambda o: manifests.labels(workload(o, ACTOR)).clear()),
    "an autoscaler of nothing": (
        "selectors",
        A,
        lambda o: named(o, "ScaledObject", ACTOR)["spec"]["scaleTargetRef"].update(name="actors"),
    ),
    "a monitor of nothing": (
        "selectors",
        M,
        lambda o: named(o, "ServiceMonitor", "aspo")["spec"]["selector"].update(matchLabels={"a": "b"}),
    ),
    "the actor's port is the learner's": (
        "ports",
        G,
        lambda o: main(o, ACTOR)["ports"][0].update(containerPort=8000),
    ),
    "a probe of no route": (
        "ports",
        G,
        lambda o: main(o, ACTOR)["livenessProbe"]["httpGet"].update(path="/healthz"),
    ),
    "a probe of a port unnamed": (
        "ports",
        G,
        lambda o: main(o, LEARNER)["readinessProbe"]["httpGet"].update(port="web"),
    ),
    "ready while only alive": (
        "ports",
        G,
        lambda o: main(o, LEARNER)["readinessProbe"]["httpGet"].update(path="/livez"),
    ),
    "no startup probe": ("ports", G, lambda o: main(o, LEARNER).pop("startupProbe")),
    "a service to no port": (
        "ports",
        G,
        lambda o: named(o, "Service", LEARNER)["spec"]["ports"][0].update(targetPort="web"),
    ),
    "a hook to no route": (
        "ports",
        G,
        lambda o: main(o, ACTOR)["lifecycle"]["preStop"]["exec"].update(
            command=["python", "-c", "http://127.0.0.1:8001/v1/leave"]
        ),
    ),
    "metrics under another path": (
        "ports",
        M,
        lambda o: named(o, "ServiceMonitor", "aspo")["spec"]["endpoints"][0].update(path="/prometheus"),
    ),
    "a variable that is no setting": (
        "settings",
        G,
        lambda o: set_variable(o, ACTOR, "ASPO_ACTOR__LERNER_URL", "http://learner:8000"),
    ),
    "a key that is no setting": ("settings", G, lambda o: edit_toml(o, "max_tokens", "max_token")),
    "settings that clash": ("settings", G, lambda o: edit_toml(o, "group_size = 8", "group_size = 1025")),
    "loopback only": ("settings", G, lambda o: set_variable(o, LEARNER, "ASPO_LEARNER__HOST", "127.0.0.1")),
    "a run beside its volume": ("settings", G, lambda o: set_variable(o, LEARNER, "ASPO_RUN__DIR", "/data")),
    "the actor as the learner": ("settings", G, lambda o: main(o, ACTOR)["args"].__setitem__(0, LEARNER)),
    "the learner's password for actors": (
        "settings",
        G,
        lambda o: environment(main(o, ACTOR))["ASPO_REDIS__URL"]["secretKeyRef"].update(key=LEARNER),
    ),
    "actors that advertise another port": (
        "settings",
        G,
        lambda o: set_variable(o, ACTOR, "ASPO_ACTOR__ADVERTISE_URL", "http://$(POD_IP):8002"),
    ),
    "a URL of no service": (
        "urls",
        G,
        lambda o: set_variable(o, ACTOR, "ASPO_ACTOR__LEARNER_URL", "http://aspo-learner:8000"),
    ),
    "a URL of the wrong port": (
        "urls",
        G,
        lambda o: set_variable(o, ACTOR, "ASPO_ACTOR__LEARNER_URL", "http://learner:8001"),
    ),
    "a Prometheus of nowhere": (
        "urls",
        A,
        lambda o: trigger(o)["metadata"].update(serverAddress="http://prometheus:9090"),
    ),
    "a mount of nothing": ("references", G, lambda o: main(o, ACTOR)["volumeMounts"][0].update(name="run-s")),
    "a secret without that key": (
        "references",
        G,
        lambda o: environment(main(o, ACTOR))["ASPO_REDIS__URL"]["secretKeyRef"].update(key="worker"),
    ),
    "a secret that nobody makes": (
        "references",
        G,
        lambda o: volume(o, LEARNER, "tokens")["secret"].update(secretName="token"),
    ),
    "a config map that is not there": (
        "references",
        G,
        lambda o: volume(o, LEARNER, "run")["configMap"].update(name="running"),
    ),
    "a claim that is not there": ("references", G, lambda o: drop(o, "PersistentVolumeClaim", "models")),
    "an account that is not there": ("references", G, lambda o: drop(o, "ServiceAccount", ACTOR)),
    "root": ("security", G, lambda o: pod(workload(o, ACTOR))["securityContext"].update(runAsUser=0)),
    "a writable root": (
        "security",
        G,
        lambda o: main(o, LEARNER)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "an init container that may do more": (
        "security",
        "cpu-demo",
        lambda o: pod(workload(o, LEARNER))["initContainers"][0].pop("securityContext"),
    ),
    "a token of the API": (
        "security",
        G,
        lambda o: pod(workload(o, ACTOR)).pop("automountServiceAccountToken"),
    ),
    "an account with a token": (
        "security",
        G,
        lambda o: named(o, "ServiceAccount", ACTOR).pop("automountServiceAccountToken"),
    ),
    "variables for services": ("security", G, lambda o: pod(workload(o, ACTOR)).pop("enableServiceLinks")),
    "no seccomp": ("security", G, lambda o: pod(workload(o, ACTOR))["securityContext"].pop("seccompProfile")),
    "a folder of the host": (
        "security",
        G,
        lambda o: pod(workload(o, ACTOR))["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
    ),
    "the host's network": ("security", G, lambda o: pod(workload(o, ACTOR)).update(hostNetwork=True)),
    "a namespace that admits all": (
        "security",
        G,
        lambda o: named(o, "Namespace", "aspo")["metadata"]["labels"].clear(),
    ),
    "a learner that never ends": (
        "availability",
        G,
        lambda o: set_variable(o, LEARNER, "ASPO_LEARNER__KEEP_SERVING", "false"),
    ),
    "two learners": ("availability", G, lambda o: workload(o, LEARNER)["spec"].update(replicas=2)),
    "no budget": ("availability", G, lambda o: drop(o, "PodDisruptionBudget", LEARNER)),
    "a volume for two pods": (
        "availability",
        G,
        lambda o: workload(o, LEARNER)["spec"]["volumeClaimTemplates"][0]["spec"].update(
            accessModes=["ReadWriteOnce"]
        ),
    ),
    "a grace too short": (
        "availability",
        G,
        lambda o: pod(workload(o, ACTOR)).update(terminationGracePeriodSeconds=120),
    ),
    "no drain": ("availability", G, lambda o: main(o, ACTOR).pop("lifecycle")),
    "a container without bounds": ("resources", G, lambda o: main(o, ACTOR)["resources"].pop("requests")),
    "shared memory on disk": (
        "resources",
        G,
        lambda o: volume(o, ACTOR, "shm")["emptyDir"].pop("medium"),
    ),
    "shared memory beyond the memory": (
        "resources",
        G,
        lambda o: volume(o, ACTOR, "shm")["emptyDir"].update(sizeLimit="64Gi"),
    ),
    "nowhere to write": ("resources", G, lambda o: main(o, LEARNER)["volumeMounts"].pop()),
    "an actor without a GPU": (
        "gpu_pool",
        G,
        lambda o: main(o, ACTOR)["resources"]["limits"].pop("nvidia.com/gpu"),
    ),
    "a learner on spot nodes": ("gpu_pool", G, lambda o: pod(workload(o, LEARNER)).pop("affinity")),
    "a learner that tolerates spot nodes": (
        "gpu_pool",
        G,
        lambda o: pod(workload(o, LEARNER))["tolerations"].append({"key": manifests.SPOT}),
    ),
    "actors kept off spot nodes": (
        "gpu_pool",
        G,
        lambda o: pod(workload(o, ACTOR)).update(tolerations=[{"key": "nvidia.com/gpu"}]),
    ),
    "actors on one node": (
        "gpu_pool",
        G,
        lambda o: pod(workload(o, ACTOR)).pop("topologySpreadConstraints"),
    ),
    "any node": ("gpu_pool", G, lambda o: pod(workload(o, ACTOR)).pop("nodeSelector")),
    "growth by the queue": (
        "scaling",
        A,
        lambda o: trigger(o)["metadata"].update(query="max(aspo_learner_queue_tasks)"),
    ),
    "two who count the actors": ("scaling", A, lambda o: workload(o, ACTOR)["spec"].update(replicas=4)),
    "no learner, no actors": ("scaling", A, lambda o: trigger(o)["metadata"].pop("ignoreNullValues")),
    "an average that is no ratio": ("scaling", A, lambda o: trigger(o).pop("metricType")),
    "an alert for no metric": ("queries", M, lambda o: rule(o).update(expr="absent(aspo_learner_steps)")),
    "a scaler by no metric": (
        "queries",
        A,
        lambda o: trigger(o)["metadata"].update(query="aspo_learner_waiting_seconds"),
    ),
    "an alert without advice": ("queries", M, lambda o: rule(o)["annotations"].pop("description")),
    "nothing denied": ("edges", G, lambda o: drop(o, "NetworkPolicy", "deny-all")),
    "no names": ("edges", G, lambda o: drop(o, "NetworkPolicy", "dns")),
    "names over UDP alone": ("edges", G, lambda o: policy(o, "dns")["egress"][0]["ports"].pop()),
    "no way to Redis": ("edges", G, lambda o: drop(o, "NetworkPolicy", "to-redis")),
    "Redis for all": ("edges", G, lambda o: policy(o, "redis")["ingress"][0].pop("from")),
    "no weights": ("edges", G, lambda o: policy(o, "learner").update(ingress=[])),
    "no peers": ("edges", G, lambda o: policy(o, "actor").update(ingress=[])),
    "actors that call anyone": ("edges", G, lambda o: policy(o, "actor")["egress"].append({})),
    "every port of the learner": ("edges", G, lambda o: policy(o, "learner")["ingress"][0].pop("ports")),
    "actors of other namespaces": (
        "edges",
        G,
        lambda o: policy(o, "learner")["ingress"][0]["from"][0].update(namespaceSelector={}),
    ),
    "metrics for everybody": ("edges", M, lambda o: policy(o, "metrics")["ingress"][0].pop("from")),
    "nobody scrapes": ("edges", M, lambda o: drop(o, "NetworkPolicy", "metrics")),
    "nodes that do not hear each other": ("edges", N, lambda o: drop(o, "NetworkPolicy", "learner-nodes")),
    "nodes that hear each other at the rendezvous alone": (
        "edges",
        N,
        lambda o: policy(o, "learner-nodes")["ingress"][0]["ports"].pop(),
    ),
    "every port of the nodes": (
        "edges",
        N,
        lambda o: policy(o, "learner-nodes")["ingress"][0].pop("ports"),
    ),
    "a port that nobody names": ("ports", N, lambda o: main(o, LEARNER)["ports"].pop()),
    "another program": ("settings", N, lambda o: edit_flag(o, "aspo_cli", "aspo_learner")),
    "a GPU too few": (
        "gpu_pool",
        N,
        lambda o: main(o, LEARNER)["resources"]["limits"].update({"nvidia.com/gpu": "4"}),
    ),
    "a node too many": ("torchrun", N, lambda o: workload(o, LEARNER)["spec"].update(completions=3)),
    "ranks without GPUs": ("torchrun", N, lambda o: edit_flag(o, "--nproc-per-node=8", "--nproc-per-node=9")),
    "pods without names": (
        "torchrun",
        N,
        lambda o: workload(o, LEARNER)["spec"].update(completionMode="NonIndexed"),
    ),
    "a shutdown beyond the grace": (
        "torchrun",
        N,
        lambda o: edit_flag(o, "--shutdown-timeout=540", "--shutdown-timeout=600"),
    ),
    "a budget for one node": ("torchrun", N, lambda o: budget(o)["spec"].update(minAvailable=1)),
    "any node is asked": ("torchrun", N, lambda o: service(o, LEARNER)["selector"].pop(manifests.INDEX)),
    "a run on one node": (
        "torchrun",
        N,
        lambda o: named(o, "PersistentVolumeClaim", "runs")["spec"].update(accessModes=["ReadWriteOnce"]),
    ),
    "a rendezvous of nobody": ("torchrun", N, lambda o: edit_flag(o, MEETING, MEETING.replace("-0", "-x"))),
    "a rendezvous elsewhere": ("torchrun", N, lambda o: edit_flag(o, MEETING, MEETING.replace("r-n", "r-m"))),
    "a rendezvous at no port": ("torchrun", N, lambda o: edit_flag(o, MEETING, MEETING.replace("95", "96"))),
    "ranks in any order": ("torchrun", N, lambda o: edit_flag(o, OWN_NAME, "--local-addr=$(POD_IP)")),
    "a balanced name": ("torchrun", N, lambda o: service(o, "learner-nodes").update(clusterIP="10.0.0.1")),
    "names for the ready": (
        "torchrun",
        N,
        lambda o: service(o, "learner-nodes").pop("publishNotReadyAddresses"),
    ),
    "a Redis anywhere": (
        "edges",
        X,
        lambda o: policy(o, "to-redis")["egress"][0]["to"][0]["ipBlock"].update(cidr="0.0.0.0/0"),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_check_catches_its_mutant(mutant: str, tmp_path: Path) -> None:
    check, overlay, mutate = MUTANTS[mutant]
    objects = copy.deepcopy(rendered(overlay))
    mutate(objects)
    assert findings(check, overlay, objects, tmp_path)


def test_every_check_has_a_mutant() -> None:
    assert {check for check, _ in CHECKS} == {check for check, _, _ in MUTANTS.values()}
