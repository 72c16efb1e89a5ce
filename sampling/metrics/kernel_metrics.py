"""Metrics of samples against the reference by kernels: maximum mean discrepancies, KID among them, and densities."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import to_unit_range
from scoreray.data.own_code import instance, is_own, line_of
from scoreray.sampling.measures import distances, kde
from scoreray.sampling.measures.distances import Kernel
from scoreray.sampling.metrics.record import MetricResult
from scoreray.sampling.metrics.stored import StoredChunks
from scoreray.sampling.samplers.options import OrOwn, Range

BLOCK = 1000
FEWEST_BLOCKS = 10
CHOSEN_ROWS = 2000  # of the samples, that a bandwidth is chosen on

KernelName = Literal["gaussian", "mixture", "laplacian", "polynomial", "linear"]
Width = Annotated[float | None, Range(0, 1e9, open_low=True)]


def block_of(rows: int) -> int:
    """Rows of a block: at most 1,000, and so few that there are ten blocks to take an error from."""
    return max(2, min(BLOCK, rows // FEWEST_BLOCKS))


def kid(stored: StoredChunks) -> MetricResult:
    blocks = _blocks(stored)
    return MetricResult(distances.mmd(blocks), {"blocks": len(blocks)})


def mmd(
    stored: StoredChunks,
    *,
    kernel: Annotated[KernelName, OrOwn()] = "gaussian",
    bandwidth: Width = None,
    degree: Annotated[int, Range(1, 10)] = 3,
    estimator: Literal["unbiased", "biased"] = "unbiased",
    permutations: Annotated[int, Range(0, 10_000)] = 200,
) -> MetricResult:
    """Squared MMD of features, its error over blocks, and the share of relabellings that are as far apart.

    bandwidth: None takes the median distance in the reference, the same for every model that is measured against it.
    """
    blocks, beside = _blocks(stored), {}
    if kernel in ("gaussian", "mixture", "laplacian"):
        rows = torch.cat([reference for _, reference in blocks])
        beside["bandwidth"] = bandwidth or distances.median_distance(rows, 1.0 if kernel == "laplacian" else 2.0)
    function, biased = _kernel(kernel, beside.get("bandwidth", 1.0), degree), estimator == "biased"
    found = distances.mmd(blocks, function, biased=biased)
    if permutations:
        beside["p_value"] = distances.permutation_p_value(blocks, function, permutations, biased=biased)
    return MetricResult(found, {"blocks": len(blocks), **beside})


def _blocks(stored: StoredChunks) -> list[tuple[Tensor, Tensor]]:
    """Features of samples and of the reference in disjoint blocks, each spread evenly over both."""
    samples, reference = stored.both("features")
    number = max(1, stored.inputs.num_rows // block_of(stored.inputs.num_rows))
    return [(samples[i::number], reference[i::number]) for i in range(number)]


def _kernel(name: str, bandwidth: float, degree: int) -> Kernel:
    if is_own(name):
        return _own_kernel(name)
    kernels: dict[str, Kernel] = {
        "gaussian": distances.gaussian_kernel(bandwidth),
        "mixture": distances.gaussian_kernel(bandwidth, distances.MIXTURE),
        "laplacian": distances.laplacian_kernel(bandwidth),
        "polynomial": distances.polynomial_kernel(degree),
        "linear": distances.linear_kernel,
    }
    return kernels[name]


def _own_kernel(name: str) -> Kernel:
    function = instance(name, "mmd.kernel")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        try:
            found = function(x, y)
        except Exception as error:
            raise UserError(f"mmd.kernel {name}: failed: {line_of(error)}") from error
        if not isinstance(found, Tensor) or found.shape != (len(x), len(y)):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"mmd.kernel {name}: gave {what}; a tensor [{len(x)}, {len(y)}] is needed")
        return found.double()

    return kernel


def kernel_density(
    stored: StoredChunks,
    *,
    kernel: kde.DensityKernelName = "gaussian",
    bandwidth: Width = None,
    rule: Literal["leave_one_out", "scott", "silverman"] = "leave_one_out",
    per_dimension: bool = False,
) -> MetricResult:
    """Mean log-density of the reference under a kernel density of the samples, nats.

    bandwidth: one for all dimensions; None takes what `rule` gives, for each dimension where `per_dimension`.
    """
    samples, reference = map(to_unit_range, stored.both("values"))
    width = bandwidth or _bandwidth(samples, kernel, rule, per_dimension=per_dimension)
    logs = kde.log_density(reference, samples, width, kernel)
    beside = {"bandwidths": width.tolist()} if isinstance(width, Tensor) else {"bandwidth": width}
    covered = float(torch.isfinite(logs).double().mean())
    warning = (
        f"kde: {1 - covered:.2%} of the reference have no density under kernel '{kernel}', which ends, so the mean is "
        "minus infinity: take a larger kde.bandwidth, or kde.kernel gaussian or exponential"
    )
    if covered == 1.0 or kernel in ("gaussian", "exponential"):
        return MetricResult(distances.mean_of(logs), beside)
    return MetricResult(distances.mean_of(logs), {**beside, "covered": covered}, (warning,))


def _bandwidth(
    samples: Tensor, kernel: str, rule: Literal["leave_one_out", "scott", "silverman"], *, per_dimension: bool
) -> kde.Bandwidth:
    if rule != "leave_one_out":
        return kde.by_rule(samples, rule, kernel, per_dimension=per_dimension)
    few = samples[:CHOSEN_ROWS]
    return kde.choose_bandwidths(few, kernel) if per_dimension else kde.choose_bandwidth(few, None, kernel)
