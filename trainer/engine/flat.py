"""Replicated training, ZeRO stage 0: flat buffers and one fused update, with torch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from scoreray.trainer.engine.base import EngineConfig, fragment_of, resolve_precision
from scoreray.trainer.engine.frozen import FrozenParameters
from scoreray.trainer.engine.overlap import OverlappedSum
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.fragments import Fragment
from scoreray.trainer.optim.optimizer import OptimizerConfig
from scoreray.trainer.optim.sgld import SGLDConfig

CHUNK = 1 << 20  # elements of a half-precision gradient that are widened at once (4 MiB of fp32)


class FlatEngine:
    """Replicated training with all parameters, gradients and state in flat buffers: one fused update, no DeepSpeed.

    Parameters and their gradients are views of the buffers. A network has hundreds of small tensors; norm, clipping,
    AdamW and the averages are then one call each instead of one a tensor.
    With several ranks, gradients are averaged in fp32, behind the last micro-batch's backward pass (`overlap.py`).
    """

    replicated = True

    def __init__(
        self,
        module: torch.nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig | SGLDConfig,
        ema: EMAConfig,
        *,
        rank_batch_size: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.device, self.num_micro_batches = device, config.num_micro_batches(rank_batch_size)
        self._world_size, self._clip = world_size, optimizer.gradient_clip
        precision = resolve_precision(config.precision, device)
        self._frozen = FrozenParameters(module)
        module.to(device)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._slices: list[tuple[str, int, int]] = []
        offset = 0
        for name, parameter in named:
            self._slices.append((name, offset, parameter.numel()))
            offset += parameter.numel()
        self._master = torch.nn.Parameter(torch.cat([p.detach().float().reshape(-1) for _, p in named]))
        self._master.grad = torch.zeros_like(self._master)
        half = precision != torch.float32
        for parameter, values in self._frozen.whole(device):
            parameter.data = values.to(device, precision).view(parameter.shape)
        self._weights = self._master.detach().to(precision) if half else self._master.detach()
        self._gradient = torch.zeros_like(self._weights) if half else self._master.grad
        # autograd adds into a .grad that exists, so gradients are accumulated in the buffer without a copy.
        for (_, start, length), (_, parameter) in zip(self._slices, named, strict=True):
            parameter.data = self._weights[start : start + length].view(parameter.shape)
            parameter.grad = self._gradient[start : start + length].view(parameter.shape)
        self._sum: OverlappedSum | None = None
        if world_size > 1:
            places = [(p, start) for (_, start, _), (_, p) in zip(self._slices, named, strict=True)]
            self._sum = OverlappedSum(places, self._master.grad, self._collect)
        self._micro_batches_done = 0
        self.optimizer = optimizer.build([self._master], ema)
        self.optimizer.init_state(self._master)
        self.optimizer.place(self._master, 0, offset, 0)
        shapes = [(name, start, p.shape) for (name, start, _), (_, p) in zip(self._slices, named, strict=True)]
        self.optimizer.place_matrices(self._master, shapes, precision)
        self.module: Any = torch.compile(module, dynamic=False) if config.compile else module

    def backward(self, loss: torch.Tensor) -> None:
        self._micro_batches_done += 1
        summing = self._sum is not None and self._micro_batches_done == self.num_micro_batches
        if self._sum is not None and summing:
            self._sum.begin()
        (loss / self.num_micro_batches).backward()
        if not summing:  # else OverlappedSum has collected range by range
            self._collect(slice(0, len(self._master)))

    def _collect(self, part: slice) -> None:
        """Move half-precision gradients of a range into the fp32 sum; fp32 ones were accumulated there already.

        A step's first overwrite the sum, which so need not be set to zero before.
        """
        gradient = self._master.grad
        assert gradient is not None
        if self._gradient is gradient:
            return
        for total, half in zip(gradient[part].split(CHUNK), self._gradient[part].split(CHUNK), strict=True):
            if self._micro_batches_done == 1:
                total.copy_(half)
            else:
                total.add_(half)  # in chunks: torch widens the half-precision part first
            half.zero_()

    def step(self, learning_rate: float, decays: list[float]) -> float:
        gradient = self._master.grad
        assert gradient is not None
        if self._sum is not None:
            self._sum.finish()
        self._micro_batches_done = 0
        scale = 1 / self._world_size
        norm = float(torch.linalg.vector_norm(gradient)) * scale
        if not math.isfinite(norm):  # all ranks summed the same gradient, so all raise
            self._clear()
            raise NonFiniteError(f"the gradient's norm is {norm}")
        if 0 < self._clip < norm:
            scale *= self._clip / norm
        if scale != 1:
            gradient.mul_(scale)
        self.optimizer.prepare_step(learning_rate, decays)
        self.optimizer.step()
        self._clear()
        self._copy_to_weights()
        return norm

    def _clear(self) -> None:
        """Ready for the next step's gradients, which are added where they are fp32."""
        if self._gradient is self._master.grad:
            self._gradient.zero_()

    def fragments(self) -> Iterator[Fragment]:
        for name, offset, length in self._slices:
            yield fragment_of(self.optimizer, name, 0, length, self._master, offset)

    def frozen_fragments(self) -> Iterator[Fragment]:
        return self._frozen.fragments()

    def publish(self, num_steps: int) -> None:
        self.optimizer.state[self._master]["step"].fill_(num_steps)
        self._copy_to_weights()
        for parameter, values in self._frozen.whole(self.device):
            parameter.data.copy_(values.view(parameter.shape))

    def _copy_to_weights(self) -> None:
        if self._weights.dtype != self._master.dtype:  # in fp32 the weights are the master
            self._weights.copy_(self._master.detach())
