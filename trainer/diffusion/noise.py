"""Random numbers that are pure functions of (seed, stream, position, element).

Training draws no numbers from a generator with state. A sample's noise is a hash of its place in the run, so it is
the same on any rank, at any world size, after any resume, and no state of a generator is ever saved. The hash is the
finalizer of SplitMix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic that torch has on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# One stream per use, so that two uses at the same position never share a number.
STREAM_SIGMA = 1
STREAM_NOISE = 2
STREAM_LABEL_DROPOUT = 3
STREAM_PROBE = 4
STREAM_CHAIN = 5
STREAM_RESTART = 6
STREAM_BINARIZE = 7
STREAM_AUGMENTATION = 8
STREAM_LATENT = 9  # of latents that are drawn from moments
STREAM_TARGET = 10  # of the level that a flow map's step is to reach
STREAM_GUIDANCE = 11  # of weights of guidance
STREAM_ENCODING = 1 << 17  # of latents that are drawn when they are stored, one for each encoder
STREAM_CONDITION_DROPOUT = 1 << 16  # and from here on one for each condition, by its place in their names' order

STREAM_WEIGHTS = 1 << 40  # of noise on weights: from here on one for each step
_CHAIN_DRAWS = 1 << 20  # a chain's draws have the streams from here on, one each

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def uniform(
    seed: int,
    positions: Tensor,
    shape: tuple[int, ...] = (),
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float32 a rounding of float64.

    positions: int64 [B], a sample's place in the run. shape: of one sample's numbers. Returns [B, *shape].
    An element depends on its index in the flattened `shape` only, never on the other positions in the call.
    """
    hashed = _hash(seed, _on(positions, device), math.prod(shape), [stream])
    # The half keeps 0 and 1 out: 23 bits and a half are exact in float32, 52 bits and a half in float64.
    bits, wide = (52, torch.float64) if dtype == torch.float64 else (23, torch.float32)
    values = _shift(hashed, 64 - bits).to(wide).add_(0.5).mul_(2.0**-bits)
    return values.to(dtype).reshape(len(positions), *shape)


def normal(
    seed: int,
    positions: Tensor,
    shape: tuple[int, ...] = (),
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers, [B, *shape]; arguments as for `uniform`.

    Box-Muller makes two of each 64-bit hash: 32 bits of radius, which end the tails at 6.77 sigma, and 32 of angle.
    """
    return normals(seed, positions, shape, streams=[stream], dtype=dtype, device=device)[0]


def normals(
    seed: int,
    positions: Tensor,
    shape: tuple[int, ...],
    *,
    streams: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `normal` gives for each of `streams`, [len(streams), B, *shape]: sooner than one after another."""
    positions, count = _on(positions, device), math.prod(shape)
    hashed = _hash(seed, positions, (count + 1) // 2, streams)
    pairs = _box_muller(hashed, torch.float64 if dtype == torch.float64 else torch.float32)
    return pairs.flatten(1)[:, :count].to(dtype).reshape(len(streams), len(positions), *shape)


def rademacher(
    seed: int, positions: Tensor, shape: tuple[int, ...] = (), *, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """-1 or 1 with equal probability, [B, *shape]; arguments as for `uniform`."""
    hashed = _hash(seed, positions, math.prod(shape), [stream])
    return (hashed >= 0).to(dtype).mul_(2.0).sub_(1.0).reshape(len(positions), *shape)


class ChainNoise:
    """Numbers for chains at `positions` int64 [B], each draw a stream of its own: no count of draws is fixed before."""

    def __init__(self, seed: int, positions: Tensor) -> None:
        self._seed, self._positions, self._draw = seed, positions, _CHAIN_DRAWS

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next draw, uniform in (0, 1), [B, *shape]."""
        self._draw += 1
        return uniform(self._seed, self._positions, shape, stream=self._draw, dtype=dtype)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next draw, standard normal, [B, *shape]."""
        self._draw += 1
        return normal(self._seed, self._positions, shape, stream=self._draw, dtype=dtype)


def _on(positions: Tensor, device: torch.device | str | None) -> Tensor:
    return positions if device is None else positions.to(device)


def _hash(seed: int, positions: Tensor, count: int, streams: Sequence[int]) -> Tensor:
    """[S B, count] int64, each a hash of its (seed, stream, position, element)."""
    root = _mix_int(seed + _GOLDEN)
    bases = torch.tensor([_signed(_mix_int(root + stream * _GOLDEN)) for stream in streams], device=positions.device)
    keys = _mix(positions.to(torch.int64) * _signed(_GOLDEN) + bases[:, None]).flatten()
    if torch.compiler.is_compiling():
        # The exclusive or with 0 changes nothing, but hides the range from Inductor, which would take range times
        # constant for an index, in 32 bits on a GPU, where the constant does not fit (Triton: "out of range").
        numbers = torch.arange(1, count + 1, device=positions.device) ^ 0
        return _mix(keys[:, None] + _mix(numbers * _signed(_GOLDEN)))
    elements = _elements(count, positions.device)
    if positions.device.type == "cpu":
        # numpy has unsigned shifts, so a hash takes two thirds of torch's operations; both wrap alike.
        hashed = np.add.outer(_unsigned(keys), _unsigned(elements))
        return torch.from_numpy(_mix_unsigned(hashed).view(np.int64))
    return _mix(keys[:, None] + elements)


@functools.lru_cache(8)
def _elements(count: int, device: torch.device) -> Tensor:
    """Elements' numbers, hashed before they meet the position: two positions then share single values by chance at
    most, never a run of them, as counters that overlap would."""
    return _mix(torch.arange(1, count + 1, device=device) * _signed(_GOLDEN))


def _box_muller(hashed: Tensor, dtype: torch.dtype) -> Tensor:
    """Two normals of each 64-bit hash, [..., 2]: 32 bits of radius, never of ln 0, and 32 of angle."""
    radius = _shift(hashed, 32).to(dtype).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = hashed.to(torch.int32).to(dtype).mul_(math.pi * 2.0**-31)
    if torch.compiler.is_compiling():  # Inductor makes no kernels for complex numbers
        return torch.stack([angle.cos() * radius, angle.sin() * radius], dim=-1)
    real = angle.cos().mul_(radius)
    return torch.view_as_real(torch.complex(real, angle.sin_().mul_(radius)))


def _unsigned(z: Tensor) -> np.ndarray:
    return z.numpy().view(np.uint64)


def _mix_unsigned(z: np.ndarray) -> np.ndarray:
    """`_mix` of uint64, in place."""
    shifted = np.empty_like(z)
    for bits, factor in ((30, _FACTORS[0]), (27, _FACTORS[1]), (31, 1)):
        np.right_shift(z, np.uint64(bits), out=shifted)
        np.bitwise_xor(z, shifted, out=z)
        if factor != 1:
            np.multiply(z, np.uint64(factor), out=z)
    return z


def _mix(z: Tensor) -> Tensor:
    z = (_shift(z, 30) ^ z).mul_(_signed(_FACTORS[0]))
    z = (_shift(z, 27) ^ z).mul_(_signed(_FACTORS[1]))
    return _shift(z, 31) ^ z


def _shift(z: Tensor, bits: int) -> Tensor:
    """The unsigned shift to the right (int64's own copies the sign)."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_int(z: int) -> int:
    z &= _BITS
    z = ((z ^ (z >> 30)) * _FACTORS[0]) & _BITS
    z = ((z ^ (z >> 27)) * _FACTORS[1]) & _BITS
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    z &= _BITS
    return z - (1 << 64) if z >> 63 else z
