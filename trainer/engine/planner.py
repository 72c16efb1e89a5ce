"""What training costs in memory, by ZeRO stage, and the quickest stage whose share of it fits a rank.

Bytes per parameter (after Rajbhandari 2020, table 1, with our averages and fp32 gradients), N ranks, k averages:

    what                        stage 0              1            2            3
    weights, bf16 (fp32)        2 (0: the master)    2 (4)        2 (4)        2/N (4/N)
    gradients of the weights    2 (0)                2 (4)        2/N (4/N)    2/N (4/N)
    fp32 gradient of the step   4                    4/N          4/N          4/N
    fp32 master, two moments    12                   12/N         12/N         12/N
    fp32 averages               4 k                  4 k/N        4 k/N        4 k/N

Activations and communication buffers come on top; they depend on the network and the batch. A frozen parameter costs
its weight alone: 2 (4) bytes, at stage 3 divided by N.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from scoreray.trainer.engine.communication import Sharding, Stage, StepTime, Work, shardings
from scoreray.trainer.networks.flops import training_flops
from scoreray.trainer.networks.network import num_frozen_parameters, num_parameters

K = TypeVar("K")

STATE_SHARE = 0.6  # of a rank's memory; the rest is for activations, buffers and the libraries (assumption)
# Of the step: what a higher stage must be predicted to save. The model leaves out what DeepSpeed's hooks on every layer
# cost: stage 3 ran at 0.73 of a bare loop on two CPU cores (benchmarks/RESULTS.md); on GPUs it was not measured.
WORTH = 0.05


def bytes_per_parameter(
    stage: int,
    world_size: int,
    *,
    half: bool,
    num_averages: int = 1,
    offload: bool = False,
    partition_group: int = 1,
) -> float:
    """Bytes on one rank for each parameter; `half`: bf16 weights; `offload`: optimizer state in host memory.

    `partition_group`: ranks that hold a second copy of the weights among them (hpZ, stage 3; 1 for none).
    """
    weights = _bytes_of_weight(stage, world_size, half)
    gradients = (2 if half else 4) / (world_size if stage >= 2 else 1)
    if stage == 0 and not half:
        weights = gradients = 0.0  # the weights are the master, their gradients the step's own
    if partition_group > 1:
        weights += (2 if half else 4) / partition_group
    stepping = (4 + 12 + 4 * num_averages) / (world_size if stage > 0 else 1)
    return weights + gradients + (0.0 if offload else stepping)


def bytes_per_rank(
    num_params: int, stage: int, world_size: int, *, half: bool, num_frozen: int = 0, **settings: Any
) -> int:
    """Bytes of weights, gradients, masters, moments and averages on one rank; `num_frozen`: beside `num_params`.

    `settings`: of `bytes_per_parameter`.
    """
    each = bytes_per_parameter(stage, world_size, half=half, **settings)
    return round(num_params * each + frozen_bytes(num_frozen, stage, world_size, half=half))


def frozen_bytes(num_frozen: int, stage: int, world_size: int, *, half: bool) -> float:
    """On one rank."""
    return num_frozen * _bytes_of_weight(stage, world_size, half)


def _bytes_of_weight(stage: int, world_size: int, half: bool) -> float:
    return (2 if half else 4) / (world_size if stage == 3 else 1)


def quickest(times: Mapping[K, float]) -> K:
    """The first whose predicted seconds are within `WORTH` of the least; they come in the order of preference."""
    least = min(times.values())
    return next(key for key, seconds in times.items() if seconds <= (1 + WORTH) * least)


def choose_sharding(
    num_params: int,
    world_size: int,
    memory_bytes: int,
    *,
    offload: bool = False,
    max_stage: Stage = 3,
    ranks_per_node: int = 1,
    predict: Callable[[Sharding], StepTime] | None = None,
    **settings: Any,
) -> tuple[Sharding, str]:
    """What `zero_stage: auto` takes, and why: of the stages up to `max_stage` whose state fits `STATE_SHARE` of a
    rank's memory the `quickest` by `predict`, the lowest without it; `max_stage` if none fits.

    A partition group of a node's ranks is one more choice, where `predict` can say what it saves.
    `settings`: of `bytes_per_rank`.
    """
    budget = memory_bytes * STATE_SHARE
    settings["offload"] = offload
    needs = {
        one: bytes_per_rank(num_params, one.stage, world_size, partition_group=one.partition_group, **settings)
        for one in shardings(world_size, ranks_per_node if predict else 1, 1 if offload else 0, max_stage)
    }
    times = {one: predict(one).total_s if predict else 0.0 for one, need in needs.items() if need <= budget}
    chosen = quickest(times) if times else Sharding(max_stage)
    fits = "fits" if times else "is more than"
    why = f"{_size(needs[chosen])} of state a rank {fits} {STATE_SHARE:.0%} of its {_size(memory_bytes)}"
    below = [one for one in needs if one.stage < chosen.stage and one not in times]
    if below:
        why += f", {below[-1]}'s {_size(needs[below[-1]])} {'does not' if times else 'even less so'}"
    if predict and len(times) > 1:
        others = ", ".join(f"{one} {_seconds(seconds)}" for one, seconds in times.items() if one != chosen)
        why += f"; predicted {_seconds(times[chosen])} a step, {others}"
    return chosen, why


def ranks_of_node() -> int:
    """Ranks on this machine, as the launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory_of_rank(device: torch.device) -> int:
    """Bytes that one rank may use: its GPU's memory, or its part of this machine's (or container's) memory.

    A property of the machine, not of the moment: two starts of a run make the same choice from it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(limit).read_text()))
    return total // ranks_of_node()


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.4g} ms" if seconds < 10 else f"{seconds:,.1f} s"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device at its peak, by what they are, and those that offloading moves to its host."""

    stage: int
    weights: float
    gradients: float
    masters: float
    moments: float
    averages: float
    buffers: float
    activations: float
    host: float

    @property
    def state(self) -> float:
        """What ZeRO's formula counts: all but buffers and activations."""
        return self.weights + self.gradients + self.masters + self.moments + self.averages

    @property
    def total(self) -> float:
        return self.state + self.buffers + self.activations


def memory(
    num_params: int,
    stage: int,
    world_size: int,
    *,
    half: bool,
    num_averages: int = 1,
    offload: bool = False,
    partition_group: int = 1,
    activations: float = 0.0,
    bucket_elements: int = 0,
    num_frozen: int = 0,
) -> Memory:
    """The parts of `bytes_per_rank`, and what comes on top of it.

    `partition_group`: ranks that hold a second copy of the bf16 weights among them (hpZ, stage 3; 1 for none).
    `bucket_elements`: of the largest buffer for communication, in fp32 (`engine.bucket_sizes`).
    """
    width, shards = (2 if half else 4), world_size if stage > 0 else 1
    stored = 0 if stage == 0 and not half else width
    weights = stored / (world_size if stage == 3 else 1) + (width / partition_group if partition_group > 1 else 0)
    stepping = 4 / shards
    sharded = {"masters": 4 / shards, "moments": 8 / shards, "averages": 4 * num_averages / shards}
    on_device = {key: 0.0 if offload else num_params * each for key, each in sharded.items()}
    return Memory(
        stage,
        weights=num_params * weights + frozen_bytes(num_frozen, stage, world_size, half=half),
        gradients=num_params * (stored / (world_size if stage >= 2 else 1) + (0 if offload else stepping)),
        buffers=4.0 * bucket_elements,
        activations=activations,
        host=num_params * (sum(sharded.values()) + stepping) if offload else 0.0,
        **on_device,
    )


def activation_bytes(network: torch.nn.Module, image_shape: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one sample's forward pass keeps for the backward pass: (all of them, with activation checkpointing).

    Measured from the shapes of what autograd saves, on the meta device: nothing is computed. Conditions are counted at
    their full length, attention as two products (a fused kernel keeps no weights), dropout's masks not at all. With
    checkpointing the inputs of each block stay, and one block's own are there while it is recomputed.
    """
    parameters = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {
        name: torch.empty_like(t, device="meta", dtype=dtype if t.is_floating_point() else t.dtype)
        for name, t in parameters.items()
    }
    for tensor in meta.values():
        tensor.requires_grad_(tensor.is_floating_point())
    seen = {tensor.untyped_storage() for tensor in meta.values()}
    blocks = [block for group in network.modules() if isinstance(group, torch.nn.ModuleList) for block in group]
    inside: list[int] = []
    kept = {-1: 0, **dict.fromkeys(range(len(blocks)), 0)}
    inputs: dict[torch.UntypedStorage, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in seen:
            seen.add(storage)
            kept[inside[-1] if inside else -1] += storage.nbytes()
        return tensor

    def enter(number: int, arguments: tuple[Any, ...]) -> None:
        inside.append(number)
        for one in arguments:
            if isinstance(one, torch.Tensor):
                inputs.setdefault(one.untyped_storage(), one.untyped_storage().nbytes())

    def leave() -> None:
        inside.pop()

    # Blocks are the members of module lists, as in every network here; what is saved between them is counted with -1.
    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, arguments, number=number: enter(number, arguments)))
        hooks.append(block.register_forward_hook(lambda *_: leave()))
    training = network.training
    network.eval()  # without recomputing
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            x = torch.empty(1, *image_shape, device="meta", dtype=torch.float32)
            torch.func.functional_call(network, meta, (x, torch.empty(1, device="meta")))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    own = [kept[number] for number in range(len(blocks))]
    return sum(kept.values()), kept[-1] + sum(inputs.values()) + max(own, default=0)


def work_of_rank(
    module: torch.nn.Module, image_shape: Sequence[int] | None, rows: int, num_micro_batches: int, *, half: bool
) -> Work:
    """What a rank computes of `rows` images in a step of `module` (a run's, or a network). Before it is sharded."""
    network = getattr(getattr(module, "denoiser", module), "network", module)
    groups = [group for group in network.modules() if isinstance(group, torch.nn.ModuleList)]
    return Work(
        num_params=num_parameters(module),
        flops_per_image=training_flops(network, image_shape) if image_shape else 0,
        images_per_gpu=rows,
        num_layers=max(1, sum(map(len, groups))),
        num_micro_batches=num_micro_batches,
        num_frozen=num_frozen_parameters(module),
        weight_bytes=2 if half else 4,
    )


USABLE = 0.9  # of a rank's memory; the rest is for libraries and the allocator's fragments (assumption)
NODE_RANKS = 8


@dataclass(frozen=True)
class Advice:
    """What to set, or None where nothing fits, and why."""

    stage: int | None
    offload: bool
    partition_group: int
    why: str


def advise(
    plans: Mapping[tuple[Sharding, bool], Memory],
    memory_bytes: float,
    predict: Callable[[Sharding], StepTime] | None = None,
) -> Advice:
    """Of the plans, by (sharding, offload), that fit a rank at their peak the `quickest` by `predict`, the first
    without it; those with the optimizer in the host's memory only where no other fits."""
    usable = USABLE * memory_bytes
    for offload in (False, True):
        fitting = [one for (one, o), plan in plans.items() if o is offload and plan.total <= usable]
        if not fitting:
            continue
        chosen = quickest({one: predict(one).total_s if predict else 0.0 for one in fitting})
        plan = plans[chosen, offload]
        why = f"{_size(plan.total)} of {_size(memory_bytes)}"
        less = [
            p.total for (one, o), p in plans.items() if (o, one.stage) < (offload, chosen.stage) and p.total > usable
        ]
        if less:
            why += f"; the stages before it that do not fit take {_size(min(less))} or more"
        if chosen.partition_group > 1:
            copy = plan.weights - plans[Sharding(3), offload].weights
            why += f"; a second copy of the weights in a node ({_size(copy)} a rank) spares the network"
        return Advice(chosen.stage, offload, chosen.partition_group, why)
    return Advice(
        None, False, 1, f"the least is {_size(min(p.total for p in plans.values()))}, there is {_size(memory_bytes)}"
    )
