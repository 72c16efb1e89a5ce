"""Kernel density estimates (Parzen windows): the density of data or samples without a model of either."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoreray.data.errors import UserError

CHUNK = 1 << 22  # distances held at once


def log_density(x: Tensor, data: Tensor, bandwidth: float) -> Tensor:
    """ln of (1/N) sum_i N(x; data_i, bandwidth^2 I) in nats, [M] float64, for x [M, ...] and data [N, ...].

    Parzen 1962. As a score of samples it is known to be loose in many dimensions (Theis 2016, section 3.2). The same
    density is that of `Mixture(data, std=0)` at noise level `bandwidth`. Raises UserError on bad arguments.
    """
    points, centers = _flat("x", x), _flat("data", data)
    if points.shape[1] != centers.shape[1]:
        raise UserError(f"x of {points.shape[1]} dimensions, data of {centers.shape[1]}: must be the same")
    _check_bandwidth(bandwidth)
    constant = math.log(len(centers)) + points.shape[1] / 2 * math.log(2 * math.pi * bandwidth**2)
    rows = max(1, CHUNK // len(centers))
    parts = [(-_squares(part, centers) / (2 * bandwidth**2)).logsumexp(1) for part in points.split(rows)]
    return torch.cat(parts) - constant


def leave_one_out(data: Tensor, bandwidth: float) -> float:
    """Mean log-density in nats of each point under the estimate made of all others; large for a good bandwidth."""
    flat = _flat("data", data)
    if len(flat) < 2:
        raise UserError("leave-one-out needs at least two points")
    _check_bandwidth(bandwidth)
    constant = math.log(len(flat) - 1) + flat.shape[1] / 2 * math.log(2 * math.pi * bandwidth**2)
    rows, total = max(1, CHUNK // len(flat)), 0.0
    for first in range(0, len(flat), rows):
        exponents = -_squares(flat[first : first + rows], flat) / (2 * bandwidth**2)
        own = torch.arange(len(exponents), device=exponents.device)
        exponents[own, first + own] = -math.inf
        total += exponents.logsumexp(1).sum().item()
    return total / len(flat) - constant


def choose_bandwidth(data: Tensor, candidates: Sequence[float] | None = None) -> float:
    """The candidate of largest leave-one-out likelihood; by default 15 from a tenth to three times Scott's rule."""
    if candidates is None:
        rule = scott(data)
        candidates = [rule * 0.1 * 30 ** (i / 14) for i in range(15)]
    if not candidates:
        raise UserError("no candidates for the bandwidth: give at least one positive number")
    return max(candidates, key=lambda bandwidth: leave_one_out(data, bandwidth))


def scott(data: Tensor) -> float:
    """Scott's rule for one bandwidth, std N^(-1 / (d + 4)), std the root mean variance of a dimension (Scott 1992)."""
    flat = _flat("data", data)
    std = flat.var(0).mean().sqrt().item() if len(flat) > 1 else 0.0
    if not std > 0:
        raise UserError(f"data [{len(flat)}, ...] with no spread has no bandwidth by Scott's rule: give one")
    return std * len(flat) ** (-1 / (flat.shape[1] + 4))


def _squares(x: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist").square()


def _flat(what: str, x: Tensor) -> Tensor:
    if x.ndim < 2 or len(x) < 1 or not bool(torch.isfinite(x).all()):
        raise UserError(f"{what} of shape {list(x.shape)}: must be finite [N, ...], one point a row, at least one")
    return x.flatten(1).double()


def _check_bandwidth(bandwidth: float) -> None:
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise UserError(f"bandwidth = {bandwidth}: must be a positive number")
