"""A multilayer perceptron for points [d] (and anything small enough to be flattened)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, Conditions, conditions_of
from scoreray.trainer.diffusion.layers import MAX_LAYERS, check_call, require, zero_
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.conditioning import AnyTextEncoder, Conditioning, TextEncoderConfig

SINUSOID_CHANNELS = 32


@dataclass(frozen=True)
class MLPConfig(BaseNetworkConfig):
    """The perceptron's size.

    num_layers: residual layers.  hidden_size: width of each.  text_encoder: of text conditions.
    """

    hidden_size: int = 128
    num_layers: int = 3
    text_encoder: AnyTextEncoder = field(default=TextEncoderConfig())
    kind: Literal["mlp"] = field(default="mlp", kw_only=True)

    def __post_init__(self) -> None:
        checks.at_least("network", 1, hidden_size=self.hidden_size, num_layers=self.num_layers)
        require(self.num_layers <= MAX_LAYERS, "num_layers", self.num_layers, f"choose 1 to {MAX_LAYERS} layers")

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> MLP:
        return MLP(self, image_shape, conditions)


class MLP(nn.Module):
    """network(x [B, ...], c_noise [B], condition or None) -> x's shape and dtype, 0 before training.

    Residual layers that noise level and conditions scale and shift; smooth (SiLU), so that it can be differentiated
    twice. Sequences and text enter by their mean, grids beside x (`conditioning`).
    Raises UserError where the samples are not of `shape`.
    """

    def __init__(self, config: MLPConfig, shape: Sequence[int], conditions: Conditions | int = 0):
        super().__init__()
        self.shape, self.conditions = tuple(shape), conditions_of(conditions)
        size, width = math.prod(shape), config.hidden_size
        self.embedding = Conditioning(
            self.conditions,
            SINUSOID_CHANNELS,
            width,
            num_axes=len(shape) - 1,
            text_encoder=config.text_encoder,
            cross_attention=False,
        )
        self.num_classes = self.embedding.num_classes
        self.first = nn.Linear(size, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(config.num_layers))
        self.last = zero_(nn.Linear(width, size))
        grid_size = self.embedding.num_grid_channels * math.prod(self.shape[1:])
        self.grid_in = nn.Linear(grid_size, width, bias=False) if grid_size else None

    def encode(self, condition: Condition) -> Condition:
        return self.embedding.encode(condition)

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        check_call(x, c_noise, tuple(x.shape[1:]) == self.shape, str(self.shape))
        given = self.embedding(c_noise, condition, x.shape[2:])
        h = self.first(x.flatten(1).to(self.first.weight.dtype))
        if self.grid_in is not None and given.grids is not None:
            h = h + self.grid_in(given.grids.flatten(1))
        for layer in self.layers:
            h = layer(h, given.embedding)
        return self.last(F.silu(h)).view(x.shape).to(x.dtype)


class Layer(nn.Module):
    """(h [B, width], embedding [B, width]) -> [B, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.inside, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        # Without a norm, and smooth: the exact trace and energies differentiate it twice.
        return h + self.out(F.silu(self.inside(F.silu(h)) * (1 + scale) + shift))
