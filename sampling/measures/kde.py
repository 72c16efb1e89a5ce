"""Kernel density estimates (Parzen windows): the density of data or samples without a model of either.

Kernels are those of scikit-learn's `KernelDensity`, with which tests compare. It is not called, as it has no
leave-one-out likelihood, and the sums here are faster for kernels without end: 10,000 points under 10,000 Gaussian ones
in 2, 8 and 64 dimensions take 2.4, 2.4 and 5.6 s, its trees 2.9, 5.4 and 14.4 s and, in 64, an error of 41 nats (one
core, scikit-learn 1.9.1). Kernels that end take its trees 0.2 to 1.8 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError, nearest
from scoreray.data.extras import check_installed

CHUNK = 1 << 22  # distances held at once
REFINED_ROWS = 1000  # that bandwidths of single dimensions are chosen on, at most
REFINED_ROUNDS = 3

DensityKernelName = Literal["gaussian", "epanechnikov", "tophat", "exponential", "linear", "cosine"]
Bandwidth = float | Tensor
"""One for all dimensions, or [d], one for each."""


@dataclass(frozen=True)
class DensityKernel:
    """A kernel k(u) of the distance u in bandwidths, up to its constant.

    log_value: ln k(r / h) of distances r and a bandwidth h. log_integral: ln of its integral over d dimensions at
    bandwidth h, which goes as h^d. std: of a dimension, at bandwidth 1 in d dimensions.
    """

    log_value: Callable[[Tensor, float], Tensor]
    log_integral: Callable[[int, float], float]
    std: Callable[[int], float]


def _radial(log_value: Callable[[Tensor], Tensor], moment: Callable[[int], float]) -> DensityKernel:
    """A kernel by the logarithm of its values and ln M(n), M(n) the integral of k(r) r^n over r > 0."""

    def log_integral(d: int, h: float) -> float:
        sphere = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        return sphere + moment(d - 1) + d * math.log(h)

    return DensityKernel(
        lambda r, h: log_value(r / h), log_integral, lambda d: math.exp((moment(d + 1) - moment(d - 1)) / 2) / d**0.5
    )


def _log_cosine_moment(n: int) -> float:
    check_installed("evaluate", "kernel cosine", "scipy")
    from scipy.integrate import quad

    return math.log(quad(lambda r: math.cos(math.pi * r / 2) * r**n, 0, 1)[0])


KERNELS: dict[str, DensityKernel] = {
    "gaussian": DensityKernel(
        lambda r, h: -r.square() / (2 * h**2), lambda d, h: d / 2 * math.log(2 * math.pi * h**2), lambda d: 1.0
    ),
    "epanechnikov": _radial(
        lambda u: (1 - u.square()).clamp_min(0).log(), lambda n: math.log(2 / ((n + 1) * (n + 3)))
    ),
    "tophat": _radial(lambda u: (u < 1).double().log(), lambda n: -math.log(n + 1)),
    "exponential": _radial(lambda u: -u, lambda n: math.lgamma(n + 1)),
    "linear": _radial(lambda u: (1 - u).clamp_min(0).log(), lambda n: -math.log((n + 1) * (n + 2))),
    "cosine": _radial(lambda u: (math.pi / 2 * u.clamp_max(1)).cos().clamp_min(0).log() + (u < 1).double().log(),
                      _log_cosine_moment),
}  # fmt: skip


def log_density(x: Tensor, data: Tensor, bandwidth: Bandwidth, kernel: str = "gaussian") -> Tensor:
    """ln of (1/N) sum_i k((x - data_i) / h) / (h^d integral of k) in nats, [M] float64, for x [M, ...], data [N, ...].

    With a bandwidth [d] for each dimension, h^d is their product and differences are divided by each. -inf where no
    point is within a kernel that ends. Parzen 1962. As a score of samples it is known to be loose in many dimensions
    (Theis 2016, section 3.2). The Gaussian one is the density of `Mixture(data, std=0)` at noise level `bandwidth`.
    Raises UserError on bad arguments.
    """
    points, centers = _flat("x", x), _flat("data", data)
    if points.shape[1] != centers.shape[1]:
        raise UserError(f"x of {points.shape[1]} dimensions, data of {centers.shape[1]}: must be the same")
    points, centers, h, log_scale = _in_bandwidths(points, centers, bandwidth)
    shape = _kernel_of(kernel)
    constant = math.log(len(centers)) + shape.log_integral(points.shape[1], h) + log_scale
    rows = max(1, CHUNK // len(centers))
    parts = [shape.log_value(_distances(part, centers), h).logsumexp(1) for part in points.split(rows)]
    return torch.cat(parts) - constant


def leave_one_out(data: Tensor, bandwidth: Bandwidth, kernel: str = "gaussian") -> float:
    """Mean log-density in nats of each point under the estimate made of all others; large for a good bandwidth."""
    flat = _flat("data", data)
    if len(flat) < 2:
        raise UserError("leave-one-out needs at least two points")
    flat, _, h, log_scale = _in_bandwidths(flat, flat, bandwidth)
    shape = _kernel_of(kernel)
    constant = math.log(len(flat) - 1) + shape.log_integral(flat.shape[1], h) + log_scale
    rows, total = max(1, CHUNK // len(flat)), 0.0
    for first in range(0, len(flat), rows):
        exponents = shape.log_value(_distances(flat[first : first + rows], flat), h)
        own = torch.arange(len(exponents), device=exponents.device)
        exponents[own, first + own] = -math.inf
        total += exponents.logsumexp(1).sum().item()
    return total / len(flat) - constant


def choose_bandwidth(data: Tensor, candidates: Sequence[float] | None = None, kernel: str = "gaussian") -> float:
    """The candidate of largest leave-one-out likelihood; by default 15 from a tenth to three times Scott's rule."""
    if candidates is None:
        rule = scott(data) / _kernel_of(kernel).std(_flat("data", data).shape[1])
        candidates = [rule * 0.1 * 30 ** (i / 14) for i in range(15)]
    if not candidates:
        raise UserError("no candidates for the bandwidth: give at least one positive number")
    found = {bandwidth: leave_one_out(data, bandwidth, kernel) for bandwidth in candidates}
    best = max(found, key=lambda bandwidth: found[bandwidth])
    if found[best] == -math.inf:  # a point has no other within a kernel that ends, at any of them
        raise UserError(
            f"kernel '{kernel}': some point has no other within {max(found):.3g}, the largest bandwidth tried: give a "
            "bandwidth, or take kernel gaussian or exponential, which have no end"
        )
    return best


def choose_bandwidths(data: Tensor, kernel: str = "gaussian") -> Tensor:
    """A bandwidth for each dimension, [d] float64, by leave-one-out likelihood.

    One factor for all is chosen on standardised data, then each dimension's in turn is halved, doubled or changed by a
    fifth root of 2 while that raises the likelihood, on at most 1,000 points.
    """
    flat = _flat("data", data)
    stds = _stds(flat)
    best = stds * choose_bandwidth(flat / stds, None, kernel)
    few = flat[:: -(-len(flat) // REFINED_ROWS)]
    highest = leave_one_out(few, best, kernel)
    for _ in range(REFINED_ROUNDS):
        before = highest
        for dimension in range(len(best)):
            for factor in (0.5, 2**-0.2, 2**0.2, 2.0):
                changed = best.clone()
                changed[dimension] *= factor
                if (likelihood := leave_one_out(few, changed, kernel)) > highest:
                    best, highest = changed, likelihood
        if highest == before:
            break
    return best


def scott(data: Tensor) -> float:
    """Scott's rule for one bandwidth, std N^(-1 / (d + 4)), std the root mean variance of a dimension (Scott 1992)."""
    flat = _flat("data", data)
    std = flat.var(0).mean().sqrt().item() if len(flat) > 1 else 0.0
    if not std > 0:
        raise UserError(f"data [{len(flat)}, ...] with no spread has no bandwidth by Scott's rule: give one")
    return std * len(flat) ** (-1 / (flat.shape[1] + 4))


def by_rule(
    data: Tensor, rule: Literal["scott", "silverman"], kernel: str = "gaussian", *, per_dimension: bool = False
) -> Bandwidth:
    """Bandwidth by Scott's or Silverman's rule, (4 / (d + 2))^(1 / (d + 4)) times Scott's (Silverman 1986), for one or
    for each dimension. The rules are of the Gaussian kernel; others get its standard deviation."""
    flat = _flat("data", data)
    d = flat.shape[1]
    factor = {"scott": 1.0, "silverman": (4 / (d + 2)) ** (1 / (d + 4))}[rule] / _kernel_of(kernel).std(d)
    return factor * (_stds(flat) * len(flat) ** (-1 / (d + 4)) if per_dimension else scott(flat))


def _stds(flat: Tensor) -> Tensor:
    stds = flat.std(0) if len(flat) > 1 else torch.zeros(flat.shape[1])
    if not bool((stds > 0).all()):
        number = int((~(stds > 0)).nonzero()[0])
        raise UserError(f"dimension {number} of the data has no spread, so no bandwidth of its own: give one for all")
    return stds


def _kernel_of(name: str) -> DensityKernel:
    if name not in KERNELS:
        raise UserError(f"unknown kernel '{name}'; {nearest(name, KERNELS)}")
    return KERNELS[name]


def _in_bandwidths(x: Tensor, centers: Tensor, bandwidth: Bandwidth) -> tuple[Tensor, Tensor, float, float]:
    """(x, centers, a bandwidth, ln of what they were divided by): where each dimension has its own, points in units of
    these, and 1."""
    if isinstance(bandwidth, Tensor) and bandwidth.ndim:
        if bandwidth.shape != x.shape[1:]:
            raise UserError(f"bandwidth of shape {list(bandwidth.shape)}: must be one number, or [{x.shape[1]}]")
        if not bool((torch.isfinite(bandwidth) & (bandwidth > 0)).all()):
            raise UserError(f"bandwidth = {bandwidth.tolist()}: must be positive numbers")
        scale = bandwidth.double()
        return x / scale, centers / scale, 1.0, float(scale.log().sum())
    h = float(bandwidth)
    if not (math.isfinite(h) and h > 0):
        raise UserError(f"bandwidth = {h}: must be a positive number")
    return x, centers, h, 0.0


def _distances(x: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")


def _flat(what: str, x: Tensor) -> Tensor:
    if x.ndim < 2 or len(x) < 1 or not bool(torch.isfinite(x).all()):
        raise UserError(f"{what} of shape {list(x.shape)}: must be finite [N, ...], one point a row, at least one")
    return x.flatten(1).double()
