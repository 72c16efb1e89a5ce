"""What an evaluation's stored chunks add up to: one function a metric, each with its error and its warnings.

Chunks are read one after another in their order, so sums are the same whoever computed them, and memory does not grow
with the number of samples: what needs rows at once takes at most `plan.MOST_ROWS` of a side, spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.reading.samples import spread
from scoreray.data.storage.store import NotFound
from scoreray.sampling.evaluation.plan import EvaluationPlan
from scoreray.sampling.evaluation.protocol import MOST_ROWS, NEIGHBOUR_PICTURES, NEIGHBOURS, kid_block
from scoreray.sampling.evaluation.record import PROTOCOL
from scoreray.sampling.evaluation.tasks import get_arrays, put_arrays
from scoreray.sampling.measures import distances, frechet, kde
from scoreray.sampling.measures.distances import Estimate
from scoreray.trainer.step import to_unit_range

FEWEST_CLASSES = 1.5  # that the labels count as (exp of their entropy): below, it is 9 in 10 of one class
NOT_FINITE = (torch.linalg.LinAlgError, np.linalg.LinAlgError, ArithmeticError)
CONFIDENCE = 1.96  # standard errors to either side of a value: 95%
Values = dict[str, Any]


@dataclass
class Work:
    """The chunks of a plan as metrics read them, and what they found worth a warning or a picture."""

    plan: EvaluationPlan
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)

    def chunks(self, stage: str) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each chunk, in order, one at a time."""
        store = self.plan.folder(stage)
        for task in self.plan.stages()[stage]:
            yield get_arrays(store, task.key)

    def column(self, stage: str, name: str) -> Tensor:
        """One array of all chunks together: for a number or a few a sample."""
        return torch.from_numpy(np.concatenate([chunk[name] for chunk in self.chunks(stage)]))

    def rows(self, stage: str, name: str, most: int) -> Tensor:
        """At most `most` rows of an array, spread evenly over all chunks."""
        tasks = self.plan.stages()[stage]
        wanted = spread(most, tasks[-1].last)
        parts = []
        for task, chunk in zip(tasks, self.chunks(stage), strict=True):
            inside = wanted[(wanted >= task.first) & (wanted < task.last)] - task.first
            parts.append(chunk[name][inside])
        return torch.from_numpy(np.concatenate(parts))

    @property
    def num_rows(self) -> int:
        return min(MOST_ROWS, self.plan.settings.count, self.plan.num_reference)


def compute(plan: EvaluationPlan) -> tuple[dict[str, Values], Work]:
    """Every metric of the plan, of chunks that are all there: {name: {value, std_error, interval, ...}}."""
    work, found = Work(plan), {}
    _warn_of_one_class(work)
    for name in plan.metrics:
        try:
            found[name] = METRICS[name](work)
        except NOT_FINITE:  # what eigenvalues, fits and exponentials raise where there is a NaN or an infinity
            found[name] = shown(Estimate(math.nan, None))
        if not math.isfinite(found[name]["value"]):
            work.warnings.append(
                f"{name}: not a finite number, so null in the record: the network's values, or the extractor's, are "
                "not finite or too large at some of these samples"
            )
    return found, work


def _warn_of_one_class(work: Work) -> None:
    """Where nearly all labels are one class, a classifier of them sees little: its features are alike for all."""
    plan, counts = work.plan, np.array(work.plan.manifest.class_counts, dtype=np.float64)
    if plan.extractor.kind != "classifier" or not any("extractor" in PROTOCOL[name] for name in plan.metrics):
        return
    shares = counts[counts > 0] / max(counts.sum(), 1)
    if math.exp(-float((shares * np.log(shares)).sum())) < FEWEST_CLASSES:
        name = plan.manifest.classes[int(counts.argmax())]
        work.warnings.append(
            f"extractor: {shares.max():.0%} of the reference's labels are '{name}', so a classifier of them tells "
            "little apart, and distances in its features are too small: give --extractor FILE"
        )


def shown(estimate: Estimate, **more: Any) -> Values:
    """An estimate as the record holds it."""
    value, error = estimate.value, estimate.std_error
    interval = None if error is None else [value - CONFIDENCE * error, value + CONFIDENCE * error]
    return {"value": value, "std_error": error, "interval": interval, **more}


def _fid(work: Work) -> Values:
    plan, count = work.plan, work.plan.settings.count
    reference, center = _reference_moments(work)
    groups = [frechet.FeatureMoments.zero(center) for _ in range(frechet.GROUPS)]
    row = 0
    for chunk in work.chunks("samples"):
        features = torch.from_numpy(chunk["features"])
        numbers = torch.arange(row, row + len(features)) * frechet.GROUPS // count
        for number in numbers.unique().tolist():
            groups[number].add(features[numbers == number])
        row += len(features)
    found = frechet.estimate(reference, groups)
    dims = len(center)
    bias = None if found.infinity is None else found.value - found.infinity
    if count <= dims or plan.num_reference <= dims:
        work.warnings.append(
            f"fid: {min(count, plan.num_reference):,} samples in {dims:,} dimensions leave the covariance singular and "
            "the distance far too large: take several times as many samples as dimensions"
        )
    elif bias is not None and bias > max(0.05 * found.value, 2 * (found.std_error or 0)):
        work.warnings.append(
            f"fid: about {bias:.3g} of {found.value:.4g} is bias of {count:,} samples; compare at equal counts only, "
            "or compare fid_infinity"
        )
    work.pictures["fid"] = found.points
    return shown(
        Estimate(found.value, found.std_error), fid_infinity=found.infinity, points=[list(p) for p in found.points]
    )


def _reference_moments(work: Work) -> tuple[frechet.Reference, Tensor]:
    """Mean and covariance's root of the reference, from the cache where an evaluation before this one left them."""
    store, key = work.plan.folder("reference"), "moments.npz"
    try:
        kept = get_arrays(store, key)
        mean = torch.from_numpy(kept["mean"])
        return frechet.Reference(mean, float(kept["trace"]), torch.from_numpy(kept["root"])), mean
    except NotFound:
        pass
    moments = None
    for chunk in work.chunks("reference"):
        features = torch.from_numpy(chunk["features"])
        if moments is None:
            moments = frechet.FeatureMoments.zero(features.double().mean(0))
        moments.add(features)
    assert moments is not None
    reference = frechet.Reference.of(moments)
    put_arrays(store, key, {"mean": reference.mean.numpy(), "trace": np.array(reference.trace),
                            "root": reference.root.numpy()})  # fmt: skip
    return reference, reference.mean


def _kid(work: Work) -> Values:
    rows = work.num_rows
    samples, reference = work.rows("samples", "features", rows), work.rows("reference", "features", rows)
    blocks = max(1, rows // kid_block(rows))
    estimate = distances.kid((samples[i::blocks], reference[i::blocks]) for i in range(blocks))
    return shown(estimate, blocks=blocks)


def _is(work: Work) -> Values:
    columns = [work.column("samples", name) for name in ("counts", "probabilities", "negentropies")]
    rows = zip(columns[0].tolist(), columns[1], columns[2].tolist(), strict=True)
    sums = [distances.ClassSums(*row) for row in rows]
    num = min(frechet.GROUPS, len(sums))
    groups = [distances.total(sums[i * len(sums) // num : (i + 1) * len(sums) // num]) for i in range(num)]
    if work.plan.settings.count < 5000:
        work.warnings.append("is: the Inception Score of few samples is too low; compare at equal counts only")
    return shown(distances.inception_score(groups))


def _pr(work: Work) -> Values:
    rows = work.num_rows
    samples, reference = work.rows("samples", "features", rows), work.rows("reference", "features", rows)
    precision, recall = distances.precision_recall(samples, reference, NEIGHBOURS)
    if not _all_finite(samples, reference):  # comparisons with NaN are false, and would count as far apart
        precision = recall = Estimate(math.nan, None)
    return shown(precision, precision=shown(precision), recall=shown(recall))


def _sw(work: Work) -> Values:
    rows = work.num_rows
    samples, reference = work.rows("samples", "projections", rows), work.rows("reference", "projections", rows)
    estimate = distances.sliced_wasserstein(samples, reference)
    floor = distances.sliced_wasserstein(reference[0::2], reference[1::2]).value / math.sqrt(2)
    if estimate.value < 1.5 * floor:
        work.warnings.append(
            f"sw: {estimate.value:.3g} is not above what two sets of real data of this size are apart ({floor:.3g})"
        )
    return shown(estimate, floor=floor)


def _nn(work: Work) -> Values:
    """Whether samples are copies: much nearer to one image of the reference than to its next (Yoon 2023)."""
    rows = work.num_rows
    samples, reference = work.rows("samples", "features", rows), work.rows("reference", "features", rows)
    to_reference, _ = distances.nearest(samples, reference, 2)
    among, _ = distances.nearest(reference, reference, 1, same=True)
    ratio = to_reference[:, 0] / to_reference[:, 1].clamp_min(1e-12)
    copied = distances.mean_of((ratio < 1 / 3).double()) if _all_finite(ratio) else Estimate(math.nan, None)
    first = torch.from_numpy(next(work.chunks("samples"))["features"])
    apart, numbers = distances.nearest(first, reference, 1)
    closest = apart[:, 0].argsort()[:NEIGHBOUR_PICTURES]
    work.pictures["nn"] = (closest.tolist(), numbers[closest, 0].tolist())
    return shown(
        copied,
        median_distance=float(to_reference[:, 0].median()),
        median_distance_among_reference=float(among.median()),
    )


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _kde(work: Work) -> Values:
    """Mean log-density of the reference under a kernel density of the samples, nats."""
    rows = work.num_rows
    samples = to_unit_range(work.rows("samples", "values", rows))
    reference = to_unit_range(work.rows("reference", "values", rows))
    bandwidth = kde.choose_bandwidth(samples[:2000])
    return shown(distances.mean_of(kde.log_density(reference, samples, bandwidth)), bandwidth=bandwidth)


def _likelihood(work: Work, name: str) -> Values:
    nfe = [int(chunk["nfe"]) for chunk in work.chunks("likelihood")]
    return shown(distances.mean_of(work.column("likelihood", name)), nfe=float(np.mean(nfe)))


def _loss(work: Work) -> Values:
    """EDM-weighted error at the fixed levels, and its curve over them; at the optimum it is below 1."""
    errors, sigmas = work.column("loss", "errors"), torch.tensor(work.plan.sigmas, dtype=torch.float64)
    data = work.plan.info.config.denoiser.resolved_sigma_data
    weights = (sigmas**2 + data**2) / (sigmas * data) ** 2
    curve = [distances.mean_of(column) for column in (errors * weights).T]
    work.pictures["loss"] = (sigmas.tolist(), [point.value for point in curve], [point.std_error for point in curve])
    return shown(
        distances.mean_of((errors * weights).mean(1)),
        sigmas=sigmas.tolist(),
        errors=errors.mean(0).tolist(),
        weighted=[point.value for point in curve],
        std_errors=[point.std_error for point in curve],
    )


def _restoration(work: Work, name: str) -> Values:
    work.pictures["restoration"] = next(work.chunks("restoration"))["pictures"]
    return shown(distances.mean_of(work.column("restoration", name)))


def _ais(work: Work) -> Values:
    """Mean log-likelihood of the reference under the energy, in nats: -E - ln Z."""
    chunk = next(work.chunks("ais"))
    log_weights, energies = torch.from_numpy(chunk["log_weights"]), torch.from_numpy(chunk["energies"])
    log_z = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
    weights = (log_weights - log_weights.max()).exp()
    z_error = float(weights.std() / weights.mean() / math.sqrt(len(weights)))
    effective = float(weights.sum() ** 2 / weights.square().sum())
    if effective < 0.1 * len(weights):
        work.warnings.append(
            f"ais: {effective:.1f} of {len(weights)} chains carry the weight, so ln Z is likely too low and the "
            "likelihood too high: take more chains"
        )
    mean = distances.mean_of(-energies)
    error = math.hypot(mean.std_error or 0.0, z_error)
    return shown(Estimate(mean.value - log_z, error), log_z=log_z, log_z_std_error=z_error, effective_chains=effective)


METRICS: dict[str, Callable[[Work], Values]] = {
    "fid": _fid,
    "kid": _kid,
    "is": _is,
    "pr": _pr,
    "sw": _sw,
    "nn": _nn,
    "kde": _kde,
    "bpd": lambda work: _likelihood(work, "bpd"),
    "nats": lambda work: _likelihood(work, "nats"),
    "loss": _loss,
    "psnr": lambda work: _restoration(work, "psnr"),
    "ssim": lambda work: _restoration(work, "ssim"),
    "ais": _ais,
}
