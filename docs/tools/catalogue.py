"""Every metric as Prometheus scrapes it, with unit and meaning: the list behind docs/metrics.md, dashboards, alerts."""

from __future__ import annotations

from dataclasses import replace

from scoreray.sampling.service.metrics import REPLICA_METRICS, SERVICE_METRICS
from scoreray.trainer.monitoring.metrics import CATALOGUE as RUN_METRICS
from scoreray.trainer.monitoring.metrics import Metric

DATA = ("scoreray_data_", "scoreray_quarantined")  # what their names begin with
RAY_METRICS = (
    Metric("ray_node_cpu_utilization", "percent", "CPUs of a node in use", ("ip",)),
    Metric("ray_node_mem_used", "bytes", "Memory of a node in use", ("ip",)),
    Metric("ray_node_mem_total", "bytes", "Memory of a node", ("ip",)),
    Metric("ray_node_mem_shared_bytes", "bytes", "Shared memory of a node in use", ("ip",)),
    Metric("ray_node_disk_free", "bytes", "Free space of a node's disk", ("ip",)),
    Metric("ray_node_disk_utilization_percentage", "percent", "A node's disk in use", ("ip",)),
    Metric("ray_node_network_receive_speed", "bytes/s", "What a node receives", ("ip",)),
    Metric("ray_node_network_send_speed", "bytes/s", "What a node sends", ("ip",)),
)
RAY_GPU_METRICS = (
    Metric("ray_node_gpus_utilization", "percent", "A GPU in use", ("ip", "GpuIndex")),
    Metric("ray_node_gram_used", "MB", "A GPU's memory in use", ("ip", "GpuIndex")),
)


def catalogue() -> dict[str, tuple[Metric, ...]]:
    """Dashboard -> what it shows, named and labelled as in a query: of a run (Ray's exporter on each node), of a
    sampling service (its /metrics), and those of Ray's own that are of use."""
    data, training = (
        tuple(
            replace(metric, name=f"ray_{metric.name}", labels=("run", *metric.labels))
            for metric in RUN_METRICS
            if metric.name.startswith(DATA) == of_data
        )
        for of_data in (True, False)
    )
    sampling = tuple(
        replace(one, name=one.name + ("_total" if one.kind == "counter" else ""), labels=(*one.labels, *more))
        for metrics, more in ((REPLICA_METRICS, ("replica",)), (SERVICE_METRICS, ()))
        for one in metrics
    )
    return {"training": training, "data": data, "sampling": sampling, "cluster": (*RAY_METRICS, *RAY_GPU_METRICS)}


def page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Names as in a query. A run's come through the exporter that Ray has on each node (port 8080 under `k8s/`),",
        "a sampling service's from its own `/metrics`. Counters end in `_total`; a histogram has `_bucket`, `_sum`",
        "and `_count`. This page, the dashboards and the alerts are made by `python docs/tools/update_metrics.py`,",
        "from `docs/tools/catalogue.py`. Spans for OpenTelemetry: [traces.md](traces.md).",
    ]
    for dashboard, metrics in catalogue().items():
        lines += [
            "",
            f"## {dashboard.capitalize()}",
            "",
            "| metric | kind | unit | labels | |",
            "|---|---|---|---|---|",
        ]
        for one in metrics:
            note = " (nodes with GPUs)" if one in RAY_GPU_METRICS else ""
            labels = ", ".join(f"`{label}`" for label in one.labels)
            lines.append(f"| `{one.name}` | {one.kind} | {one.unit} | {labels} | {one.meaning}{note} |")
    from alerts import ALERTS

    lines += ["", "## Alerts", "", "| alert | when | for | severity | what to do |", "|---|---|---|---|---|"]
    for alert in ALERTS:
        lines.append(f"| `{alert.name}` | `{alert.when}` | {alert.lasts} | {alert.severity} | {alert.remedy} |")
    return "\n".join(lines).replace("||", "|\\|") + "\n"
