"""A network for benchmarks of what is around networks: a call of b rows sleeps base_s + row_s b, and computes nothing.

`network: {kind: "sleeping:Sleeping", base_s: 0.2, row_s: 0.002}` with `--with benchmarks/sleeping.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreray.trainer.diffusion.condition import Condition, Conditions


@dataclass(frozen=True)
class Sleeping:
    base_s: float = 0.0
    row_s: float = 0.0

    def seconds(self, rows: int) -> float:
        return self.base_s + self.row_s * rows

    def build(self, shape: Sequence[int], conditions: Conditions) -> nn.Module:
        return SleepingNetwork(self)


class SleepingNetwork(nn.Module):
    """forward(x [B, ...], c_noise [B], condition or None) -> the shape of x."""

    def __init__(self, config: Sleeping) -> None:
        super().__init__()
        self.config, self.scale = config, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
        if x.device.type != "meta":
            time.sleep(self.config.seconds(len(x)))
        return self.scale * x
