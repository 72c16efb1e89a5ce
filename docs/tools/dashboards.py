"""Grafana dashboards made of the catalogue: every metric has a panel on the one that its entry names."""

from __future__ import annotations

from typing import Any

from catalogue import catalogue

from scoreray.trainer.monitoring.metrics import Metric

UNITS = {
    "s": "s", "share": "percentunit", "bytes": "bytes", "bytes/s": "Bps", "percent": "percent", "MB": "decmbytes",
    "images/s": "short",
}  # fmt: skip
SOURCE = {"type": "prometheus", "uid": "${source}"}


def queries(metric: Metric) -> list[tuple[str, str]]:
    """(PromQL, legend) of a metric's panel."""
    labels = [label for label in metric.labels if label != "replica"]
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels) or metric.name
    chosen = '{run=~"$run"}' if "run" in metric.labels else ""
    if metric.kind == "counter":
        by = f" by ({', '.join(labels)})" if labels else ""
        return [(f"sum{by} (rate({metric.name}[$__rate_interval]))", " ".join(f"{{{{{n}}}}}" for n in labels) or "all")]
    if metric.kind == "histogram":
        rate = f"sum by (le) (rate({metric.name}_bucket[$__rate_interval]))"
        return [(f"histogram_quantile({q}, {rate})", f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]
    return [(metric.name + chosen, legend)]


def panel(metric: Metric, number: int) -> dict[str, Any]:
    unit = UNITS.get(metric.unit, "short")
    if metric.unit == "s" and metric.name.endswith("time_s"):
        unit = "dateTimeAsIso"
    scale = {"type": "log", "log": 10} if metric.name.endswith("loss") else {"type": "linear"}
    expressions = queries(metric)
    if unit == "dateTimeAsIso":
        expressions = [(f"{expression} * 1000", legend) for expression, legend in expressions]
    per = "/s" if metric.kind == "counter" else ""
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": metric.name.removeprefix("ray_").removeprefix("scoreray_").removesuffix("_total").replace("_", " "),
        "description": f"{metric.meaning} [{metric.unit}{per}]",
        "datasource": SOURCE,
        "gridPos": {"x": 8 * (number % 3), "y": 8 * (number // 3), "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"scaleDistribution": scale}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(expressions)
        ],
    }


def dashboard(name: str) -> dict[str, Any]:
    """One of the catalogue's, as Grafana imports it."""
    metrics = catalogue()[name]
    variables: list[dict[str, Any]] = [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    ]
    if any("run" in metric.labels for metric in metrics):
        query = f"label_values({metrics[0].name}, run)"
        variables.append(
            {"name": "run", "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "includeAll": True,
             "multi": True, "current": {"text": "All", "value": "$__all"}}
        )  # fmt: skip
    return {
        "uid": f"scoreray-{name}",
        "title": f"scoreray: {name}",
        "tags": ["scoreray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": [panel(metric, number) for number, metric in enumerate(metrics)],
    }
