"""What a run measures: records (stored), progress (shown), and every Prometheus metric of it in one list.

Inside Ray a metric is called `ray_<name>` and has the tag `run`. A metric of something that a record or a progress
already holds is one row of `CATALOGUE`; a new measurement is also a field here, which `meter.py` fills.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Literal

from pydantic import ConfigDict

from scoreray.data.storage.stats import ReadStats

SIGMA_EDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-5, 5))  # 0.0032 ... 100, half decades


def sigma_labels() -> list[str]:
    """A name for each bucket of noise levels, lowest first: "<0.00316", "0.00316-0.01", ..., ">100"."""
    edges = [f"{edge:.3g}" for edge in SIGMA_EDGES]
    between = [f"{low}-{high}" for low, high in pairwise(edges)]
    return [f"<{edges[0]}", *between, f">{edges[-1]}"]


@dataclass(frozen=True)
class TrainingRecord:
    """What was measured since the record before; one line of the run's metrics (`trainer/records.py`).

    Fields without a default are in the files of every version; those with one were added later.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    images: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_s: float
    data_stall: float
    """share of the wall time that the step waited for data"""
    sigma_losses: tuple[float | None, ...] = ()
    """mean loss by noise level, between the `SIGMA_EDGES`; None for a bucket without a sample"""
    quarantined: int = 0
    """samples that could not be read, in the whole run so far"""
    skipped_steps: int = 0
    """steps without an update because loss or gradient was not finite, in the whole run so far"""
    mfu: float | None = None
    """FLOPs of training over what the workers' devices do in matrix products of the same precision (`flops.py`)"""
    time: float = 0.0
    """Unix time, s"""

    def sigma_losses_by_label(self) -> dict[str, float]:
        """Mean loss by bucket of noise levels; only buckets that a sample was in."""
        pairs = zip(sigma_labels(), self.sigma_losses, strict=False)
        return {label: loss for label, loss in pairs if loss is not None}

    def scalars(self) -> Iterator[tuple[str, float]]:
        """(name, value) of all that TensorBoard and MLflow plot."""
        for name, value in asdict(self).items():
            if name not in ("images", "time", "sigma_losses") and value is not None:
                yield f"train/{name}", value
        for label, loss in self.sigma_losses_by_label().items():
            yield f"sigma_loss/{label}", loss


@dataclass(frozen=True)
class ReadCounts:
    """Of a stream since its start: what `Stream.stats` counts, as numbers that can be sent and added up over ranks."""

    bytes_read: int = 0
    num_requests: int = 0
    num_retries: int = 0
    num_hedges: int = 0
    num_rereads: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    @staticmethod
    def of(stats: ReadStats) -> ReadCounts:
        return ReadCounts(*(getattr(stats, counter.name) for counter in fields(ReadCounts)))


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run is, for a person who watches: sent often, never stored."""

    images: int
    total: int
    loss: float
    images_per_s: float
    data_stall: float
    committed: int
    committed_at: float = 0.0
    """Unix time of the last commit, s, also by an earlier start; 0 before the first"""
    started_at: float = 0.0
    mfu: float = math.nan
    record: TrainingRecord | None = None
    """the newest one"""
    skipped_steps: int = 0
    """steps without an update because loss or gradient was not finite, in the whole run so far"""
    reads: ReadCounts = field(default_factory=ReadCounts)
    """of the streams of all ranks since the workers started, as of the newest record"""

    def same_as(self, other: TrainingProgress | None) -> bool:
        """As ==, but a rate or loss that is not a number is the same as another one: no two of those are equal."""
        return repr(self) == repr(other)


@dataclass
class RunStatus:
    """What the metrics of a run are computed from; the Monitor keeps it over restarts of the workers."""

    progress: TrainingProgress | None = None
    committed_at: float = 0.0
    skipped_steps: int = 0
    restarts: int = 0
    stopped_nonfinite: bool = False
    began_at: float = field(default_factory=time.time)
    reported_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Metric:
    """A metric: its name (a counter's gets `_total` when it is scraped), unit and meaning.

    labels: beside those that all of its list have. buckets: of a histogram.
    """

    name: str
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter", "histogram"] = "gauge"
    buckets: tuple[float, ...] = ()


Value = float | Mapping[str, float] | None
"""Of a metric now; by label where it has one; None where there is nothing to show yet."""


def _progress(of: Callable[[TrainingProgress], Value]) -> Callable[[RunStatus], Value]:
    return lambda run: None if run.progress is None else of(run.progress)


def _record(of: Callable[[TrainingRecord], Value]) -> Callable[[RunStatus], Value]:
    return lambda run: None if run.progress is None or run.progress.record is None else of(run.progress.record)


CATALOGUE: dict[Metric, Callable[[RunStatus], Value]] = {
    Metric("scoreray_images_seen", "images", "Images that the run has trained on"):
        _progress(lambda p: p.images),
    Metric("scoreray_images_total", "images", "Images after which the run ends"):
        _progress(lambda p: p.total),
    Metric("scoreray_images_per_s", "images/s", "Throughput of all workers over the last seconds"):
        _progress(lambda p: p.images_per_s),
    Metric("scoreray_mfu", "share", "Training FLOPs a second over the measured matmul rate of all workers' devices"):
        _progress(lambda p: p.mfu),
    Metric("scoreray_data_stall", "share", "Share of the wall time that a step waited for data"):
        _progress(lambda p: p.data_stall),
    Metric("scoreray_data_retries", "requests", "Reads of data repeated as the store was busy or away; of this start"):
        _progress(lambda p: p.reads.num_retries),
    Metric("scoreray_data_hedged", "requests", "Requests for data made again as the answer was slow; of this start"):
        _progress(lambda p: p.reads.num_hedges),
    Metric("scoreray_data_rereads", "requests", "Reads of data repeated as the bytes were wrong; of this start"):
        _progress(lambda p: p.reads.num_rereads),
    Metric("scoreray_data_cache_hits", "pieces", "Pieces of data found in data.cache_dir; of this start"):
        _progress(lambda p: p.reads.cache_hits),
    Metric("scoreray_data_cache_misses", "pieces", "Pieces of data fetched into data.cache_dir; of this start"):
        _progress(lambda p: p.reads.cache_misses),
    Metric("scoreray_loss", "1", "Weighted loss of the last step on rank 0"):
        _progress(lambda p: p.loss),
    Metric("scoreray_sigma_loss", "1", "Weighted loss by noise level; tag `sigma` is the bucket", ("sigma",)):
        _record(lambda r: r.sigma_losses_by_label()),
    Metric("scoreray_gradient_norm", "1", "Norm of the gradient before clipping, at the last record"):
        _record(lambda r: r.gradient_norm),
    Metric("scoreray_learning_rate", "1", "Learning rate at the last record"):
        _record(lambda r: r.learning_rate),
    Metric("scoreray_last_commit_time_s", "s", "Unix time of the last committed checkpoint; 0 before the first"):
        lambda run: run.committed_at,
    Metric("scoreray_last_commit_age_s", "s", "Seconds since the last commit, of any start; before it, since start"):
        lambda run: max(0.0, time.time() - (run.committed_at or run.began_at)),
    Metric("scoreray_progress_age_s", "s", "Seconds since the workers last reported; all else is as old as that"):
        lambda run: time.monotonic() - run.reported_at,
    Metric("scoreray_committed_images", "images", "Images of the last committed checkpoint"):
        _progress(lambda p: p.committed),
    Metric("scoreray_restarts", "starts", "How often the workers were started again"):
        lambda run: run.restarts,
    Metric("scoreray_quarantined", "samples", "Samples that could not be read, in the whole run"):
        _record(lambda r: r.quarantined),
    Metric("scoreray_skipped_steps", "steps", "Steps that were left out as their loss or gradient was not finite"):
        lambda run: run.skipped_steps,
    Metric("scoreray_stopped_nonfinite", "1", "1 once the run ends because loss or gradient was not finite, else 0"):
        lambda run: run.stopped_nonfinite,
}  # fmt: skip
"""Metric -> its value now. The order is that of the tables and dashboards made of it (`docs/tools/catalogue.py`)."""


def values(run: RunStatus) -> dict[tuple[str, str], float]:
    """(metric, value of its label or "") -> value, of all that can be shown now."""
    found: dict[tuple[str, str], float] = {}
    for metric, of in CATALOGUE.items():
        value = of(run)
        by_label = value if isinstance(value, Mapping) else {} if value is None else {"": value}
        found |= {(metric.name, label): float(one) for label, one in by_label.items() if not math.isnan(one)}
    return found
