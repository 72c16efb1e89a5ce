"""Layers that networks share: attention, norms, patches over any number of dimensions, calls outside graphs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from scoreray.data.errors import UserError

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
Output = TypeVar("Output")
Arguments = ParamSpec("Arguments")

# c_noise = ln(sigma)/4 spans [-1.6, 1.1] for sigma in [0.002, 80]. Wavelengths from 8 (nearly linear over that span)
# down to 1/4 (a factor e in sigma): every noise level has its own code, and neighbours have similar ones.
LONGEST_WAVELENGTH = 8.0
SHORTEST_WAVELENGTH = 0.25


MAX_LAYERS = 1024  # beyond any network that was trained; a typo would otherwise be built for minutes


# A head's attention weights from which on torch's fused attention beats two batched products on a CPU. Below, the
# products win: forward and backward in bf16 they are 4.0 times as fast at 64 queries and 32 keys, 2.5 times at 256 and
# 80, but 0.87 at 1024 and 512; in float32 5.6 times, 2.5 times and 0.57 (`benchmarks/attention.py`). Without a mask
# products take less: in float32 they are 1.8 times as fast at 256 tokens, 1.4 at 512, 0.7 at 1024; in bf16 1.1 at 1024
# and at 2048, where the fused kernel spares the memory of the weights.
FUSED_FROM_BYTES = 1 << 20
UNMASKED_FUSED_FROM_BYTES = 1 << 22


def require(ok: bool, field: str, value: object, accepted: str) -> None:
    """Raise a UserError that names `field`, its `value` and what is accepted, unless `ok`."""
    if not ok:
        raise UserError(f"network.{field}: {value} is not accepted; {accepted}")


def spatial_shape(image_shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """`image_shape` [C, *grid] as (channels, grid) of 1, 2 or 3 dimensions. Raises UserError where it is another."""
    if not 2 <= len(image_shape) <= 4:
        raise UserError(
            f"image shape {tuple(image_shape)}: this network takes [channels, length], [channels, height, width] or "
            "[channels, depth, height, width]; for points choose network.kind: mlp"
        )
    return image_shape[0], tuple(image_shape[1:])


def check_call(x: Tensor, c_noise: Tensor, accepted: bool, shape: str) -> None:
    """Raise a UserError unless x [B, ...] is `accepted` (else `shape` says what is) and has one c_noise a sample."""
    if not accepted:
        raise UserError(f"samples of shape {tuple(x.shape[1:])}: this network was built for {shape}")
    if c_noise.shape != x.shape[:1]:
        raise UserError(f"c_noise of shape {tuple(c_noise.shape)} for {len(x)} samples: give one noise level a sample")


def outside_graphs(function: Callable[Arguments, Output]) -> Callable[Arguments, Output]:
    """A decorator: `function` and what it calls run as they are, also in a module that is compiled.

    `torch.compiler.disable` alone imports the compiler where it decorates, which takes every process that imports the
    module longer than torch itself. Here it is called while a graph is traced, when the compiler is there already.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Output:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call


def sinusoids(c_noise: Tensor, channels: int) -> Tensor:
    """Cosines and sines [B, channels] of `c_noise` [B] at geometrically spaced frequencies, in float32 or wider."""
    dtype = torch.promote_types(c_noise.dtype, torch.float32)
    steps = torch.arange(channels // 2, device=c_noise.device, dtype=dtype) / max(channels // 2 - 1, 1)
    frequencies = 2 * math.pi / LONGEST_WAVELENGTH * (LONGEST_WAVELENGTH / SHORTEST_WAVELENGTH) ** steps
    phases = c_noise.to(dtype)[:, None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=1) * math.sqrt(2)


class Attention(nn.Module):
    """Multi-head attention of tokens [B, T, C] to themselves, queries and keys normalised (Henry 2020; Dehghani 2023).

    With `context_width` they attend to others: forward takes `context` [B, S, context_width]. `mask`, bool [B, S] of
    keys, says which there are; each row needs one at least. Others get the weight 0 exactly, whatever finite values
    they have.

    `plain` takes products everywhere (`attend`): fused kernels have no second derivative, which energies need.
    """

    def __init__(self, channels: int, num_heads: int, zero_output: bool = False, context_width: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.head_channels = channels // num_heads
        self.plain = False
        if context_width:
            self.q = nn.Linear(channels, channels)
            self.kv = nn.Linear(context_width, 2 * channels)
        else:
            self.qkv = nn.Linear(channels, 3 * channels)
        self.gain = nn.Parameter(torch.ones(self.head_channels))  # of q and k together: only their product acts
        self.out = nn.Linear(channels, channels)
        if zero_output:
            zero_(self.out)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.out(self.mixed(*self.heads(x, context), mask))

    def heads(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of what it attends to, [B, heads, tokens, head_channels] each."""
        if context is None:
            qkv = self._heads(self.qkv(x), 3)
            qk = F.layer_norm(qkv[:2], (self.head_channels,))
            q, k, v = qk[0], qk[1].to(qkv.dtype), qkv[2]
        else:
            (q,), (k, v) = self._heads(self.q(x), 1), self.keys_and_values(self.kv(context))
            q = F.layer_norm(q, (self.head_channels,))
        return (q * self.gain).to(v.dtype), k, v

    def keys_and_values(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens that a layer projected, [B, S, 2 C]."""
        k, v = self._heads(kv, 2)
        return F.layer_norm(k, (self.head_channels,)).to(v.dtype), v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Values as the queries weigh them, heads side by side: [B, T, C], what `out` reads."""
        values = (attention_by_products if self.plain else attend)(q, k, v, mask)
        return values.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """[B, T, parts C] -> [parts, B, heads, T, head_channels]."""
        x = x.unflatten(2, (parts, self.num_heads, self.head_channels))
        return x.permute(2, 0, 3, 1, 4).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention_by_products`, or torch's fused attention where that is the faster: on a GPU, and on a CPU where a
    head's weights are large."""
    fused_from = UNMASKED_FUSED_FROM_BYTES if mask is None else FUSED_FROM_BYTES
    many = q.shape[2] * k.shape[2] * q.element_size() >= fused_from
    if q.device.type == "cuda" or (many and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    return attention_by_products(q, k, v, mask)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of q [B, heads, T, D], k and v [B, heads, S, D] over the keys of mask, bool [B, S]."""
    logits = (q * q.shape[-1] ** -0.5).flatten(0, 1).bmm(k.flatten(0, 1).mT)
    if mask is not None:
        logits = logits.unflatten(0, q.shape[:2]).masked_fill(~mask[:, None, None], -math.inf).flatten(0, 1)
    weights = logits.softmax(dim=-1).to(v.dtype)
    return weights.bmm(v.flatten(0, 1)).unflatten(0, q.shape[:2])


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm with up to 32 groups of 4 channels or more; its moments are float32."""
    groups = next(n for n in range(min(32, max(1, channels // 4)), 0, -1) if channels % n == 0)
    return GroupNorm(groups, channels, eps=1e-5)


class GroupNorm(nn.GroupNorm):
    """(x [B, C, *grid], scale and shift [B, C] or None) -> norm(x) (1 + scale) + shift, [B, C, *grid].

    plain: made of torch's own operations alone, which can be differentiated twice.
    """

    plain = False

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if _is_channels_last(x) and self._may_be_fused(x):
            return cast(Tensor, _ChannelsLast.apply(x, self.weight, self.bias, scale, shift, self.num_groups, self.eps))
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is None or shift is None:
            return x
        scale, shift = (part[(..., *[None] * (x.ndim - 2))] for part in (scale, shift))
        return x * (scale + 1) + shift  # on a CPU faster than addcmul with a broadcast

    def laid_out(self, x: Tensor) -> Tensor:
        """x in the layout in which norms like this one and the convolutions between them are fastest: on a CPU with
        matrix units (AMX), bf16 images have their channels innermost. Everything else is left as it is."""
        wanted = x.ndim == 4 and x.dtype == torch.bfloat16 and self._may_be_fused(x)
        return x.contiguous(memory_format=torch.channels_last) if wanted and _has_matrix_units() else x

    def _may_be_fused(self, x: Tensor) -> bool:
        """Whether `_ChannelsLast` may compute this: on a CPU, not traced, and no forward derivative, which it lacks."""
        if self.plain or x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return forward_ad.unpack_dual(x).tangent is None


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@functools.cache
def _has_matrix_units() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


class _ChannelsLast(torch.autograd.Function):
    """norm(x) (1 + scale) + shift as A x + D, with A and D [B, C] from float32 sums over the grid.

    torch's own GroupNorm takes 10 times as long in this layout as in the usual one, in which convolutions are slow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
        num_groups: int, eps: float,
    ) -> Tensor:  # fmt: skip
        values = _rows(x)
        means = _means(values.shape[1], values.shape[2], num_groups)
        wide = values.float()
        sums = [wide.sum(1), (wide.square() if wide is values else wide.square_()).sum(1)]
        mean, square = (torch.cat(sums) @ means).chunk(2)
        inverse = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()
        gain, offset = weight, bias
        if scale is not None and shift is not None:
            gain, offset = torch.addcmul(weight, weight, scale), torch.addcmul(shift + bias, bias, scale)
        factor = inverse * gain
        addend = (offset - factor * mean).to(x.dtype)
        factor = factor.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, scale, gain, factor, mean, inverse, means)
        return _like(torch.addcmul(addend[:, None], values, factor[:, None]), x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, gain, factor, mean, inverse, means = ctx.saved_tensors
        values, given = _rows(x), _rows(dy.contiguous(memory_format=torch.channels_last))
        total = given.sum(1)
        d_gain = ((given * values).sum(1) - mean * total).mul_(inverse)  # of xhat = (x - mean) inverse
        # dx = inverse (g - mean of g - xhat mean of g xhat), with g = gain dy and means over a group
        along, constant = (torch.cat([gain * d_gain, (gain * total).float()]) @ means).chunk(2)
        along = along.mul_(inverse).mul_(inverse)
        constant = (along * mean).addcmul_(constant, inverse, value=-1).to(x.dtype)
        dx = torch.addcmul(constant[:, None], values, along.to(x.dtype)[:, None], value=-1)
        dx = dx.addcmul_(given, factor[:, None])
        if scale is None:
            return _like(dx, x), d_gain.sum(0).to(weight.dtype), total.sum(0), None, None, None, None
        d_scale = torch.addcmul(total * bias, d_gain.to(x.dtype), weight)
        d_weight, d_bias = (part.addcmul(part, scale).sum(0) for part in (d_gain.to(x.dtype), total))
        return _like(dx, x), d_weight, d_bias, d_scale, total, None, None


@functools.lru_cache(64)
def _means(num_places: int, num_channels: int, num_groups: int) -> Tensor:
    """[C, C] that makes of sums over a grid, [B, C], each channel's mean over its group."""
    size = num_channels // num_groups
    return torch.block_diag(*[torch.full((size, size), 1 / (size * num_places))] * num_groups)


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] with channels innermost -> [B, H W, C], a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """`_rows` undone, in the shape of x."""
    return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def allow_double_backward(network: nn.Module) -> nn.Module:
    """Make every attention layer and norm in `network` twice differentiable on every device; gives the network back."""
    for module in network.modules():
        if isinstance(module, Attention | GroupNorm):
            module.plain = True
    return network


def zero_(layer: Layer) -> Layer:
    """Fill a layer's weight and bias with zeros, in place: what it adds to is then unchanged at the start."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def call_block(block: Callable[..., Output], *inputs: Tensor | None, recompute: bool) -> Output:
    """`block(*inputs)`; with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def num_patches(grid: Sequence[int], size: int) -> tuple[int, ...]:
    """Patches of `size` along each axis of `grid`, the last one filled up."""
    return tuple(-(-length // size) for length in grid)


def to_patches(x: Tensor, size: int) -> Tensor:
    """Space to depth over 1, 2 or 3 dimensions: [B, C, *grid] -> [B, C size^n, *num_patches(grid, size)].

    A grid that `size` does not divide goes on in zeros at its far ends.
    """
    if size == 1:
        return x
    counts = num_patches(x.shape[2:], size)
    missing = [count * size - length for count, length in zip(counts, x.shape[2:], strict=True)]
    if any(missing):
        x = F.pad(x, [pad for amount in reversed(missing) for pad in (0, amount)])
    x = x.reshape(*x.shape[:2], *(part for count in counts for part in (count, size)))
    axes = range(2, x.ndim, 2)  # of counts; the axis after each is of places inside a patch
    return x.permute(0, 1, *(axis + 1 for axis in axes), *axes).reshape(x.shape[0], -1, *counts)


def from_patches(x: Tensor, size: int, grid: Sequence[int]) -> Tensor:
    """Depth to space, the inverse of `to_patches` for samples of `grid`."""
    if size == 1:
        return x
    counts, num_axes = x.shape[2:], x.ndim - 2
    x = x.reshape(x.shape[0], -1, *[size] * num_axes, *counts)
    order = [axis for i in range(2, 2 + num_axes) for axis in (i + num_axes, i)]
    x = x.permute(0, 1, *order).reshape(*x.shape[:2], *(count * size for count in counts))
    return cropped(x, grid)


def cropped(x: Tensor, grid: Sequence[int]) -> Tensor:
    """The first `grid` of x [B, C, ...] along its spatial axes."""
    for axis, length in enumerate(grid, start=2):
        x = x.narrow(axis, 0, length)
    return x


def grid_code(
    grid: Sequence[int], channels: int, *, centred: bool = False, device: torch.device | None = None
) -> Tensor:
    """Sines and cosines [product of grid, channels] of the place along each axis: where learned positions start.

    centred: places are counted from the middle, so that grids of several sizes have the same codes there.
    Channels that the axes can't share out are 0.
    """
    frequencies = 100.0 ** -torch.linspace(0, 1, channels // (2 * len(grid)), device=device)
    axes = [torch.arange(length, device=device) - ((length - 1) / 2 if centred else 0) for length in grid]
    places = torch.meshgrid(*axes, indexing="ij")
    phases = [axis.flatten()[:, None] * frequencies for axis in places]
    code = torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1) / math.sqrt(2)
    return F.pad(code, (0, channels - code.shape[1]))
