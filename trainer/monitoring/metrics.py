"""What a run measures, in one list, and the forms in which it is shown: Prometheus gauges through Ray, and TensorBoard.

Inside Ray a gauge is called `ray_<name>` and has the tag `run`. Records and TensorBoard files are written with the
checkpoint that they lead to (see `loop.py`), so a resumed run plots nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from scoreray.data.scratch import scratch_folder

if TYPE_CHECKING:
    from scoreray.trainer.monitoring.progress import Progress

TENSORBOARD = "tensorboard"  # folder of a run: `tensorboard --logdir <run>/tensorboard`
SIGMA_EDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-5, 5))  # 0.0032 ... 100, half decades


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


CATALOGUE = (
    Metric("scoreray_images_seen", "images", "Images that the run has trained on"),
    Metric("scoreray_images_total", "images", "Images after which the run ends"),
    Metric("scoreray_images_per_s", "images/s", "Throughput of all workers over the last seconds"),
    Metric("scoreray_mfu", "share", "Training FLOPs a second over the measured matmul rate of all workers' devices"),
    Metric("scoreray_data_stall", "share", "Share of the wall time that a step waited for data"),
    Metric("scoreray_loss", "1", "Weighted loss of the last step on rank 0"),
    Metric("scoreray_sigma_loss", "1", "Weighted loss by noise level; tag `sigma` is the bucket", ("sigma",)),
    Metric("scoreray_gradient_norm", "1", "Norm of the gradient before clipping, at the last record"),
    Metric("scoreray_learning_rate", "1", "Learning rate at the last record"),
    Metric("scoreray_last_commit_time_s", "s", "Unix time of the last committed checkpoint; 0 before the first"),
    Metric("scoreray_last_commit_age_s", "s", "Seconds since the last commit, of any start; before it, since start"),
    Metric("scoreray_progress_age_s", "s", "Seconds since the run told anything; until then all else stays as it was"),
    Metric("scoreray_committed_images", "images", "Images of the last committed checkpoint"),
    Metric("scoreray_restarts", "starts", "How often the workers were started again"),
    Metric("scoreray_quarantined", "samples", "Samples that could not be read, in the whole run"),
    Metric("scoreray_skipped_steps", "steps", "Steps that were left out as their loss or gradient was not finite"),
    Metric("scoreray_stopped_nonfinite", "1", "1 once the run ends because loss or gradient was not finite, else 0"),
)


def sigma_labels() -> list[str]:
    """A name for each bucket of noise levels, lowest first: "<0.00316", "0.00316-0.01", ..., ">100"."""
    edges = [f"{edge:.3g}" for edge in SIGMA_EDGES]
    between = [f"{low}-{high}" for low, high in pairwise(edges)]
    return [f"<{edges[0]}", *between, f">{edges[-1]}"]


def values(progress: Progress) -> dict[tuple[str, str], float]:
    """(metric, sigma bucket or "") -> value, of what a progress tells by itself; the rest is the `Monitor`'s."""
    told = {
        "images_seen": progress.images,
        "images_total": progress.total,
        "images_per_s": progress.images_per_s,
        "data_stall": progress.data_stall,
        "loss": progress.loss,
        "mfu": progress.mfu,
        "committed_images": progress.committed,
    }
    if (record := progress.record) is not None:
        told |= {
            "gradient_norm": record.gradient_norm,
            "learning_rate": record.learning_rate,
            "quarantined": record.quarantined,
        }
    found = {(f"scoreray_{name}", ""): float(value) for name, value in told.items() if value == value}
    for label, loss in zip(sigma_labels(), record.sigma_losses if record else (), strict=False):
        if loss is not None:
            found["scoreray_sigma_loss", label] = loss
    return found


class Gauges:
    """The catalogue as Ray's gauges in this process; needs a connected Ray."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._gauges: dict[str, Any] = {
            metric.name: Gauge(metric.name, f"{metric.meaning} ({metric.unit})", tag_keys=("run", *metric.labels))
            for metric in CATALOGUE
        }

    def set(self, told: Mapping[tuple[str, str], float]) -> None:
        for (name, sigma), value in told.items():
            self._gauges[name].set(value, tags={"run": self._run} | ({"sigma": sigma} if sigma else {}))


def tensorboard_events(records: Iterable[Mapping[str, Any]]) -> bytes:
    """A TensorBoard file of a run's records (`Record` as dicts); steps are images seen."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    with scratch_folder() as folder:
        path = folder / "events"
        writer = RecordWriter(str(path))
        records = list(records)
        writer.write(
            Event(wall_time=records[0]["time"] if records else 0, file_version="brain.Event:2").SerializeToString()
        )
        for record in records:
            scalars = [(f"train/{k}", v) for k, v in record.items() if k not in ("images", "time", "sigma_losses")]
            scalars += [
                (f"sigma_loss/{label}", v) for label, v in zip(sigma_labels(), record["sigma_losses"], strict=True)
            ]
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in scalars if v is not None])
            event = Event(wall_time=record["time"], step=record["images"], summary=summary)
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


def tensorboard_key(images_seen: int) -> str:
    """Where the events up to a checkpoint lie in a run; TensorBoard reads a folder's files by name."""
    return f"{TENSORBOARD}/events.out.tfevents.{images_seen:012d}"
