"""A U-Net for images: residual blocks that noise level and class scale and shift, attention at chosen resolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data.errors import UserError
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


@dataclass(frozen=True)
class UNetConfig(BaseNetworkConfig):
    """The U-Net's size. Raises UserError on a value that no image could go with.

    model_channels times channel_mult[i] is the width at resolution level i; each level halves height and width.
    attention_resolutions: heights of the feature maps that attend; the middle of the network always does.
    patch_size: work on space-to-depth patches of this size (2 makes a 28x28 image 14x14: a quarter of the work).
    activation_checkpointing: keep only each block's input for the backward pass; a third more work, far less memory.
    """

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2)
    num_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    head_channels: int = 64
    dropout: float = 0.0
    patch_size: int = 1
    activation_checkpointing: bool = False
    kind: Literal["unet"] = field(default="unet", kw_only=True)

    def __post_init__(self) -> None:
        require(
            self.model_channels > 0 and self.model_channels % 8 == 0,
            "model_channels",
            self.model_channels,
            "choose a positive multiple of 8",
        )
        require(
            bool(self.channel_mult) and all(m > 0 for m in self.channel_mult),
            "channel_mult",
            self.channel_mult,
            "choose one positive integer a resolution level, such as [1, 2, 2]",
        )
        blocks = f"choose 1 to {MAX_LAYERS} residual blocks a level"
        require(0 < self.num_blocks <= MAX_LAYERS, "num_blocks", self.num_blocks, blocks)
        require(self.head_channels > 0, "head_channels", self.head_channels, "choose 1 or more channels a head")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "choose a probability in [0, 1)")
        require(self.patch_size > 0, "patch_size", self.patch_size, "choose 1 or a divisor of the image's size")

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> UNet:
        return UNet(self, image_shape, conditions)


class ResidualBlock(nn.Module):
    """Residual block, BigGAN order (Song 2021, DDPM++; scale-shift of Dhariwal 2021), skip paths scaled by sqrt(1/2).

    (x [B, in, H, W], emb [B, E]) -> [B, out, H', W']. A block that goes up doubles height and width.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_width: int, *, heads: int = 0, dropout: float = 0.0, resample=""
    ):
        super().__init__()
        self.resample = resample
        self.dropout = dropout
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(emb_width, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.conv_out = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.norm_attention = group_norm(out_channels) if heads else None
        self.attention = Attention(out_channels, heads, zero_output=True) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_in(resampled(F.silu(self.norm_in(x)), self.resample))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_out(h) * (scale + 1) + shift)  # on a CPU faster than addcmul with a broadcast
        h = self.conv_out(F.dropout(h, self.dropout, self.training))
        x = resampled(x, self.resample)
        # Two independent paths of unit variance sum to variance 2; sqrt(1/2) keeps it at 1 at any depth (Song 2021).
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attention is None or self.norm_attention is None:
            return x
        h = self.attention(self.norm_attention(x).flatten(2).mT)
        return (x + h.mT.view_as(x)) * math.sqrt(0.5)


class UNet(nn.Module):
    """network(x [B, C, H, W], c_noise [B], condition or None) -> [B, C, H, W], in x's dtype.

    Any height and width that patch_size divides; odd feature maps are halved upwards and cropped on the way back.
    The output is 0 before training. Raises UserError when the config or x does not fit `image_shape` (C, H, W).
    Architecture: Ho 2020, Song 2021 (DDPM++), Dhariwal 2021 (ADM), as put together in Karras 2022.
    """

    def __init__(self, config: UNetConfig, image_shape: Sequence[int], conditions: Conditions | int = 0):
        super().__init__()
        channels, height, _ = image_size(image_shape, config.patch_size)
        self.config = config
        self.conditions, self.channels = conditions_of(conditions), channels
        self.num_classes = self.conditions[LABEL].num_classes if LABEL in self.conditions else 0
        widths = [config.model_channels * mult for mult in config.channel_mult]
        heights = [height // config.patch_size]
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
        self.embedding = Embedding(self.conditions, config.model_channels, emb_width)

        def block(in_channels: int, level: int, *, attention: bool = False, resample: str = "") -> ResidualBlock:
            attends = attention or (not resample and heights[level] in config.attention_resolutions)
            heads = num_heads(widths[level], config.head_channels) if attends else 0
            return ResidualBlock(
                in_channels, widths[level], emb_width, heads=heads, dropout=config.dropout, resample=resample
            )

        patch_channels = channels * config.patch_size**2
        self.conv_in = nn.Conv2d(patch_channels, widths[0], 3, padding=1)
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
        self.conv_out = zero_(nn.Conv2d(width, patch_channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        patch = self.config.patch_size
        fits = x.ndim == 4 and x.shape[1] == self.channels and not x.shape[2] % patch and not x.shape[3] % patch
        check_call(x, c_noise, fits, f"({self.channels}, H, W), H and W multiples of {patch}")
        emb = self.embedding(c_noise, condition)
        recompute = self.config.activation_checkpointing and self.training
        h = self.conv_in(to_patches(x.to(self.conv_in.weight.dtype), self.config.patch_size))
        skips = [h]
        for block in self.down:
            h = call_block(block, h, emb, recompute=recompute)
            skips.append(h)
        for block in self.middle:
            h = call_block(block, h, emb, recompute=recompute)
        for block in self.up:
            if block.resample == "up":
                h = call_block(block, h, emb, recompute=recompute)
                h = h[:, :, : skips[-1].shape[2], : skips[-1].shape[3]]  # 7 was halved to 4, and doubled to 8
            else:
                h = call_block(block, torch.cat([h, skips.pop()], dim=1), emb, recompute=recompute)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return from_patches(h, self.config.patch_size).to(x.dtype)


def resampled(x: Tensor, resample: str) -> Tensor:
    """Halve (mean of 2x2, odd sizes upwards) or double (repeat) the height and width of x [B, C, H, W], or neither."""
    if resample == "down":
        return F.avg_pool2d(x, 2, ceil_mode=True)
    if resample == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return x


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with up to 32 groups of 4 channels or more; torch accumulates its moments in float32."""
    groups = next(n for n in range(min(32, max(1, channels // 4)), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def num_heads(channels: int, head_channels: int) -> int:
    """Number of attention heads of about `head_channels` channels. Raises UserError when `channels` can't be shared."""
    heads = max(1, channels // head_channels)
    if channels % heads:
        raise UserError(
            f"network.head_channels: {head_channels} is not accepted; it must divide the width that attends, {channels}"
        )
    return heads
