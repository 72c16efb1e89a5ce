"""What kubectl makes of k8s/, once for the session, and the pods in it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import PATIENCE_S

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = ("dev", "train", "sample", "sweep", "generate", "evaluate")


@dataclass(frozen=True)
class Pod:
    """A pod template. where: overlay/kind/role; role: head, worker, submitter or other."""

    where: str
    role: str
    kind: str
    template: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        return self.spec["containers"][0]

    @property
    def labels(self) -> dict[str, str]:
        made = {"ray.io/node-type": self.role} if self.role in ("head", "worker") else {}
        return self.template["metadata"]["labels"] | made


@pytest.fixture(scope="session")
def built() -> dict[str, list[dict[str, Any]]]:
    """Overlay (and platform) -> its objects, built by kubectl's kustomize."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: the overlays can't be built")
    places = {name: K8S / "overlays" / name for name in OVERLAYS} | {"platform": K8S / "base" / "platform"}
    found = {}
    for name, place in places.items():
        done = subprocess.run(["kubectl", "kustomize", str(place)], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{place}: {done.stderr}"
        assert "deprecated" not in done.stderr, done.stderr
        found[name] = [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]
    return found


def ray_cluster(one: dict[str, Any]) -> dict[str, Any] | None:
    """The spec of the Ray cluster in an object."""
    spec = one.get("spec", {})
    return {"RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig"), "RayCluster": spec}.get(
        one["kind"]
    )


def _pods(overlay: str, one: dict[str, Any]) -> Iterator[Pod]:
    kind, spec = one["kind"], one.get("spec", {})
    if cluster := ray_cluster(one):
        yield Pod(f"{overlay}/{kind}/head", "head", kind, cluster["headGroupSpec"]["template"])
        for group in cluster["workerGroupSpecs"]:
            yield Pod(f"{overlay}/{kind}/{group['groupName']}", "worker", kind, group["template"])
        if kind == "RayJob":
            yield Pod(f"{overlay}/{kind}/submitter", "submitter", kind, spec["submitterPodTemplate"])
    elif kind in ("Deployment", "StatefulSet"):
        yield Pod(f"{overlay}/{kind}/{one['metadata']['name']}", "other", kind, spec["template"])


@pytest.fixture(scope="session")
def pods(built: dict[str, list[dict[str, Any]]]) -> list[Pod]:
    found = [pod for overlay, objects in built.items() for one in objects for pod in _pods(overlay, one)]
    assert len(found) >= 2 * len(OVERLAYS)
    return found


@pytest.fixture(scope="session")
def clusters(built: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Overlay -> the object that holds its Ray cluster."""
    return {name: next(o for o in objects if ray_cluster(o)) for name, objects in built.items() if name != "platform"}


@pytest.fixture(scope="session")
def specs(clusters: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Overlay -> spec of its Ray cluster."""
    return {name: ray_cluster(one) or {} for name, one in clusters.items()}
