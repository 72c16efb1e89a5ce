"""Random numbers that are pure functions of (seed, stream, position, element).

Training draws no numbers from a generator with state. A sample's noise is a hash of its place in the run, so it is
the same on any rank, at any world size, after any resume, and no state of a generator is ever saved. The hash is the
finalizer of SplitMix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic that torch has on every device. Normal
numbers are read off the hash through a table by operations that every device rounds alike, so all have the same bits.
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

_BLOCK = 1 << 14
"""Hashes that a CPU makes at once: three buffers of 128 KiB, so that the passes over them stay in a core's cache."""

_SEGMENT_BITS, _SEGMENT_SHIFT = 8, np.uint32(23 - 8)
"""Of a float's significand, that number the segments of an octave in the table of quantiles."""

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUNDS = [(np.uint64(30), np.uint64(_FACTORS[0])), (np.uint64(27), np.uint64(_FACTORS[1])), (np.uint64(31), None)]


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

    Each half of a 64-bit hash is a signed number of 32 bits, of which the inverse of the normal distribution is taken.
    It is a line on each of 7,936 segments, 256 to an octave of the tail's probability: off by 7e-7 at most, rounding
    included, and 6.23 sigma is the largest number. All dtypes get the same numbers: float32's, or a rounding of them.
    Compiled code gets the same bits (Inductor may skip the rounding to bfloat16 of what it goes on computing with).
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
    draw = _normals_of_graph if torch.compiler.is_compiling() else _normals
    values = draw(_signed(seed), positions, (count + 1) // 2, list(streams))
    return values[:, :count].to(dtype).reshape(len(streams), len(positions), *shape)


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
    if torch.compiler.is_compiling():
        # The exclusive or with 0 changes nothing, but hides the range from Inductor, which would take range times
        # constant for an index, in 32 bits on a GPU, where the constant does not fit (Triton: "out of range").
        numbers = torch.arange(1, count + 1, device=positions.device) ^ 0
        return _mix(_keys(seed, positions, streams)[:, None] + _mix(numbers * _signed(_GOLDEN)))
    elements = _elements(count, str(positions.device))
    if positions.device.type == "cpu":
        hashed = np.add.outer(_keys_by_numpy(seed, positions, streams), _unsigned(elements))
        return torch.from_numpy(_mix_unsigned(hashed).view(np.int64))
    return _mix(_keys(seed, positions, streams)[:, None] + elements)


def _bases(seed: int, streams: Sequence[int]) -> list[int]:
    root = _mix_int(seed + _GOLDEN)
    return [_mix_int(root + stream * _GOLDEN) for stream in streams]


def _keys(seed: int, positions: Tensor, streams: Sequence[int]) -> Tensor:
    """[S B] int64, a hash of each (seed, stream, position)."""
    bases = torch.tensor([_signed(base) for base in _bases(seed, streams)], device=positions.device)
    return _mix(positions.to(torch.int64) * _signed(_GOLDEN) + bases[:, None]).flatten()


def _keys_by_numpy(seed: int, positions: Tensor, streams: Sequence[int]) -> np.ndarray:
    """The same as uint64. numpy has unsigned shifts, so a hash takes two thirds of torch's operations; both wrap."""
    keys = _unsigned(positions.to(torch.int64)) * np.uint64(_GOLDEN)
    return _mix_unsigned(np.add.outer(np.array(_bases(seed, streams), dtype=np.uint64), keys)).ravel()


@functools.lru_cache(8)
def _elements(count: int, device: str) -> Tensor:
    """Elements' numbers, hashed before they meet the position: two positions then share single values by chance at
    most, never a run of them, as counters that overlap would."""
    return _mix(torch.arange(1, count + 1, device=device) * _signed(_GOLDEN))


def _normals(seed: int, positions: Tensor, num_hashes: int, streams: Sequence[int]) -> Tensor:
    """[S B, 2 num_hashes] float32."""
    if positions.device.type == "cpu":
        return _normals_in_blocks(_keys_by_numpy(seed, positions, streams), _unsigned(_elements(num_hashes, "cpu")))
    return _quantile(_hash(seed, positions, num_hashes, streams).view(torch.int32))


# Compilers call `_normals` and do not look into it: by their code an H200 gave other last bits, presumably as product
# and sum of `_quantile` became one operation, rounded once; a rounding through float64 between them didn't help.
_normals_of_graph = torch.library.custom_op(
    "scoreray::keyed_normals", _normals, mutates_args=(),
    schema="(int seed, Tensor positions, SymInt num_hashes, int[] streams) -> Tensor",
)  # fmt: skip


@_normals_of_graph.register_fake
def _like_normals(seed: int, positions: Tensor, num_hashes: int, streams: Sequence[int]) -> Tensor:
    return positions.new_empty((len(streams) * positions.shape[0], 2 * num_hashes), dtype=torch.float32)


def _normals_in_blocks(keys: np.ndarray, elements: np.ndarray) -> Tensor:
    """[rows, 2 n] float32 of keys [rows] and elements [n], uint64: `_quantile` of all their hashes, by numpy.

    Block after block in the same three buffers: all hashes at once would leave the cache.
    """
    columns = max(1, min(_BLOCK, len(elements)))
    rows = max(1, min(len(keys), _BLOCK // columns))
    values, buffers = np.empty((len(keys), 2 * len(elements)), np.float32), np.empty((3, rows * columns), np.uint64)
    intercepts, slopes = _lines("cpu")
    for top in range(0, len(keys), rows):
        for left in range(0, len(elements), columns):
            some, others = keys[top : top + rows], elements[left : left + columns]
            hashed, k, product = buffers[:, : len(some) * len(others)]
            np.add.outer(some, others, out=hashed.reshape(len(some), len(others)))
            _mix_unsigned(hashed, k)
            k, product = k.view(np.float32), product.view(np.float32)
            np.copyto(k, hashed.view(np.int32), casting="same_kind")
            segments = np.right_shift(k.view(np.uint32), _SEGMENT_SHIFT, out=hashed.view(np.uint32))
            at = torch.from_numpy(segments.view(np.int32))
            torch.index_select(slopes, 0, at, out=torch.from_numpy(product))
            np.multiply(product, k, out=product)
            torch.index_select(intercepts, 0, at, out=torch.from_numpy(k))
            block = values[top : top + rows, 2 * left : 2 * (left + columns)]
            np.add(product.reshape(block.shape), k.reshape(block.shape), out=block)
    return torch.from_numpy(values)


def _quantile(halves: Tensor) -> Tensor:
    """Standard normal numbers, float32, of int32 k: the x of k's sign beyond which |k| / 2^32 of a normal's mass is.

    Conversion, bits, table, one product and one sum: every device rounds each alike.
    """
    k = halves.to(torch.float32)
    intercepts, slopes = _lines(str(halves.device))
    segment = (k.view(torch.int32) >> (23 - _SEGMENT_BITS)).bitwise_and_((2 << (8 + _SEGMENT_BITS)) - 1).flatten()
    slope = slopes.index_select(0, segment).view(k.shape)
    intercept = intercepts.index_select(0, segment).view(k.shape)
    return slope.mul_(k).add_(intercept)


@functools.lru_cache(8)
def _lines(device: str) -> Tensor:
    """[2, 2^17] float32: intercept and slope of the line of each segment, by sign, exponent and first bits of float32.

    Both are 0 where k is 0 or +-2^31. The middle of a segment is as far off as its ends, on the other side. Slopes have
    15 bits: so no value is within 1e-12 of where its rounding changes, a thousand times what libraries' logarithms may
    differ by, and every machine makes the same table.
    """
    first, last = 127 << _SEGMENT_BITS, (127 + 31) << _SEGMENT_BITS  # exponents of 1 and of 2^31
    with torch.inference_mode(False):
        numbers = torch.arange(first, last + 1, dtype=torch.int32, device="cpu")
        k = (numbers << (23 - _SEGMENT_BITS)).view(torch.float32).double()
        x = -torch.special.ndtri(k * 2.0**-32)
        slope = _to_15_bits(x.diff() / k.diff())
        off = [at - slope.double() * k for at, k in ((x[:-1], k[:-1]), (x[1:], k[1:]))]
        middle = (k[:-1] + k[1:]) / 2
        off_middle = -torch.special.ndtri(middle * 2.0**-32) - slope.double() * middle
        intercept = (((off[0] + off[1]) / 2 + off_middle) / 2).float()
        lines = torch.zeros(2, 2 << (8 + _SEGMENT_BITS), dtype=torch.float32, device="cpu")
        negative = 1 << (8 + _SEGMENT_BITS)
        lines[:, first:last] = torch.stack([intercept, slope])
        lines[:, negative + first : negative + last] = torch.stack([-intercept, slope])
        return lines.to(device)


def _to_15_bits(x: Tensor) -> Tensor:
    """As float32 of a significand of 15 bits, the nearest one."""
    kept, exponent = torch.frexp(x)
    return torch.ldexp((kept * 2.0**15).round(), exponent - 15).float()


def _unsigned(z: Tensor) -> np.ndarray:
    return z.numpy().view(np.uint64)


def _mix_unsigned(z: np.ndarray, shifted: np.ndarray | None = None) -> np.ndarray:
    """`_mix` of uint64, in place; `shifted`: a buffer of the same shape."""
    shifted = np.empty_like(z) if shifted is None else shifted
    for bits, factor in _ROUNDS:
        np.right_shift(z, bits, out=shifted)
        np.bitwise_xor(z, shifted, out=z)
        if factor is not None:
            np.multiply(z, factor, out=z)
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
