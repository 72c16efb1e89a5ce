"""A KL autoencoder: convolutions between samples and latents of fewer values, each latent a Gaussian (Rombach 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.own_code import line_of
from scoreray.trainer.diffusion.condition import Conditions
from scoreray.trainer.diffusion.denoiser import like
from scoreray.trainer.diffusion.layers import call_block, from_patches, group_norm, require, spatial_shape, to_patches
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.unet import CONVOLUTIONS, ResidualBlock, check_sizes, num_heads

LOG_VARIANCE = (-30.0, 20.0)  # of a latent; beyond, its exponential is no number that float32 can learn from


@runtime_checkable
class AutoencoderNetwork(Protocol):
    """What `objective.kind` autoencoding trains. Somebody else's network is one if it has these two methods.

    Layers that they call are `nn.Module`s of the network: ZeRO stage 3 gathers a module's weights when it is called.
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, *grid] -> mean and standard deviation (above 0) of its latents, each [B, c, *latent grid]."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, c, *latent grid] -> samples [B, C, *grid]."""
        ...


@dataclass(frozen=True)
class AutoencoderConfig(BaseNetworkConfig):
    """The autoencoder's size. Raises UserError on a value that no sample could go with.

    Latents are patch_size 2^(levels - 1) times smaller along each axis than samples.
    model_channels: times channel_mult[i] the width at resolution level i.  channel_mult: a factor for each level; each
    level after the first halves every spatial axis.  num_blocks: residual blocks at each level.
    latent_channels: channels of a latent.  patch_size: what every axis is divided by before the first level.
    attention: the middle of encoder and decoder attends to itself; head_channels: of its heads.
    activation_checkpointing: keep only each block's input for the backward pass; a third more work, far less memory.
    """

    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_blocks: int = 2
    latent_channels: int = 4
    patch_size: int = 1
    attention: bool = True
    head_channels: int = 64
    activation_checkpointing: bool = False
    kind: Literal["autoencoder"] = field(default="autoencoder", kw_only=True)

    def __post_init__(self) -> None:
        check_sizes(self)
        require(self.latent_channels > 0, "latent_channels", self.latent_channels, "choose 1 or more")

    @property
    def factor(self) -> int:
        """How many times smaller latents are than samples, along each axis."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> KLAutoencoder:
        """Conditions are none: an autoencoder takes no part in them."""
        return KLAutoencoder(self, image_shape)


class KLAutoencoder(nn.Module):
    """An `AutoencoderNetwork` of the U-Net's residual blocks without a noise level, over 1, 2 or 3 dimensions.

    Any grid of as many dimensions as `image_shape` (C, *grid) has and whose axes are multiples of `config.factor`.
    Means and standard deviations are float32 or wider, whatever the weights are.
    """

    def __init__(self, config: AutoencoderConfig, image_shape: Sequence[int]):
        super().__init__()
        channels, grid = spatial_shape(image_shape)
        self.config, self.image_shape = config, (channels, *grid)
        self._check_grid(grid)
        widths = [config.model_channels * mult for mult in config.channel_mult]
        heads = num_heads(widths[-1], config.head_channels) if config.attention else 0
        axes, patches = len(grid), channels * config.patch_size ** len(grid)

        def block(in_channels: int, out_channels: int, resample: str = "", heads: int = 0) -> ResidualBlock:
            return ResidualBlock(in_channels, out_channels, 0, heads=heads, resample=resample, num_axes=axes)

        middle = widths[-1]
        down, up = list[ResidualBlock](), list[ResidualBlock]()
        for before, width in zip([widths[0], *widths], widths, strict=False):
            down += [block(before, width, "down")] if down else []
            down += [block(width, width) for _ in range(config.num_blocks)]
        for before, width in zip([middle, *widths[::-1]], widths[::-1], strict=False):
            up += [block(before, width, "up")] if up else []
            up += [block(width, width) for _ in range(config.num_blocks)]
        attending = [block(middle, middle, heads=heads), block(middle, middle)]
        self.encoder = Coder(patches, 2 * config.latent_channels, [*down, *attending], config.activation_checkpointing)
        attending = [block(middle, middle, heads=heads), block(middle, middle)]
        self.decoder = Coder(config.latent_channels, patches, [*attending, *up], config.activation_checkpointing)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 1 + len(self.image_shape) or x.shape[1] != self.image_shape[0]:
            axes = ("L", "H, W", "D, H, W")[len(self.image_shape) - 2]
            raise UserError(
                f"samples of shape {tuple(x.shape[1:])}: this network was built for ({self.image_shape[0]}, {axes})"
            )
        self._check_grid(x.shape[2:])
        h = self.encoder(to_patches(x, self.config.patch_size))
        mean, log_variance = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=1)
        return mean, (log_variance.clamp(*LOG_VARIANCE) / 2).exp()

    def decode(self, z: Tensor) -> Tensor:
        h = self.decoder(z)
        patch = self.config.patch_size
        x = from_patches(h, patch, [length * patch for length in h.shape[2:]])
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The reconstruction of x [B, ...] from its latents at z [B] standard deviations from their means."""
        mean, std = self.encode(x)
        return self.decode(mean + std * like(z, mean))

    def _check_grid(self, grid: Sequence[int]) -> None:
        factor = self.config.factor
        if any(length % factor for length in grid):
            raise UserError(
                f"network.kind 'autoencoder': a grid of {list(grid)} is no multiple of {factor}, the product of "
                "patch_size and 2 for each level of channel_mult after the first; choose others, or pack the data at "
                "another size"
            )


class Coder(nn.Module):
    """A convolution, residual blocks, and a convolution: [B, in, *grid] -> [B, out, *grid']."""

    def __init__(self, in_channels: int, out_channels: int, blocks: Iterable[ResidualBlock], recompute: bool):
        super().__init__()
        self.blocks, self.recompute = nn.ModuleList(blocks), recompute
        first, last = self.blocks[0], self.blocks[-1]
        assert isinstance(first, ResidualBlock)
        assert isinstance(last, ResidualBlock)
        axes, width = first.conv_in.weight.ndim - 2, last.conv_out.out_channels
        conv = CONVOLUTIONS[axes]
        self.conv_in = conv(in_channels, first.conv_in.in_channels, 3, padding=1)
        self.norm_out = group_norm(width)
        self.conv_out = conv(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        for block in self.blocks:
            h = call_block(block, h, recompute=self.recompute and self.training)
        return self.conv_out(F.silu(self.norm_out(h)))


def check_autoencoder(network: nn.Module, kind: str, shape: Sequence[int]) -> AutoencoderNetwork:
    """`network`, if it encodes and decodes samples of `shape`; it is called once where it is on the meta device. Raises
    UserError."""
    if not isinstance(network, AutoencoderNetwork):
        raise UserError(
            f"objective.kind: 'autoencoding' trains a network that has encode and decode, and network.kind '{kind}' "
            "has not; choose network.kind autoencoder, or another objective"
        )
    if not any(parameter.is_meta for parameter in network.parameters()):
        return network
    x = torch.empty(2, *shape, device="meta")
    try:
        mean, std = network.encode(x)
        decoded = network.decode(mean)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # Operations that meta tensors lack, and code that looks at values: left to the first step.
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            return network
        raise UserError(f"network: kind '{kind}': encode or decode failed: {line_of(error)}") from error
    if mean.shape != std.shape or len(mean) != len(x) or decoded.shape != x.shape:
        raise UserError(
            f"network: kind '{kind}': of x {list(x.shape)} encode gave {list(mean.shape)} and {list(std.shape)}, "
            f"decode {list(decoded.shape)}: mean and std must have one shape, and decode x's"
        )
    return network
