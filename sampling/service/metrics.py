"""What a service measures, in one list, and its page for Prometheus: the ingress' numbers and those of all replicas.

A run's metrics go through `ray.util.metrics` and the exporter of each Ray node. These do not, as that exporter can't
answer GET /metrics of a service. Tried with `ray.serve.metrics` on Ray 2.60 without dashboard, two replicas that had
drawn ten requests: a count was on the exporter's page 2.5 to 10 s later (agents report every 10 s); the page has
567,434 bytes, Ray's own metrics for the most part, and took 0.14 s; counts and gauges of a replica that was killed
stayed on it, so rows that a dead replica held would seem to wait for ever. And each node has a page of its own. The
page here has 7 KB for one replica, took 13 to 49 ms on the same busy machine, and is as new as the request for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from scoreray.trainer.monitoring.metrics import Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

REPLICA_METRICS = (
    Metric("scoreray_waiting_rows", "rows", "samples requested and not done yet"),
    Metric("scoreray_waiting_calls", "rows", "rows that the network is still expected to be called with"),
    Metric(
        "scoreray_batch_occupancy",
        "share",
        "rows of a call of the network / max_batch",
        kind="histogram",
        buckets=SHARES,
    ),
    Metric(
        "scoreray_step_seconds",
        "s",
        "one call of the network with its samplers' work",
        kind="histogram",
        buckets=SECONDS,
    ),
    Metric("scoreray_nfe", "rows", "rows that the network was called with; its rate is nfe/s", kind="counter"),
    Metric("scoreray_samples", "rows", "samples finished; its rate is samples/s", kind="counter"),
    Metric(
        "scoreray_queue_seconds", "s", "from a request's arrival to its first call", kind="histogram", buckets=SECONDS
    ),
    Metric("scoreray_cancelled_rows", "rows", "samples given up because nobody waited any more", kind="counter"),
    Metric("scoreray_models_loaded", "models", "weights in memory: checkpoints times EMA lengths"),
    Metric("scoreray_model_loads", "models", "weights loaded since the replica started", kind="counter"),
)
"""Measured in each replica; on the page they have a label `replica`."""

SERVICE_METRICS = (
    Metric(
        "scoreray_requests",
        "requests",
        "requests for samples by outcome: ok, cancelled or error code",
        ("code",),
        kind="counter",
    ),
    Metric(
        "scoreray_request_seconds", "s", "answered requests, from arrival to answer", kind="histogram", buckets=SECONDS
    ),
    Metric("scoreray_requests_under_way", "requests", "requests for samples that are not answered yet"),
    Metric("scoreray_sheds", "requests", "requests turned away with 429 or 503", ("code",), kind="counter"),
    Metric("scoreray_cancels", "requests", "requests whose client went away first", kind="counter"),
    Metric("scoreray_replayed", "requests", "answers given again, or joined, by idempotency key", kind="counter"),
    Metric(
        "scoreray_condition_rows",
        "rows",
        "samples requested for a condition, by its name",
        ("condition",),
        kind="counter",
    ),
    Metric("scoreray_retries", "requests", "draws begun again on another replica", kind="counter"),
    Metric(
        "scoreray_billed_rows", "rows", "samples delivered, once for each idempotency key", ("token",), kind="counter"
    ),
    Metric(
        "scoreray_reloads", "models", "newer checkpoints taken (ok) or refused (failed)", ("outcome",), kind="counter"
    ),
    Metric("scoreray_images_seen", "images", "of the checkpoint that answers now", ("model",)),
)
"""Measured once, where HTTP is answered."""


class Meter:
    """The metrics of a list, by name without the prefix `scoreray_`: `meter["nfe"].inc(8)`."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.registry = CollectorRegistry()
        self._by_name: dict[str, Any] = {}
        for metric in metrics:
            kind: Any = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[metric.kind]
            more = {"buckets": metric.buckets} if metric.buckets else {}
            help_ = f"{metric.meaning} [{metric.unit}]"
            made = kind(metric.name, help_, metric.labels, registry=self.registry, **more)
            self._by_name[metric.name.removeprefix("scoreray_")] = made

    def __getitem__(self, name: str) -> Any:
        return self._by_name[name]

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def merged(service: str, replicas: dict[str, str]) -> str:
    """One page of the service's own text and those of its replicas, each of these with a label `replica`."""
    families: dict[str, Family] = {}
    for replica, text in [("", service), *sorted(replicas.items())]:
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            into = families.setdefault(family.name, Family(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica} if replica else sample.labels
                into.add_sample(sample.name, labels, sample.value)
    return generate_latest(_Families(families.values())).decode()


class _Families(Collector):
    """Metrics of other processes, for prometheus_client to write out."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = list(families)

    def collect(self) -> list[Family]:
        return self._families
