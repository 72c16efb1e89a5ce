"""Normalisation of a field's values on their way to the network, and its inverse on the way out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

if TYPE_CHECKING:  # 0.9 s: manifests name normalisations, and are read by commands that compute nothing
    import torch
    from torch import Tensor

Normalisation = Literal["none", "channel", "log1p", "range"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)


@dataclass(frozen=True)
class Normaliser:
    """y = (f(x) - offset) / scale for each channel, the first axis of a sample, f being log1p |x| with x's sign for
    "log1p", else x itself. "none" leaves values as they are, bit for bit."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: Normalisation
    offset: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    scale: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()

    def apply(self, x: Tensor) -> Tensor:
        """x [B, C, ...] in the data's units -> what the network sees, in x's dtype, float32 at least."""
        if self.kind == "none":
            return x
        import torch

        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "log1p":
            x = x.sign() * x.abs().log1p()
        return (x - _per_channel(self.offset, x)) / _per_channel(self.scale, x)

    def invert(self, y: Tensor) -> Tensor:
        """The inverse of `apply`: [B, C, ...] in the data's units."""
        if self.kind == "none":
            return y
        x = y * _per_channel(self.scale, y) + _per_channel(self.offset, y)
        return x.sign() * x.abs().expm1() if self.kind == "log1p" else x


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] as float32 [-1, 1]; floating-point images unchanged (float32 at least)."""
    import torch

    if images.dtype == torch.uint8:
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
    return images.to(torch.promote_types(images.dtype, torch.float32))


def to_uint8(x: Tensor) -> Tensor:
    """The inverse: values in [-1, 1] as uint8 [0, 255], those outside clipped."""
    import torch

    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _per_channel(values: tuple[float, ...], x: Tensor) -> Tensor:
    """One number a channel as [C, 1, ...], to meet x [B, C, ...]."""
    import torch

    # A copy to a GPU waits for the work that is queued there, so each is made once; the compiler makes constants.
    make = _vector.__wrapped__ if torch.compiler.is_compiling() else _vector
    return make(values, x.dtype, x.device).view(-1, *[1] * (x.ndim - 2))


@functools.lru_cache(64)
def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    with torch.inference_mode(False):  # also for callers that differentiate
        return torch.tensor(values, dtype=dtype, device=device)
