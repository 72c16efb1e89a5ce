"""A U-Net: residual blocks that noise level and conditions scale and shift, attention at chosen resolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, Conditions, conditions_of
from scoreray.trainer.diffusion.layers import (
    MAX_LAYERS,
    Attention,
    call_block,
    check_call,
    cropped,
    from_patches,
    group_norm,
    num_patches,
    require,
    spatial_shape,
    to_patches,
    zero_,
)
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.conditioning import AnyTextEncoder, Conditioned, Conditioning, TextEncoderConfig

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGES: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
"""By the number of a sample's spatial dimensions."""


@dataclass(frozen=True)
class UNetConfig(BaseNetworkConfig):
    """The U-Net's size. Raises UserError on a value that no sample could go with.

    model_channels: times channel_mult[i] the width at resolution level i.  channel_mult: a factor for each level; each
    level after the first halves every spatial axis.  num_blocks: residual blocks at each level.
    head_channels: of each head of attention.  dropout: in each block, a probability.
    attention_resolutions: sizes, along the first spatial axis (an image's height, a signal's length, a volume's depth),
    of the feature maps that attend to themselves and to tokens of conditions; the middle of the network always does.
    patch_size: work on space-to-depth patches of this size (2 makes a 28x28 image 14x14: a quarter of the work).
    activation_checkpointing: keep only each block's input for the backward pass; a third more work, far less memory.
    text_encoder: of text conditions.
    """

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2)
    num_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    head_channels: int = 64
    dropout: float = 0.0
    patch_size: int = 1
    activation_checkpointing: bool = False
    text_encoder: AnyTextEncoder = field(default=TextEncoderConfig())
    kind: Literal["unet"] = field(default="unet", kw_only=True)

    def __post_init__(self) -> None:
        check_sizes(self)
        require(0 <= self.dropout < 1, "dropout", self.dropout, "choose a probability in [0, 1)")

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> UNet:
        return UNet(self, image_shape, conditions)


class Sizes(Protocol):
    """What networks of residual blocks at several resolutions have in common."""

    @property
    def model_channels(self) -> int: ...
    @property
    def channel_mult(self) -> tuple[int, ...]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def head_channels(self) -> int: ...
    @property
    def patch_size(self) -> int: ...


def check_sizes(config: Sizes) -> None:
    """Raises UserError on a size that no sample could go with."""
    require(
        config.model_channels > 0 and config.model_channels % 8 == 0,
        "model_channels",
        config.model_channels,
        "choose a positive multiple of 8",
    )
    require(
        bool(config.channel_mult) and all(m > 0 for m in config.channel_mult),
        "channel_mult",
        config.channel_mult,
        "choose one positive integer a resolution level, such as [1, 2, 2]",
    )
    blocks = f"choose 1 to {MAX_LAYERS} residual blocks a level"
    require(0 < config.num_blocks <= MAX_LAYERS, "num_blocks", config.num_blocks, blocks)
    require(config.head_channels > 0, "head_channels", config.head_channels, "choose 1 or more channels a head")
    require(config.patch_size > 0, "patch_size", config.patch_size, "choose 1 or more")


class ResidualBlock(nn.Module):
    """Residual block, BigGAN order (Song 2021, DDPM++; scale-shift of Dhariwal 2021), skip paths scaled by sqrt(1/2).

    With emb_width 0 nothing modulates it, and `emb` is None.
    A block with heads attends to its own places and, with `context_width`, to tokens of conditions (as in Rombach 2022;
    the output of this starts at 0, so that no scale of the sum is needed). A block that goes up doubles every axis.
    (x [B, in, *grid], emb [B, E], context [B, S, context_width], mask bool [B, S]) -> [B, out, *grid']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_width: int,
        *,
        heads: int = 0,
        context_width: int = 0,
        dropout: float = 0.0,
        resample: str = "",
        num_axes: int = 2,
    ):
        super().__init__()
        conv = CONVOLUTIONS[num_axes]
        self.resample = resample
        self.dropout = dropout
        self.norm_in = group_norm(in_channels)
        self.conv_in = conv(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(emb_width, 2 * out_channels) if emb_width else None
        self.norm_out = group_norm(out_channels)
        self.conv_out = zero_(conv(out_channels, out_channels, 3, padding=1))
        self.skip = conv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.norm_attention = group_norm(out_channels) if heads else None
        self.attention = Attention(out_channels, heads, zero_output=True) if heads else None
        crosses = bool(heads and context_width)
        self.norm_cross = group_norm(out_channels) if crosses else None
        self.cross_attention = Attention(out_channels, heads, True, context_width) if crosses else None

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        h = self.conv_in(resampled(F.silu(self.norm_in(x)), self.resample))
        modulation = (None, None) if self.modulation is None else self.modulation(emb).chunk(2, dim=1)
        h = self.norm_out(h, *modulation)
        h = self.conv_out(F.dropout(F.silu(h), self.dropout, self.training))
        x = resampled(x, self.resample)
        # Two independent paths of unit variance sum to variance 2; sqrt(1/2) keeps it at 1 at any depth (Song 2021).
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attention is not None and self.norm_attention is not None:
            h = self.attention(self.norm_attention(x).flatten(2).mT)
            x = (x + h.mT.view_as(x)) * math.sqrt(0.5)
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self.cross_attention(self.norm_cross(x).flatten(2).mT, context, mask).mT.view_as(x)
        return x


class UNet(nn.Module):
    """network(x [B, C, *grid], c_noise [B], condition or None) -> [B, C, *grid], in x's dtype.

    Any grid of as many dimensions (1, 2 or 3) as `image_shape` (C, *grid) has: one that patch_size does not divide is
    filled up with zeros inside, and odd feature maps are halved upwards and cropped on the way back.
    The output is 0 before training. Raises UserError when the config or x does not fit `image_shape`.
    Architecture: Ho 2020, Song 2021 (DDPM++), Dhariwal 2021 (ADM), as put together in Karras 2022.
    """

    def __init__(self, config: UNetConfig, image_shape: Sequence[int], conditions: Conditions | int = 0):
        super().__init__()
        channels, grid = spatial_shape(image_shape)
        self.config = config
        self.conditions, self.image_shape = conditions_of(conditions), (channels, *grid)
        widths = [config.model_channels * mult for mult in config.channel_mult]
        heights = [num_patches(grid, config.patch_size)[0]]
        for _ in widths[1:]:  # halved upwards, as ceil_mode pooling does
            heights.append(-(-heights[-1] // 2))
        unmatched = set(config.attention_resolutions) - set(heights)
        require(
            not unmatched,
            "attention_resolutions",
            list(config.attention_resolutions),
            f"this network's feature maps are {', '.join(map(str, heights))} high",
        )
        emb_width = 4 * config.model_channels
        self.embedding = Conditioning(
            self.conditions,
            config.model_channels,
            emb_width,
            num_axes=len(grid),
            text_encoder=config.text_encoder,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.num_classes = self.embedding.num_classes

        def block(in_channels: int, level: int, *, attention: bool = False, resample: str = "") -> ResidualBlock:
            attends = attention or (not resample and heights[level] in config.attention_resolutions)
            heads = num_heads(widths[level], config.head_channels) if attends else 0
            return ResidualBlock(
                in_channels,
                widths[level],
                emb_width,
                heads=heads,
                context_width=self.embedding.context_width,
                dropout=config.dropout,
                resample=resample,
                num_axes=len(grid),
            )

        conv, patch = CONVOLUTIONS[len(grid)], config.patch_size ** len(grid)
        self.conv_in = conv(channels * patch, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width := widths[0]]
        for level in range(len(widths)):
            for i in range(config.num_blocks + (level > 0)):
                self.down.append(block(width, level, resample="down" if level and i == 0 else ""))
                skips.append(width := widths[level])
        last = len(widths) - 1
        self.middle = nn.ModuleList([block(width, last, attention=True), block(width, last)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            if level < last:
                self.up.append(block(width, level, resample="up"))
                width = widths[level]
            for _ in range(config.num_blocks + 1):
                self.up.append(block(width + skips.pop(), level))
                width = widths[level]
        self.norm_out = group_norm(width)
        self.conv_out = zero_(conv(width, channels * patch, 3, padding=1))
        grid_channels = self.embedding.num_grid_channels
        self.grid_in = conv(grid_channels * patch, widths[0], 3, padding=1, bias=False) if grid_channels else None

    def encode(self, condition: Condition) -> Condition:
        return self.embedding.encode(condition)

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        patch = self.config.patch_size
        fits = x.ndim == 1 + len(self.image_shape) and x.shape[1] == self.image_shape[0]
        axes = ("L", "H, W", "D, H, W")[len(self.image_shape) - 2]
        check_call(x, c_noise, fits, f"({self.image_shape[0]}, {axes})")
        given: Conditioned = self.embedding(c_noise, condition, x.shape[2:])
        emb, tokens, mask = given.embedding, given.tokens, given.mask
        recompute = self.config.activation_checkpointing and self.training
        h = self.norm_out.laid_out(self.conv_in(to_patches(x.to(self.conv_in.weight.dtype), patch)))
        if self.grid_in is not None and given.grids is not None:
            h = h + self.grid_in(to_patches(given.grids, patch))
        skips = [h]
        for block in self.down:
            h = call_block(block, h, emb, tokens, mask, recompute=recompute)
            skips.append(h)
        for block in self.middle:
            h = call_block(block, h, emb, tokens, mask, recompute=recompute)
        for block in self.up:
            if block.resample == "up":
                h = call_block(block, h, emb, tokens, mask, recompute=recompute)
                h = cropped(h, skips[-1].shape[2:])  # 7 was halved to 4, and doubled to 8
            else:
                h = call_block(block, torch.cat([h, skips.pop()], dim=1), emb, tokens, mask, recompute=recompute)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return from_patches(h, patch, x.shape[2:]).to(x.dtype)


def resampled(x: Tensor, resample: str) -> Tensor:
    """Halve (mean of 2 along each axis, odd sizes upwards) or double (repeat) the axes of x [B, C, *grid]."""
    if resample == "down":
        kernel = [min(2, length) for length in x.shape[2:]]  # of 1 along an axis of 1, as avg_pool3d insists
        return AVERAGES[x.ndim - 2](x, kernel, stride=2, ceil_mode=True)
    if resample == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return x


def num_heads(channels: int, head_channels: int) -> int:
    """Number of attention heads of about `head_channels` channels. Raises UserError when `channels` can't be shared."""
    heads = max(1, channels // head_channels)
    if channels % heads:
        raise UserError(
            f"network.head_channels: {head_channels} is not accepted; it must divide the width that attends, {channels}"
        )
    return heads
