"""How long a training step takes on many GPUs, predicted for each way to shard: an alpha-beta model (docs/scaling.md).

A collective costs latency (alpha) for each hop and time (1/beta) for each byte, inside a node and between nodes. What
does not hide behind computing lengthens the step. Which collectives a stage has, and how often, is what our engines do:
`trainer/engine/overlap.py` at stage 0, DeepSpeed with the settings of `trainer/engine/deepspeed.py` above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scoreray.trainer.engine.buckets import bucket_elements, bucket_sizes

Stage = Literal[0, 1, 2, 3]

# Of one GPU, by data sheet: bf16 FLOP/s without sparsity, and bytes/s each way to others of its node (NVLink; PCIe 4 of
# an L40S). A name not listed is taken as the first.
GPUS: dict[str, tuple[float, float]] = {
    "H100": (989e12, 450e9),
    "H200": (989e12, 450e9),
    "B200": (2250e12, 900e9),
    "A100": (312e12, 300e9),
    "L40S": (362e12, 32e9),
}
MFU = 0.5  # the goal of benchmarks/gpu.py; a lower one leaves more time to hide communication behind
# Of these links' rates: what NCCL attains inside a node and between nodes (assumption).
INSIDE, BETWEEN = 350 / 450, 0.84
GBIT_S = 400.0  # of one adapter for each GPU, as in nodes of H100 (assumption; a config's engine.internode_gbit_s)
OVERLAP = 0.9  # of the computing that communication may hide behind: kernels of both share a GPU (assumption)


@dataclass(frozen=True)
class Sharding:
    """A ZeRO stage, and at stage 3 how many ranks hold a second copy of the weights among them (hpZ; 1: none)."""

    stage: Stage
    partition_group: int = 1

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}" + (f" in groups of {self.partition_group}" if self.partition_group > 1 else "")


def shardings(world_size: int, ranks_per_node: int, lowest: Stage = 0, highest: Stage = 3) -> Iterator[Sharding]:
    """Every way to shard over so many ranks, preferred ones first; a partition group is the ranks of a node.

    Stage 3 with a group comes before it without: as quick by any bandwidth, it suffers less where one was overrated.
    """
    stages: tuple[Stage, ...] = (0, 1, 2, 3)
    for stage in stages[lowest : highest + 1]:
        if stage == 3 and 1 < ranks_per_node < world_size and world_size % ranks_per_node == 0:
            yield Sharding(3, ranks_per_node)
        yield Sharding(stage)


@dataclass(frozen=True)
class GpuNodes:
    """Nodes of GPUs. Bandwidths are what one GPU moves each way, bytes/s; latencies are of one hop, s."""

    gpus_per_node: int = 8
    flops_per_s: float = GPUS["H100"][0] * MFU
    inside_bytes_per_s: float = GPUS["H100"][1] * INSIDE
    between_bytes_per_s: float = GBIT_S / 8 * 1e9 * BETWEEN
    inside_latency_s: float = 3e-6  # assumption
    between_latency_s: float = 12e-6  # assumption
    pipelined: bool = True  # of a sum's parts inside a node and between nodes the slower one counts, not both

    @classmethod
    def of(cls, gpu: str, gpus_per_node: int, gbit_s: float = GBIT_S) -> GpuNodes:
        """gpu: a name that holds one of `GPUS`, as torch and Ray give them.  gbit_s: between nodes, of each GPU."""
        flops, link = next((rates for name, rates in GPUS.items() if name in gpu), next(iter(GPUS.values())))
        return cls(gpus_per_node, flops * MFU, link * INSIDE, gbit_s / 8 * 1e9 * BETWEEN)

    def __str__(self) -> str:
        return (
            f"assumed of a GPU: {self.flops_per_s / 1e12:,.0f} TFLOP/s, {self.inside_bytes_per_s / 1e9:,.0f} GB/s "
            f"inside a node, {self.between_bytes_per_s / 1e9:,.3g} GB/s between nodes"
        )


@dataclass(frozen=True)
class Work:
    """A network and what one GPU computes of it in a step."""

    num_params: float
    flops_per_image: float  # forward and backward
    images_per_gpu: float
    num_layers: int = 28  # at stage 3, each is gathered and scattered for itself
    num_micro_batches: int = 1
    num_frozen: float = 0.0  # beside num_params
    weight_bytes: int = 2
    gradient_bytes: int = 4  # gradients are summed in fp32


@dataclass(frozen=True)
class StepTime:
    """Seconds of computing in a step, and of communication that nothing hides."""

    compute_s: float
    exposed_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def efficiency(self) -> float:
        """Computing over the step's time, against one GPU that communicates with none."""
        return self.compute_s / self.total_s if self.compute_s else 0.0


def all_gather_s(num_bytes: float, num_gpus: int, nodes: GpuNodes) -> float:
    """Seconds in which every GPU gets `num_bytes` that all hold a part of, as rings over all; also a reduce-scatter."""
    inside = min(num_gpus, nodes.gpus_per_node)
    count = math.ceil(num_gpus / nodes.gpus_per_node)
    hops = (num_gpus - count) * nodes.inside_latency_s + (count - 1) * nodes.between_latency_s
    within = num_bytes * (inside - 1) / inside / nodes.inside_bytes_per_s
    across = num_bytes * (count - 1) / count / (inside * nodes.between_bytes_per_s)
    return hops + max(within, across)


def all_reduce_s(num_bytes: float, num_gpus: int, nodes: GpuNodes) -> float:
    """Seconds of a sum over all: scattered inside a node, summed between nodes along a tree, gathered inside."""
    if num_gpus == 1:
        return 0.0
    inside = min(num_gpus, nodes.gpus_per_node)
    count = math.ceil(num_gpus / nodes.gpus_per_node)
    within = 2 * num_bytes * (inside - 1) / inside / nodes.inside_bytes_per_s
    across = 2 * num_bytes / inside * (count - 1) / count / nodes.between_bytes_per_s
    hops = 2 * (inside - 1) * nodes.inside_latency_s + 2 * math.ceil(math.log2(count)) * nodes.between_latency_s
    return hops + (max(within, across) if nodes.pipelined else within + across)


def step_time(sharding: Sharding, num_gpus: int, work: Work, nodes: GpuNodes) -> StepTime:
    """The prediction for one step of the global batch on `num_gpus` GPUs."""
    compute = work.images_per_gpu * work.flops_per_image / nodes.flops_per_s
    micro = work.num_micro_batches
    forward, backward = compute / 3 / micro, 2 * compute / 3 / micro  # of one micro-batch
    weights = work.num_params * work.weight_bytes
    if sharding.stage < 3:
        # Summed bucket by bucket; the last one has nothing to hide behind. Once a step, at stage 2 each micro-batch.
        if sharding.stage == 0:
            elements = bucket_elements(int(work.num_params))
        else:
            elements = bucket_sizes(int(work.num_params), sharding.stage)["reduce_bucket_size"]
        count = math.ceil(work.num_params / elements)
        one = all_reduce_s(work.num_params / count * work.gradient_bytes, num_gpus, nodes)
        exposed = (micro if sharding.stage == 2 else 1) * (_left(count * one, backward) + one)
        if sharding.stage > 0:
            exposed += all_gather_s(weights, num_gpus, nodes)
        return StepTime(compute, exposed)
    layers = work.num_layers
    weight_bytes = (weights + work.num_frozen * work.weight_bytes) / layers
    gather = all_gather_s(weight_bytes, num_gpus, nodes)
    scatter = all_gather_s(work.num_params * work.gradient_bytes / layers, num_gpus, nodes)
    group = sharding.partition_group
    again = all_gather_s(weight_bytes, min(num_gpus, group), nodes) if group > 1 else gather
    exposed = _left(layers * gather, forward) + _left(layers * (again + scatter), backward) + gather
    return StepTime(compute, micro * exposed)


def _left(communication_s: float, compute_s: float) -> float:
    return max(0.0, communication_s - OVERLAP * compute_s)
