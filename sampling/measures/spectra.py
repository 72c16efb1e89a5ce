"""Power spectra over a grid of one, two or three dimensions, averaged over directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def power_spectrum(x: Tensor) -> Tensor:
    """Power of samples x [n, C, *grid] at each wavenumber: float64 [n, C, K], K = 1 + half of the shortest side.

    A wavenumber k counts waves along the shortest side; its power is the mean over the modes whose frequency rounds to
    it (radially averaged). Power is that of the mean square: summed over all modes it is the mean of x^2 (Parseval).
    Modes beyond the shortest side's Nyquist frequency (the corners) are left out.
    """
    grid = x.shape[2:]
    axes = tuple(range(2, x.ndim))
    power = torch.fft.fftn(x.double(), dim=axes, norm="forward").abs().square().flatten(2)
    numbers = wavenumbers(tuple(grid)).to(x.device)
    inside = numbers < num_wavenumbers(tuple(grid))
    counts = torch.bincount(numbers[inside])
    sums = power.new_zeros(*power.shape[:2], len(counts)).index_add_(2, numbers[inside], power[:, :, inside])
    return sums / counts


def num_wavenumbers(grid: tuple[int, ...]) -> int:
    return 1 + min(grid) // 2


def wavenumbers(grid: tuple[int, ...]) -> Tensor:
    """The rounded wavenumber of each mode, int64 [prod(grid)], in waves along the shortest side."""
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(side, dtype=torch.float64) for side in grid), indexing="ij")
    radius = torch.stack(frequencies).square().sum(0).sqrt()
    return (radius * min(grid)).round().long().flatten()


def log_spectral_distance(spectrum: Tensor, reference: Tensor) -> Tensor:
    """Root of the mean over wavenumbers (the mean, 0, left out) of the squared ratio of two spectra [C, K], dB: [C]."""
    ratio = 10 / math.log(10) * (spectrum[:, 1:].log() - reference[:, 1:].log())
    return ratio.square().mean(1).sqrt()
