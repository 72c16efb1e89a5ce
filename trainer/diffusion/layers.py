"""Layers that the U-Net and the DiT share: embeddings of noise level and class, attention, checkpointed calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import LABEL, AnyCondition, Conditions, as_condition

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)

# c_noise = ln(sigma)/4 spans [-1.6, 1.1] for sigma in [0.002, 80]. Wavelengths from 8 (nearly linear over that span)
# down to 1/4 (a factor e in sigma): every noise level has its own code, and neighbours have similar ones.
LONGEST_WAVELENGTH = 8.0
SHORTEST_WAVELENGTH = 0.25


MAX_LAYERS = 1024  # beyond any network that was trained; a typo would otherwise be built for minutes


def require(ok: bool, field: str, value: object, accepted: str) -> None:
    """Raise a UserError that names `field`, its `value` and what is accepted, unless `ok`."""
    if not ok:
        raise UserError(f"network.{field}: {value} is not accepted; {accepted}")


def image_size(image_shape: Sequence[int], patch_size: int) -> tuple[int, int, int]:
    """`image_shape` as (channels, height, width). Raises UserError when it is none, or does not divide into patches."""
    if len(image_shape) != 3:
        raise UserError(
            f"image shape {tuple(image_shape)}: this network takes images [channels, height, width]; "
            "for points choose network.kind: mlp"
        )
    channels, height, width = image_shape
    require(
        height % patch_size == 0 and width % patch_size == 0,
        "patch_size",
        patch_size,
        f"it must divide the image's height and width, {height}x{width}",
    )
    return channels, height, width


def check_call(x: Tensor, c_noise: Tensor, accepted: bool, shape: str) -> None:
    """Raise a UserError unless x [B, ...] is `accepted` (else `shape` says what is) and has one c_noise a sample."""
    if not accepted:
        raise UserError(f"samples of shape {tuple(x.shape[1:])}: this network was built for {shape}")
    if c_noise.shape != x.shape[:1]:
        raise UserError(f"c_noise of shape {tuple(c_noise.shape)} for {len(x)} samples: give one noise level a sample")


def sinusoids(c_noise: Tensor, channels: int) -> Tensor:
    """Cosines and sines [B, channels] of `c_noise` [B] at geometrically spaced frequencies, in float32 or wider."""
    dtype = torch.promote_types(c_noise.dtype, torch.float32)
    steps = torch.arange(channels // 2, device=c_noise.device, dtype=dtype) / max(channels // 2 - 1, 1)
    frequencies = 2 * math.pi / LONGEST_WAVELENGTH * (LONGEST_WAVELENGTH / SHORTEST_WAVELENGTH) ** steps
    phases = c_noise.to(dtype)[:, None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=1) * math.sqrt(2)


class Embedding(nn.Module):
    """Noise level and class as one vector: (c_noise [B], condition or None) -> [B, width], SiLU applied.

    Label -1 is the null class, and None means -1 for all. A network with `num_classes` 0 ignores labels.
    """

    def __init__(self, conditions: Conditions, sinusoid_channels: int, width: int):
        super().__init__()
        self.sinusoid_channels = sinusoid_channels
        self.noise_in = nn.Linear(sinusoid_channels, width)
        self.noise_out = nn.Linear(width, width)
        self.conditions = conditions
        num_classes = conditions[LABEL].num_classes if LABEL in conditions else 0
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None  # row 0 is the null class
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.5)

    def forward(self, c_noise: Tensor, condition: AnyCondition) -> Tensor:
        h = sinusoids(c_noise, self.sinusoid_channels).to(self.noise_in.weight.dtype)
        h = self.noise_out(F.silu(self.noise_in(h)))
        if self.classes is not None:
            given = as_condition(condition, self.conditions)
            labels = given.values.get(LABEL) if given is not None else None
            if labels is None:
                labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.long)
            h = h + self.classes(labels + 1)
        return F.silu(h)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, C], queries and keys normalised (Henry 2020; Dehghani 2023).

    On a GPU it is torch's fused scaled-dot-product attention. On a CPU two plain batched products are up to six times
    as fast at the few tokens of an image (64 tokens in bf16: 4.5 ms against 26.9 ms, forward and backward, measured).
    `plain` takes the products everywhere: fused kernels have no second derivative, which energies need.
    """

    def __init__(self, channels: int, num_heads: int, zero_output: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.head_channels = channels // num_heads
        self.plain = False
        self.qkv = nn.Linear(channels, 3 * channels)
        self.gain = nn.Parameter(torch.ones(self.head_channels))  # of q and k together: only their product acts
        self.out = nn.Linear(channels, channels)
        if zero_output:
            zero_(self.out)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_channels)
        qkv = qkv.permute(2, 0, 3, 1, 4).contiguous()  # [3, B, heads, T, head_channels]
        qk = F.layer_norm(qkv[:2], (self.head_channels,))
        q, k, v = (qk[0] * self.gain).to(qkv.dtype), qk[1].to(qkv.dtype), qkv[2]
        if x.device.type == "cuda" and not self.plain:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * self.head_channels**-0.5).flatten(0, 1).bmm(k.flatten(0, 1).mT).softmax(dim=-1).to(v.dtype)
            mixed = weights.bmm(v.flatten(0, 1)).view(batch, self.num_heads, tokens, self.head_channels)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, channels))


def allow_double_backward(network: nn.Module) -> nn.Module:
    """Make every attention layer in `network` twice differentiable on every device; gives the same network back."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.plain = True
    return network


def zero_(layer: Layer) -> Layer:
    """Fill a layer's weight and bias with zeros, in place: what it adds to is then unchanged at the start."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def call_block(block: Callable[..., Tensor], *inputs: Tensor, recompute: bool) -> Tensor:
    """`block(*inputs)`; with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def to_patches(x: Tensor, size: int) -> Tensor:
    """Space to depth: [B, C, H, W] -> [B, C size^2, H/size, W/size]."""
    return x if size == 1 else F.pixel_unshuffle(x, size)


def from_patches(x: Tensor, size: int) -> Tensor:
    """Depth to space, the inverse of `to_patches`."""
    return x if size == 1 else F.pixel_shuffle(x, size)
