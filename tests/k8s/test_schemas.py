"""Every overlay builds, and every object is what Kubernetes and KubeRay take: no field that they do not know.

schemas/: the v1 schemas of KubeRay 1.7's custom resources (Apache-2.0), without their descriptions.
"""

from __future__ import annotations

import copy
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

VERSION = "1.34"
SCHEMAS = Path(__file__).parent / "schemas"
TEXT, LABELS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


SELECTOR = _object([], matchLabels=LABELS)
SMALL = {  # the fields that are used here, of the operators' own schemas
    "PodMonitor": _object(
        ["spec"],
        spec=_object(
            ["selector", "podMetricsEndpoints"],
            selector=SELECTOR,
            jobLabel=TEXT,
            podTargetLabels={"type": "array", "items": TEXT},
            podMetricsEndpoints={
                "type": "array",
                "items": _object(
                    ["port"],
                    port=TEXT,
                    path=TEXT,
                    interval={"type": "string", "pattern": "^[0-9]+s$"},
                    authorization=_object([], type=TEXT, credentials=_object(["key"], name=TEXT, key=TEXT)),
                ),
            },
        ),
    ),
    "LocalQueue": _object(["spec"], spec=_object(["clusterQueue"], clusterQueue=TEXT)),
}


def closed(schema: Any) -> Any:
    """The schema with every object that names its fields closed to others, as a strict API server takes it."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                with_defaults(value[name], inner)
    elif isinstance(value, list):
        for one in value:
            with_defaults(one, schema.get("items", {}))
    return value


@cache
def schema_of(kind: str) -> dict[str, Any]:
    if kind in SMALL:
        found = copy.deepcopy(SMALL[kind])
        found["properties"] |= {"apiVersion": TEXT, "kind": TEXT, "metadata": {"type": "object"}}
        return closed(found)
    return closed(json.loads(gzip.decompress((SCHEMAS / f"{kind}.json.gz").read_bytes())))


def check(one: dict[str, Any]) -> None:
    if one["apiVersion"].startswith(("ray.io/", "monitoring.coreos.com/", "kueue.x-k8s.io/")):
        schema = schema_of(one["kind"])
        jsonschema.Draft7Validator(schema).validate(with_defaults(copy.deepcopy(one), schema))
    else:
        kubernetes_validate.validate(one, VERSION, strict=True)


def test_every_object_is_valid(built: dict[str, list[dict[str, Any]]]) -> None:
    for objects in built.values():
        for one in objects:
            check(one)


def test_pod_templates_in_ray_objects_are_pods_to_kubernetes(pods: list[Any]) -> None:
    for pod in pods:
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **pod.template["metadata"]}}
        kubernetes_validate.validate(made | {"spec": pod.spec}, VERSION, strict=True)


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "entrypoint_"),
        ("spec", "rayClusterSpec", "gcsFaultTolerance"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "hostNetworks"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resource"),
    ],
)
def test_unknown_fields_are_refused(clusters: dict[str, dict[str, Any]], path: tuple[Any, ...]) -> None:
    job = copy.deepcopy(clusters["train"])
    at = job
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError, match=str(path[-1])):
        check(job)


def test_unknown_fields_are_refused_in_core_kinds_too(built: dict[str, list[dict[str, Any]]]) -> None:
    one = next(o for o in built["platform"] if o["kind"] == "NetworkPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(one | {"spec": one["spec"] | {"ingres": []}})


def test_objects_are_in_our_namespace_and_names_do_not_collide(built: dict[str, list[dict[str, Any]]]) -> None:
    seen = set()
    for overlay, objects in built.items():
        for one in objects:
            if one["kind"] not in ("Namespace", "PriorityClass"):
                assert one["metadata"]["namespace"] == "scoreray", (overlay, one["kind"], one["metadata"]["name"])
            key = (one["kind"], one["metadata"]["name"])
            assert key not in seen, f"{key} is in two overlays: deleting one would take it from the other"
            seen.add(key)
