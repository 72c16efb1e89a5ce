"""Every metric as Prometheus scrapes it, with unit and meaning: the list behind docs/metrics.md, dashboards, alerts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scoreray.sampling.serve_metrics import REPLICA_METRICS, SERVICE_METRICS
from scoreray.trainer.metrics import CATALOGUE as RUN_METRICS

Kind = Literal["gauge", "counter", "histogram"]
DATA = ("scoreray_data_stall", "scoreray_quarantined")
DASHBOARDS = ("training", "data", "sampling", "cluster")


@dataclass(frozen=True)
class Scraped:
    """A metric. name: as in a query, without `_bucket`. dashboard: the one that shows it. ours: not Ray's own."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...]
    dashboard: str
    ours: bool = True


RAYS = (
    ("ray_node_cpu_utilization", "percent", "CPUs of a node in use"),
    ("ray_node_mem_used", "bytes", "Memory of a node in use"),
    ("ray_node_mem_total", "bytes", "Memory of a node"),
    ("ray_node_mem_shared_bytes", "bytes", "Shared memory of a node in use"),
    ("ray_node_disk_free", "bytes", "Free space of a node's disk"),
    ("ray_node_disk_utilization_percentage", "percent", "A node's disk in use"),
    ("ray_node_network_receive_speed", "bytes/s", "What a node receives"),
    ("ray_node_network_send_speed", "bytes/s", "What a node sends"),
)
RAYS_GPUS = (
    ("ray_node_gpus_utilization", "percent", "A GPU in use"),
    ("ray_node_gram_used", "MB", "A GPU's memory in use"),
)


def catalogue() -> tuple[Scraped, ...]:
    """Of a run (Ray's exporter on each node), of a sampling service (its /metrics), and those of Ray that are shown."""
    found = [
        Scraped(
            f"ray_{metric.name}", "gauge", metric.unit, metric.meaning, ("run", *metric.tags),
            "data" if metric.name in DATA else "training",
        )
        for metric in RUN_METRICS
    ]  # fmt: skip
    for metrics, more in ((REPLICA_METRICS, ("replica",)), (SERVICE_METRICS, ())):
        for one in metrics:
            name = one.name + ("_total" if one.kind == "counter" else "")
            found.append(Scraped(name, one.kind, one.unit, one.meaning, (*one.labels, *more), "sampling"))  # type: ignore[arg-type]
    for rays, labels in ((RAYS, ("ip",)), (RAYS_GPUS, ("ip", "GpuIndex"))):
        found += [Scraped(name, "gauge", unit, meaning, labels, "cluster", ours=False) for name, unit, meaning in rays]
    return tuple(found)


def page() -> str:
    """docs/metrics.md."""
    of_gpus = {name for name, _, _ in RAYS_GPUS}
    lines = [
        "# Metrics",
        "",
        "Names as in a query. A run's come through the exporter that Ray has on each node (port 8080 under `k8s/`),",
        "a sampling service's from its own `/metrics`. Counters end in `_total`; a histogram has `_bucket`, `_sum`",
        "and `_count`. This page, the dashboards and the alerts are made by `python docs/update_metrics.py`, from",
        "`cluster/catalogue.py`. Spans for OpenTelemetry: [traces.md](traces.md).",
    ]
    for dashboard in DASHBOARDS:
        lines += [
            "",
            f"## {dashboard.capitalize()}",
            "",
            "| metric | kind | unit | labels | |",
            "|---|---|---|---|---|",
        ]
        for one in catalogue():
            if one.dashboard == dashboard:
                note = " (nodes with GPUs)" if one.name in of_gpus else ""
                labels = ", ".join(f"`{label}`" for label in one.labels)
                lines.append(f"| `{one.name}` | {one.kind} | {one.unit} | {labels} | {one.meaning}{note} |")
    from scoreray.cluster.alerts import ALERTS

    lines += ["", "## Alerts", "", "| alert | when | for | severity | what to do |", "|---|---|---|---|---|"]
    for alert in ALERTS:
        lines.append(f"| `{alert.name}` | `{alert.when}` | {alert.lasts} | {alert.severity} | {alert.mend} |")
    return "\n".join(lines).replace("||", "|\\|") + "\n"
