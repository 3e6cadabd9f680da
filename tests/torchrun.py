"""What must agree where a learner runs on several nodes: the Job, torchrun's arguments, names and budget."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edges import Object
from manifests import INDEX, budget_of, main, of_kind, pod, workload

LEARNER = "learner"
ENDPOINT = re.compile(r"([a-z-]+)-0\.([a-z-]+):(\d+)")


def flags(container: Object) -> dict[str, str]:
    """The arguments of torchrun itself, those before -m."""
    own = container["args"][: container["args"].index("-m")]
    return dict(argument.removeprefix("--").split("=", 1) for argument in own)


def check_torchrun(objects: list[Object]) -> Iterator[str]:
    """Every rank finds every other, there are as many as are waited for, and one of them serves."""
    job = workload(objects, LEARNER)
    given, spec, container = flags(main(objects, LEARNER)), job["spec"], main(objects, LEARNER)
    if not given["nnodes"] == str(spec["completions"]) == str(spec["parallelism"]):
        yield "there are not as many nodes as torchrun waits for"
    if given["nproc-per-node"] != container["resources"]["limits"]["nvidia.com/gpu"]:
        yield "there are not as many GPUs as ranks on a node"
    if spec["completionMode"] != "Indexed" or pod(job)["restartPolicy"] != "Never":
        yield "pods have no names, or are started again by two"
    if not int(given["shutdown-timeout"]) + 30 <= pod(job)["terminationGracePeriodSeconds"]:
        yield "ranks are killed before they have written their checkpoint"
    if budget_of(objects, job)["spec"].get("minAvailable") != spec["completions"]:
        yield "a drain may evict one of the nodes"
    yield from _check_names(objects, job, given)
    (service,) = (each for each in of_kind(objects, "Service") if each["metadata"]["name"] == LEARNER)
    if service["spec"]["selector"].get(INDEX) != "0":
        yield "the service leads to nodes that do not serve"
    for claim in ("runs", "models"):
        found = (c for c in of_kind(objects, "PersistentVolumeClaim") if c["metadata"]["name"] == claim)
        if [each["spec"]["accessModes"] for each in found] != [["ReadWriteMany"]]:
            yield f"only one node can mount {claim}"


def _check_names(objects: list[Object], job: Object, given: dict[str, str]) -> Iterator[str]:
    """The rendezvous is the first pod by its name, and ranks go by such names."""
    match = ENDPOINT.fullmatch(given["rdzv-endpoint"])
    subdomain, ports = pod(job).get("subdomain"), main(objects, LEARNER)["ports"]
    if given["rdzv-backend"] != "c10d" or match is None:
        yield f"nobody keeps the rendezvous at {given['rdzv-endpoint']}"
        return
    if match[1] != job["metadata"]["name"] or match[2] != subdomain:
        yield f"{given['rdzv-endpoint']} is no pod"
    if given["local-addr"] != f"{match[1]}-$(JOB_COMPLETION_INDEX).{match[2]}":
        yield "ranks do not go by the pods' names, so any of them may be the one that serves"
    if int(match[3]) not in {port["containerPort"] for port in ports}:
        yield f"nobody listens on {match[3]}"
    headless = [each for each in of_kind(objects, "Service") if each["metadata"]["name"] == subdomain]
    if not headless or headless[0]["spec"].get("clusterIP") != "None":
        yield f"{subdomain} gives the pods no names"
    elif not headless[0]["spec"].get("publishNotReadyAddresses"):
        yield f"{subdomain} knows pods only once they are ready, for which they need each other"
