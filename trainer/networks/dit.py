"""DiT, a transformer over patches that noise level and conditions modulate (Peebles and Xie 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.trainer.diffusion.condition import AnyCondition, Condition, Conditions, conditions_of
from scoreray.trainer.diffusion.layers import (
    MAX_LAYERS,
    Attention,
    call_block,
    check_call,
    from_patches,
    grid_code,
    num_patches,
    require,
    spatial_shape,
    to_patches,
    zero_,
)
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.conditioning import AnyTextEncoder, Conditioned, Conditioning, TextEncoderConfig

SINUSOID_CHANNELS = 256

MAX_MLP_RATIO = 1000  # usual: 4


@dataclass(frozen=True)
class TransformerConfig(BaseNetworkConfig):
    """The size of a transformer over patches. Raises UserError on a value that no sample could go with.

    patch_size: pixels along a patch's side; an image becomes ceil(H / patch_size) ceil(W / patch_size) tokens, a
    signal or a volume as many as its one or three axes give.
    hidden_size: of a token inside.  depth: blocks.  num_heads: of attention, in each block.  dropout: a probability.
    mlp_ratio: hidden width of a block's MLP, in units of hidden_size.
    activation_checkpointing: keep only each block's input for the backward pass; a third more work, far less memory.
    positions: what is added to each token for its place: "learned" for a grid of one size, from sines and cosines on;
    "fixed" takes these as they are, counted from the middle, and so samples of any size (Esser 2024, section 5.3.2).
    text_encoder: of text conditions.
    """

    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    activation_checkpointing: bool = False
    positions: Literal["learned", "fixed"] = "learned"
    text_encoder: AnyTextEncoder = field(default=TextEncoderConfig())

    def __post_init__(self) -> None:
        require(self.patch_size > 0, "patch_size", self.patch_size, "choose 1 or more")
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

    def num_tokens(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Of a sample, along each axis of its grid."""
        return num_patches(spatial_shape(image_shape)[1], self.patch_size)


@dataclass(frozen=True)
class DiTConfig(TransformerConfig):
    """A DiT (Peebles and Xie 2023); tokens of conditions are attended to by cross-attention."""

    kind: Literal["dit"] = field(default="dit", kw_only=True)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> DiT:
        return DiT(self, image_shape, conditions)


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm that `emb` scales and shifts and a gate that starts at 0 (adaLN-zero).

    With `context_width` tokens of conditions are attended to in between, as in PixArt-alpha (Chen 2023): without scale,
    shift and gate, and 0 at the start.
    (x [B, T, D], emb [B, D], context [B, S, context_width], mask bool [B, S]) -> [B, T, D]
    """

    def __init__(self, config: TransformerConfig, context_width: int = 0):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.modulation = zero_(nn.Linear(width, 6 * width))
        self.attention = Attention(width, config.num_heads)
        self.mlp_in = nn.Linear(width, int(width * config.mlp_ratio))
        self.mlp_out = nn.Linear(int(width * config.mlp_ratio), width)
        self.cross_attention = (
            Attention(width, config.num_heads, zero_output=True, context_width=context_width) if context_width else None
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate, *of_mlp = self.modulations(emb)
        x = self.gated(x, gate, self.attention(modulated(x, shift, scale)))
        if self.cross_attention is not None:
            h = self.cross_attention(F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype), context, mask)
            x = x + F.dropout(h, self.dropout, self.training)
        return self.after_mlp(x, *of_mlp)

    def modulations(self, emb: Tensor) -> Sequence[Tensor]:
        """shift, scale and gate [B, 1, D] of attention, then of the MLP."""
        return self.modulation(emb)[:, None].chunk(6, dim=2)

    def gated(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        return torch.addcmul(x, gate, F.dropout(h, self.dropout, self.training))

    def after_mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return self.gated(x, gate, self.mlp_out(F.gelu(self.mlp_in(modulated(x, shift, scale)))))


class DiT(nn.Module):
    """network(x [B, C, *grid], c_noise [B], condition or None) -> [B, C, *grid], in x's dtype.

    The grid, of 1, 2 or 3 dimensions, is that of `image_shape` (C, *grid), or with fixed positions any of as many; one
    that patch_size does not divide is filled up with zeros inside. The output is 0 before training. Raises UserError
    when the config or x does not fit.
    Peebles and Xie 2023, with the query-key norm of Dehghani 2023.
    """

    def __init__(self, config: TransformerConfig, image_shape: Sequence[int], conditions: Conditions | int = 0):
        super().__init__()
        channels, grid = spatial_shape(image_shape)
        self.config = config
        self.conditions, self.image_shape = conditions_of(conditions), (channels, *grid)
        width, patch = config.hidden_size, config.patch_size ** len(grid)
        self.patch_in = nn.Linear(channels * patch, width)
        learned = config.positions == "learned"
        self.positions = nn.Parameter(grid_code(num_patches(grid, config.patch_size), width)) if learned else None
        self.embedding = Conditioning(
            self.conditions,
            SINUSOID_CHANNELS,
            width,
            num_axes=len(grid),
            text_encoder=config.text_encoder,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.num_classes = self.embedding.num_classes
        self.blocks = nn.ModuleList(self.block(number) for number in range(1, 1 + config.depth))
        self.modulation_out = zero_(nn.Linear(width, 2 * width))
        self.patch_out = zero_(nn.Linear(width, channels * patch))
        grid_channels = self.embedding.num_grid_channels
        self.grid_in = nn.Linear(grid_channels * patch, width, bias=False) if grid_channels else None
        self.kept_block = 0  # number of the block whose output is left in `kept` by a call; 0: of none
        self.kept: Tensor | None = None
        zeros = ("modulation", "modulation_out", "patch_out", "cross_attention.out", "level_out")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(zeros):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def block(self, number: int) -> nn.Module:
        """The block of this number, from 1 on."""
        return DiTBlock(self.config, self.embedding.context_width)

    def encode(self, condition: Condition) -> Condition:
        return self.embedding.encode(condition)

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        fits, built_for = tuple(x.shape[1:]) == self.image_shape, str(self.image_shape)
        if self.positions is None:
            fits = x.ndim == 1 + len(self.image_shape) and x.shape[1] == self.image_shape[0]
        elif not fits:
            built_for += "; network.positions=fixed takes samples of any size"
        check_call(x, c_noise, fits, built_for)
        given: Conditioned = self.embedding(c_noise, condition, x.shape[2:])
        patches = to_patches(x.to(self.patch_in.weight.dtype), self.config.patch_size)
        h = self.patch_in(patches.flatten(2).mT)
        h = h + self._places(x).to(h.dtype)
        if self.grid_in is not None and given.grids is not None:
            h = h + self.grid_in(to_patches(given.grids, self.config.patch_size).flatten(2).mT)
        h = self.through_blocks(h, given)
        shift, scale = self.modulation_out(given.embedding)[:, None].chunk(2, dim=2)
        h = self.patch_out(modulated(h, shift, scale))
        return from_patches(h.mT.reshape(patches.shape), self.config.patch_size, x.shape[2:]).to(x.dtype)

    def through_blocks(self, h: Tensor, given: Conditioned) -> Tensor:
        """Tokens [B, T, D] of the sample after all blocks."""
        recompute = self.config.activation_checkpointing and self.training
        # No token for noise level, class and vectors: they reach every block through adaLN-zero alone, which Peebles
        # and Xie found better than tokens or cross-attention at the same cost (their figure 5).
        for number, block in enumerate(self.blocks, 1):
            h = call_block(block, h, given.embedding, given.tokens, given.mask, recompute=recompute)
            self.keep(number, h)
        return h

    def keep(self, number: int, h: Tensor) -> None:
        # Not by a hook of the block: activation checkpointing would call it again in the backward pass.
        if number == self.kept_block:
            self.kept = h

    def _places(self, x: Tensor) -> Tensor:
        """What is added to the tokens of x for their places."""
        if self.positions is not None:
            return self.positions
        counts = num_patches(x.shape[2:], self.config.patch_size)
        return grid_code(counts, self.config.hidden_size, centred=True, device=x.device)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x [B, T, D] without parameters of its own (moments in float32), then scale and shift [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype), scale + 1)
