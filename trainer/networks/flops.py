"""How much of a device a training step uses (MFU): the network's FLOPs over what the device does in matrix products."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

SIZE = {"cpu": 1024, "cuda": 8192}  # side of the square matrices: large enough that memory does not limit the rate


def flops(network: nn.Module, image_shape: Sequence[int], *, backward: bool = False) -> int:
    """Floating-point operations of one sample's forward pass, with its backward pass too (a multiply-add is two).

    Counted on the meta device: nothing is computed. Call it before an engine shards the parameters. Recomputation by
    activation checkpointing is not counted, as it is not progress (model FLOPs; Chowdhery 2022, appendix B).
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for name, t in tensors.items()}
    x, c_noise = torch.empty(1, *image_shape, device="meta"), torch.empty(1, device="meta")
    training = network.training
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = functional_call(network, meta, (x, c_noise))
            if backward:
                out.sum().backward()
    finally:
        network.train(training)
    return counter.get_total_flops()


def training_flops(network: nn.Module, image_shape: Sequence[int]) -> int:
    """FLOPs of training on one sample; 0 for a module that is not called as a network is (an RBM, or somebody else's
    autoencoder)."""
    try:
        return flops(network, image_shape, backward=True)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError):
        return 0


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of square matrix products in `dtype`: the best of several, measured once.

    With the threads that this process computes with. About 0.1 s.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(torch.get_num_threads())
    return _measured(device.type, dtype, name)


@lru_cache
def _measured(kind: str, dtype: torch.dtype, name: str) -> float:
    size = SIZE.get(kind, 1024)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(kind, dtype)
    best, end = 0.0, time.perf_counter() + 0.1
    for k in range(100):
        start = time.perf_counter()
        a @ a
        if kind == "cuda":
            torch.cuda.synchronize()
        if k:  # the first one prepares
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        if k >= 3 and time.perf_counter() > end:
            break
    return best
