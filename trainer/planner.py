"""What training costs in memory, by ZeRO stage, and the cheapest stage whose share of it fits a rank.

Bytes per parameter (after Rajbhandari 2020, table 1, with our averages and fp32 gradients), N ranks, k averages:

    what                        stage 0              1            2            3
    weights, bf16 (fp32)        2 (0: the master)    2 (4)        2 (4)        2/N (4/N)
    gradients of the weights    2 (0)                2 (4)        2/N (4/N)    2/N (4/N)
    fp32 gradient that steps    4                    4/N          4/N          4/N
    fp32 master, two moments    12                   12/N         12/N         12/N
    fp32 averages               4 k                  4 k/N        4 k/N        4 k/N

Activations and communication buffers come on top; they depend on the network and the batch.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

STAGES = (0, 1, 2, 3)  # from the cheapest in time to the cheapest in memory
STATE_SHARE = 0.6  # of a rank's memory; the rest is for activations, buffers and the libraries (assumption)


def bytes_per_parameter(
    stage: int, world_size: int, *, half: bool, num_averages: int = 1, offload: bool = False
) -> float:
    """Bytes on one rank for each parameter; `half`: bf16 weights; `offload`: what steps lies in the host's memory."""
    width, shards = (2 if half else 4), world_size if stage > 0 else 1
    weights = width / (world_size if stage == 3 else 1)
    gradients = width / (world_size if stage >= 2 else 1)
    if stage == 0 and not half:
        weights = gradients = 0.0  # the weights are the master, their gradients the gradient that steps
    stepping = (4 + 12 + 4 * num_averages) / shards
    return weights + gradients + (0.0 if offload else stepping)


def bytes_per_rank(
    num_params: int, stage: int, world_size: int, *, half: bool, num_averages: int = 1, offload: bool = False
) -> int:
    """Bytes of weights, gradients, masters, moments and averages on one rank."""
    each = bytes_per_parameter(stage, world_size, half=half, num_averages=num_averages, offload=offload)
    return round(num_params * each)


def choose_stage(
    num_params: int, world_size: int, memory_bytes: int, *, half: bool, num_averages: int = 1, offload: bool = False
) -> tuple[int, str]:
    """The first of `STAGES` whose state fits `STATE_SHARE` of a rank's memory (the last if none does), and why."""
    budget = memory_bytes * STATE_SHARE
    needs = {
        stage: bytes_per_rank(num_params, stage, world_size, half=half, num_averages=num_averages, offload=offload)
        for stage in (STAGES[1:] if offload else STAGES)
    }
    fitting = [stage for stage, need in needs.items() if need <= budget]
    stage = fitting[0] if fitting else 3
    fits = "fits" if fitting else "is more than"
    why = f"{_size(needs[stage])} of state a rank {fits} {STATE_SHARE:.0%} of its {_size(memory_bytes)}"
    if (below := stage - 1) in needs:
        why += f", ZeRO-{below}'s {_size(needs[below])} {'does not' if fitting else 'even less so'}"
    return stage, why


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
    return total // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"
