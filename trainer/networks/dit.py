"""DiT, a transformer over image patches that noise level and class modulate (Peebles and Xie 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.trainer.diffusion.condition import LABEL, AnyCondition, Conditions, conditions_of
from scoreray.trainer.diffusion.layers import (
    MAX_LAYERS,
    Attention,
    Embedding,
    call_block,
    check_call,
    from_patches,
    image_size,
    require,
    to_patches,
    zero_,
)
from scoreray.trainer.networks.base import BaseNetworkConfig

SINUSOID_CHANNELS = 256

MAX_MLP_RATIO = 1000  # usual: 4


@dataclass(frozen=True)
class DiTConfig(BaseNetworkConfig):
    """The transformer's size. Raises UserError on a value that no image could go with.

    patch_size: pixels along a patch's side; an image becomes (H / patch_size) (W / patch_size) tokens.
    mlp_ratio: hidden width of a block's MLP, in units of hidden_size.
    activation_checkpointing: keep only each block's input for the backward pass; a third more work, far less memory.
    """

    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    activation_checkpointing: bool = False
    kind: Literal["dit"] = field(default="dit", kw_only=True)

    def __post_init__(self) -> None:
        require(self.patch_size > 0, "patch_size", self.patch_size, "choose a divisor of the image's height and width")
        require(0 < self.depth <= MAX_LAYERS, "depth", self.depth, f"choose 1 to {MAX_LAYERS} blocks")
        require(self.num_heads > 0, "num_heads", self.num_heads, "choose 1 or more heads")
        require(
            self.hidden_size > 0 and self.hidden_size % 4 == 0 and self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"choose a positive multiple of 4 and of num_heads, {self.num_heads}",
        )
        require(
            0 < self.mlp_ratio <= MAX_MLP_RATIO,
            "mlp_ratio",
            self.mlp_ratio,
            f"choose a number above 0, at most {MAX_MLP_RATIO}",
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "choose a probability in [0, 1)")

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> DiT:
        return DiT(self, image_shape, conditions)


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm that `emb` scales and shifts and a gate that starts at 0 (adaLN-zero).

    (x [B, T, D], emb [B, D]) -> [B, T, D]
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.modulation = zero_(nn.Linear(width, 6 * width))
        self.attention = Attention(width, config.num_heads)
        self.mlp_in = nn.Linear(width, int(width * config.mlp_ratio))
        self.mlp_out = nn.Linear(int(width * config.mlp_ratio), width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=2)
        h = self.attention(modulated(x, shift1, scale1))
        x = torch.addcmul(x, gate1, F.dropout(h, self.dropout, self.training))
        h = self.mlp_out(F.gelu(self.mlp_in(modulated(x, shift2, scale2))))
        return torch.addcmul(x, gate2, F.dropout(h, self.dropout, self.training))


class DiT(nn.Module):
    """network(x [B, C, H, W], c_noise [B], condition or None) -> [B, C, H, W], in x's dtype.

    H and W are those of `image_shape` (C, H, W); patch_size divides them. The output is 0 before training.
    Raises UserError when the config or x does not fit. Peebles and Xie 2023, with the query-key norm of Dehghani 2023.
    """

    def __init__(self, config: DiTConfig, image_shape: Sequence[int], conditions: Conditions | int = 0):
        super().__init__()
        channels, height, width = image_size(image_shape, config.patch_size)
        self.config = config
        self.conditions, self.image_shape = conditions_of(conditions), (channels, height, width)
        self.num_classes = self.conditions[LABEL].num_classes if LABEL in self.conditions else 0
        patch_channels = channels * config.patch_size**2
        self.patch_in = nn.Linear(patch_channels, config.hidden_size)
        grid = height // config.patch_size, width // config.patch_size
        self.positions = nn.Parameter(grid_code(*grid, config.hidden_size))
        self.embedding = Embedding(self.conditions, SINUSOID_CHANNELS, config.hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.modulation_out = zero_(nn.Linear(config.hidden_size, 2 * config.hidden_size))
        self.patch_out = zero_(nn.Linear(config.hidden_size, patch_channels))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(("modulation", "modulation_out", "patch_out")):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        check_call(x, c_noise, tuple(x.shape[1:]) == self.image_shape, str(self.image_shape))
        patches = to_patches(x.to(self.patch_in.weight.dtype), self.config.patch_size)
        h = self.patch_in(patches.flatten(2).mT)
        h = h + self.positions.to(h.dtype)
        emb = self.embedding(c_noise, condition)
        recompute = self.config.activation_checkpointing and self.training
        # No token for the class: noise level and class reach every block through adaLN-zero alone, which Peebles and
        # Xie found better than tokens or cross-attention at the same cost (their figure 5).
        for block in self.blocks:
            h = call_block(block, h, emb, recompute=recompute)
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, dim=2)
        h = self.patch_out(modulated(h, shift, scale))
        return from_patches(h.mT.reshape(patches.shape), self.config.patch_size).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x [B, T, D] without parameters of its own (moments in float32), then scale and shift [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype), scale + 1)


def grid_code(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines [height width, channels] of row and column: where the learned positions start."""
    frequencies = 100.0 ** -torch.linspace(0, 1, channels // 4)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phases = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1) / math.sqrt(2)
