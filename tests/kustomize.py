"""Renders kustomize overlays as `kubectl kustomize` does, for machines without it.

Only what deploy/kubernetes uses: resources, components, strategic-merge patches, images, namespace and config
maps from files. `tests/deploy/test_kubernetes.py` compares the two where kubectl is there.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KUBECTL = shutil.which("kubectl")
_KNOWN = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "components",
    "patches",
    "images",
    "configMapGenerator",
}
_MERGE_KEYS = ("name", "mountPath", "containerPort")  # of the lists that are merged by element
_MERGED_LISTS = {"containers", "initContainers", "volumes", "env", "volumeMounts"}
_CLUSTER_WIDE = {"Namespace"}


def render(folder: Path) -> list[Object]:
    """An overlay's objects, from kubectl if there is one."""
    if KUBECTL is None:
        return build(folder)
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def build(folder: Path) -> list[Object]:
    """An overlay's objects, but for the digests that kubectl adds to the names of config maps."""
    objects: list[Object] = []
    _accumulate(folder, objects)
    return objects


def _accumulate(folder: Path, objects: list[Object]) -> None:
    """Add a folder's objects to those there are, and apply its patches to all of them."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(spec) <= _KNOWN, f"{folder}: {set(spec) - _KNOWN} is not rendered here; see kustomize.py"
    own: list[Object] = objects if spec["kind"] == "Component" else []
    for name in spec.get("resources", []):
        path = folder / name
        if path.is_dir():
            _accumulate(path, own)
        else:
            own += yaml.safe_load_all(path.read_text())
    own += [_config_map(folder, entry) for entry in spec.get("configMapGenerator", [])]
    for name in spec.get("components", []):
        _accumulate(folder / name, own)
    for patch in spec.get("patches", []):
        _apply(own, yaml.safe_load(patch.get("patch") or (folder / patch["path"]).read_text()))
    for each in own:
        if "namespace" in spec and each["kind"] not in _CLUSTER_WIDE:
            each["metadata"]["namespace"] = spec["namespace"]
    _retag(own, {image["name"]: image["newTag"] for image in spec.get("images", [])})
    if own is not objects:
        objects += own


def _config_map(folder: Path, entry: Object) -> Object:
    data = {name: (folder / name).read_text() for name in entry["files"]}
    metadata = {"name": entry["name"], **entry.get("options", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _apply(objects: list[Object], patch: Object) -> None:
    target = next(each for each in objects if _identity(each) == _identity(patch))
    if patch.get("$patch") == "delete":
        objects.remove(target)
    else:
        _merge(target, patch)


def _identity(each: Object) -> tuple[str, str, str]:
    return each["apiVersion"], each["kind"], each["metadata"]["name"]


def _merge(base: Object, patch: Object) -> None:
    """Merge as strategic-merge patches do; null removes a key, and most lists are replaced."""
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        elif key in _MERGED_LISTS and key in base:
            _merge_list(base[key], value)
        else:
            base[key] = copy.deepcopy(value)


def _merge_list(base: list[Object], patch: list[Object]) -> None:
    """Merge elements of one key; those of the patch come first."""
    merged = []
    for element in copy.deepcopy(patch):
        key = next(key for key in _MERGE_KEYS if key in element)
        found = next((each for each in base if each.get(key) == element[key]), None)
        if found is not None:
            base.remove(found)
            _merge(found, element)
        merged.append(found or element)
    base[:0] = merged


def _retag(objects: list[Object], tags: dict[str, str]) -> None:
    for template in (each["spec"]["template"] for each in objects if "template" in each.get("spec", {})):
        spec = template["spec"]
        for container in spec["containers"] + spec.get("initContainers", []):
            name = container["image"].rpartition(":")[0]
            if name in tags:
                container["image"] = f"{name}:{tags[name]}"
