"""How fast training would be on many GPUs, by an alpha-beta model of each way to shard. See docs/scaling.md.

A collective costs latency (alpha) for each hop and time (1/beta) for each byte, inside a node and between nodes. What
does not hide behind computing lengthens the step; efficiency is computing over the step. The page's tables are printed
by `python docs/tools/scaling.py`, and a test reproduces them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scoreray.trainer.engine.overlap import bucket_elements

WAYS = ("zero0", "zero1", "zero2", "zero3", "hpz")
SIZES = (8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Bandwidths are what one GPU moves each way, bytes/s; latencies are of one hop, s."""

    gpus_per_node: int = 8
    flops_per_s: float = 989e12  # bf16, dense: data sheet of H100 and H200 SXM
    mfu: float = 0.5  # goal of benchmarks/gpu.py, not measured here
    inside_bytes_per_s: float = 350e9  # of NVLink 4's 450 (assumption: what NCCL attains)
    between_bytes_per_s: float = 42e9  # of a 400 Gb/s adapter for each GPU, 50 (assumption)
    inside_latency_s: float = 3e-6  # assumption
    between_latency_s: float = 12e-6  # assumption
    pipelined: bool = True  # of a sum's parts inside a node and between nodes the slower one counts, not both


@dataclass(frozen=True)
class Work:
    """A network and what one GPU computes of it in a step."""

    num_params: float
    flops_per_image: float  # forward and backward
    images_per_gpu: float
    num_layers: int = 28
    weight_bytes: int = 2
    gradient_bytes: int = 4  # gradients are summed in fp32


# DiT-XL/2 at 256 x 256 (Peebles and Xie 2023: 118.6 GMAC forward), and one of the same shape that is wider and deeper.
WORKS = {
    "DiT-XL, 675 M parameters, 32 images a GPU": Work(675e6, 0.712e12, 32),
    "DiT-XL, 675 M parameters, 64 images a GPU": Work(675e6, 0.712e12, 64),
    "DiT of 5 B parameters (assumption: 5.3 TFLOP an image), 32 images a GPU": Work(5e9, 5.3e12, 32, num_layers=48),
}
OVERLAP = 0.9  # of the computing that communication may hide behind: kernels of both share a GPU (assumption)


def all_gather_s(num_bytes: float, num_gpus: int, cluster: Cluster) -> float:
    """Seconds in which every GPU gets `num_bytes` that all hold a part of, as rings over all; also a reduce-scatter."""
    inside = min(num_gpus, cluster.gpus_per_node)
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    hops = (num_gpus - nodes) * cluster.inside_latency_s + (nodes - 1) * cluster.between_latency_s
    within = num_bytes * (inside - 1) / inside / cluster.inside_bytes_per_s
    across = num_bytes * (nodes - 1) / nodes / (inside * cluster.between_bytes_per_s)
    return hops + max(within, across)


def all_reduce_s(num_bytes: float, num_gpus: int, cluster: Cluster) -> float:
    """Seconds of a sum over all: scattered inside a node, summed between nodes along a tree, gathered inside."""
    if num_gpus == 1:
        return 0.0
    inside = min(num_gpus, cluster.gpus_per_node)
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    within = 2 * num_bytes * (inside - 1) / inside / cluster.inside_bytes_per_s
    across = 2 * num_bytes / inside * (nodes - 1) / nodes / cluster.between_bytes_per_s
    hops = 2 * (inside - 1) * cluster.inside_latency_s + 2 * math.ceil(math.log2(nodes)) * cluster.between_latency_s
    return hops + (max(within, across) if cluster.pipelined else within + across)


def step_s(way: str, num_gpus: int, work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of computing in a step, and of communication that nothing hides."""
    compute = work.images_per_gpu * work.flops_per_image / (cluster.flops_per_s * cluster.mfu)
    forward, backward = compute / 3, 2 * compute / 3
    weights, gradients = work.num_params * work.weight_bytes, work.num_params * work.gradient_bytes
    layers, node = work.num_layers, min(num_gpus, cluster.gpus_per_node)

    def scatter(num_bytes: float) -> float:  # bucket by bucket, of the size of a layer
        return layers * all_gather_s(num_bytes / layers, num_gpus, cluster)

    if way == "zero0":  # as FlatEngine has it: bucket by bucket; the last one has nothing to hide behind
        bucket = bucket_elements(int(work.num_params))
        one = all_reduce_s(bucket * work.gradient_bytes, num_gpus, cluster)
        exposed = _left(math.ceil(work.num_params / bucket) * one, backward) + one
    elif way in ("zero1", "zero2"):
        one = all_gather_s(gradients / layers, num_gpus, cluster)
        exposed = _left(scatter(gradients), backward) + one + all_gather_s(weights, num_gpus, cluster)
    elif way == "zero3":
        first = all_gather_s(weights / layers, num_gpus, cluster)
        exposed = _left(scatter(weights), forward) + _left(scatter(weights) + scatter(gradients), backward) + first
    else:
        first = all_gather_s(weights / layers, num_gpus, cluster)
        again = layers * all_gather_s(weights / layers, node, cluster)
        exposed = _left(scatter(weights), forward) + _left(again + scatter(gradients), backward) + first
    return compute, exposed


def _left(communication_s: float, compute_s: float) -> float:
    return max(0.0, communication_s - OVERLAP * compute_s)


def efficiency(way: str, num_gpus: int, work: Work, cluster: Cluster = Cluster()) -> float:
    """Computing over the step's time, against one GPU that communicates with none."""
    compute, exposed = step_s(way, num_gpus, work, cluster)
    return compute / (compute + exposed)


def table(work: Work, cluster: Cluster = Cluster()) -> str:
    """Markdown: a row for each way, a column for each number of GPUs."""
    lines = ["| | " + " | ".join(f"{n:,}" for n in SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for way in WAYS:
        cells = " | ".join(f"{efficiency(way, n, work, cluster):.1%}" for n in SIZES)
        lines.append(f"| `{way}` | {cells} |")
    return "\n".join(lines)


def table_of_zero0() -> str:
    """Markdown: zero_stage 0 where the two parts of a sum are not pipelined; a row for each network."""
    lines = ["| `zero0` | " + " | ".join(f"{n:,}" for n in SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for name, work in WORKS.items():
        cells = " | ".join(f"{efficiency('zero0', n, work, replace(Cluster(), pipelined=False)):.1%}" for n in SIZES)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name, work in WORKS.items():
        print(f"{name}\n\n{table(work)}\n")
    print(table_of_zero0())
