"""Every private name of Ray that commands use, each looked for before it is used; training's are in `trainer/on_ray/`.

Ray 2.57 to 2.60 have all of them. Where a version lacks one, a line says what is weaker, once, and the public behaviour
is what happens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from scoreray.cluster.display import say

GCS_PORT = "ray._private.node.wait_for_persisted_port"
RAYLET_NODE = "ray._private.services.get_node"
PRINTED_LINES = "ray._private.worker.print_to_stdstream"
KEY_VALUE = "ray.experimental.internal_kv._internal_kv_get"
AUTOSCALER = "ray.autoscaler.v2.sdk.get_cluster_status"
GCS_CLIENT = "ray._raylet.GcsClient"
SERVE_CLIENT = "ray.serve.context._get_global_client"

WITHOUT = {
    GCS_PORT: "while Ray starts, Ctrl-C is seen once its GCS is there",
    RAYLET_NODE: "its raylet has half a minute to start, also on a busy machine",
    PRINTED_LINES: "Ray's own lines, and with --verbose those of its workers, are printed on standard output",
    KEY_VALUE: "nodes that its first autoscaler could add are not waited for",
    AUTOSCALER: "nodes that its second autoscaler could add are not waited for",
    GCS_CLIENT: "a node can't be drained before it goes away: workers on it go on from the last commit",
    SERVE_CLIENT: "where a Serve listens that runs already can't be read: it has to be shut down first",
}
"""Private name -> what is weaker without it."""


def hook(path: str) -> Any:
    """The object of a private name; None, after a line, where this version of Ray has none. Imports Ray."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _note(path)
        return None


@functools.cache
def _note(path: str) -> None:
    say(f"note: Ray {version('ray')} has no {path}: {WITHOUT[path]}")


@contextlib.contextmanager
def replaced(path: str, by: Callable[[Any], Any]) -> Iterator[None]:
    """While the block runs, Ray calls `by(original)` where it would call the private function `path`."""
    original = hook(path)
    if original is None:
        yield
        return
    module, _, name = path.rpartition(".")
    holder = importlib.import_module(module)
    setattr(holder, name, by(original))
    try:
        yield
    finally:
        setattr(holder, name, original)
