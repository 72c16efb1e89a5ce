"""The machine or cluster that `scoreray doctor` plans a run for: as options say, as Ray says, or this one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from scoreray.data.errors import UserError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Machine:
    """What a run is to be planned for where this machine is not it; None: as on this one."""

    memory_bytes: int | None = None
    num_nodes: int | None = None
    image_shape: tuple[int, ...] | None = None
    gpus_per_node: int | None = None
    gpu: str = ""
    """what a GPU is called; "": not known"""

    def on_nodes(self, nodes: Iterable[Mapping[str, float]]) -> Machine:
        """With what the nodes of a cluster have: resources of each, as `ray.nodes()` gives them."""
        most: Mapping[str, float] = max(nodes, key=lambda has: has.get("GPU", 0), default={})
        if not most.get("GPU"):
            return self
        return replace(self, gpus_per_node=int(most["GPU"]), gpu=gpu_kind(most))


def gpu_kind(resources: Mapping[str, float]) -> str:
    """Of a node, as Ray names it ("H100"); "" where it does not."""
    return next((key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")), "")


def parse_bytes(text: str) -> int:
    """ "80G", "80GiB", "512M": powers of 1024. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text}: write a size such as 80G or 512M")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3x64x64" as (3, 64, 64). Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise UserError(f"--shape {text}: write channels, height and width such as 3x64x64")
    return tuple(map(int, text.split("x")))


def gib(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB" or (unit == "GiB" and num_bytes < 10_000):
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
