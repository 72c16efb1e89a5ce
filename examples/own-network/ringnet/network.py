"""A network: its config is a frozen dataclass with `build`. Below it, one that is an nn.Module and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreray.trainer.diffusion.condition import Condition, Conditions


@dataclass(frozen=True)
class RingNet:
    """The `network` section: `kind: ringnet.network:RingNet`, and these keys."""

    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 4096 or not 1 <= self.depth <= 64:
            raise ValueError(f"width {self.width}, depth {self.depth}: choose 1 to 4096, and 1 to 64")

    def build(self, shape: Sequence[int], conditions: Conditions) -> nn.Module:
        """For samples of `shape`; of the conditions it takes one class, if there is one."""
        classes = [spec.num_classes for spec in conditions.values() if spec.kind == "class"]
        return RingModule(math.prod(shape), self.width, self.depth, classes[0] if classes else 0)


class RingModule(nn.Module):
    """forward(x [B, ...], c_noise [B], condition or None) -> the shape of x."""

    def __init__(self, size: int, width: int, depth: int, num_classes: int):
        super().__init__()
        self.first = nn.Linear(size + 2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, size)
        self.classes = nn.Embedding(num_classes + 1, width)  # the first one is the null

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
        h = self.first(torch.cat([x.flatten(1), c_noise[:, None].sin(), c_noise[:, None]], dim=1).to(x.dtype))
        if condition is not None:
            h = h + self.classes(condition.values["label"] + 1)  # -1 where a row has none
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.last(h).view_as(x)


class Plain(nn.Module):
    """`kind: ringnet.network:Plain`: its keys are the constructor's arguments; `shape` is the data's, and so no key."""

    def __init__(self, shape: Sequence[int], width: int = 32):
        super().__init__()
        size = math.prod(shape)
        self.layers = nn.Sequential(nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor, c_noise: Tensor, condition: Condition | None = None) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), c_noise[:, None].to(x.dtype)], dim=1)).view_as(x)
