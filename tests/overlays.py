"""The overlays of deploy/kubernetes, what each is to permit, and which checks of `manifests` go for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import manifests
import torchrun
from edges import OF_TORCH, Object
from kustomize import render

ROOT = Path(__file__).parents[1]
KUBERNETES, DOCS = ROOT / "deploy" / "kubernetes", ROOT / "docs" / "deploy.md"
OVERLAYS = ("cpu-demo", "gpu-pool", "monitoring", "autoscaling", "external-redis", "multi-node")
ON_GPUS = OVERLAYS[1:]
LEARNER, ACTOR = "learner", "actor"
DESIGN = {
    (LEARNER, "redis", 6379, "TCP"),
    (ACTOR, "redis", 6379, "TCP"),
    (ACTOR, LEARNER, 8000, "TCP"),
    (ACTOR, ACTOR, 8001, "TCP"),
    *((role, "dns", 53, protocol) for role in (LEARNER, ACTOR) for protocol in ("TCP", "UDP")),
}
SCRAPING = {("prometheus", LEARNER, 8000, "TCP"), ("prometheus", ACTOR, 8001, "TCP")}
ELSEWHERE = {(source, "their-redis", port, how) for source, target, port, how in DESIGN if target == "redis"}
EDGES = {
    "cpu-demo": DESIGN,
    "gpu-pool": DESIGN,
    "monitoring": DESIGN | SCRAPING,
    "autoscaling": DESIGN | SCRAPING,
    "external-redis": {edge for edge in DESIGN if edge[1] != "redis"} | ELSEWHERE,
    "multi-node": DESIGN | {(LEARNER, LEARNER, port, "TCP") for port in OF_TORCH},
}


@cache
def rendered(overlay: str) -> list[Object]:
    return render(KUBERNETES / "overlays" / overlay)


@cache
def secrets() -> manifests.Secrets:
    """What secrets.sh makes; nothing of it is used anywhere else."""
    text = subprocess.run([KUBERNETES / "secrets.sh"], capture_output=True, text=True, check=True).stdout
    return {each["metadata"]["name"]: each["stringData"] for each in yaml.safe_load_all(text)}


def findings(check: str, overlay: str, objects: list[Object], folder: Path) -> list[str]:
    """Run one check of `manifests` by name."""
    more: dict[str, tuple[Any, ...]] = {
        "ports": (manifests.routes(folder.parent),),
        "references": (secrets(),),
        "settings": (secrets(), folder),
        "edges": (EDGES[overlay],),
    }
    module = torchrun if check == "torchrun" else manifests
    found: Iterator[str] = getattr(module, f"check_{check}")(objects, *more.get(check, ()))
    return list(found)


CHECKS = [
    *(
        (check, overlay)
        for overlay in OVERLAYS
        for check in (
            "schema",
            "selectors",
            "ports",
            "settings",
            "urls",
            "references",
            "security",
            "availability",
            "resources",
            "queries",
            "edges",
        )
    ),
    *(("gpu_pool", overlay) for overlay in ON_GPUS),
    ("scaling", "autoscaling"),
    ("torchrun", "multi-node"),
]
