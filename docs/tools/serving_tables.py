"""The tables of docs/serving.md that the code holds: fields of a request, error codes, metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from scoreray.sampling.http.images import ImagesBody
from scoreray.sampling.service.body import DrawFields, SampleBody
from scoreray.sampling.service.config import ERRORS
from scoreray.sampling.service.metrics import REPLICA_METRICS, SERVICE_METRICS
from scoreray.trainer.monitoring.metrics import Metric

PAGE = Path(__file__).resolve().parents[1] / "serving.md"


def page() -> str:
    """docs/serving.md with each table between `<!-- NAME -->` and `<!-- /NAME -->` as the code has it now."""
    text = PAGE.read_text()
    images = [row for row in _fields(ImagesBody) if row[0].strip("`") not in DrawFields.model_fields]
    tables = {"fields": _fields(SampleBody), "images": images, "codes": _codes(), "metrics": _metrics()}
    for name, rows in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        end = f"<!-- /{name} -->"
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        text = f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def _fields(body: type[DrawFields]) -> Iterable[tuple[str, ...]]:
    yield from (("field", "default", ""), ("---",) * 3)
    for name, field in body.model_fields.items():
        default = "" if field.is_required() or field.default in (None, {}) else json.dumps(field.default)
        yield f"`{name}`", default, field.description or ""


def _codes() -> Iterable[tuple[str, ...]]:
    yield from (("status", "code", ""), ("---",) * 3)
    for code, (status, meaning) in ERRORS.items():
        yield str(status), f"`{code}`", meaning


def _metrics() -> Iterable[tuple[str, ...]]:
    yield from (("metric", "unit", ""), ("---",) * 3)
    for metric in (*REPLICA_METRICS, *SERVICE_METRICS):
        yield f"`{_name(metric)}`", metric.unit, metric.meaning


def _name(metric: Metric) -> str:
    labels = f"{{{','.join(metric.labels)}}}" if metric.labels else ""
    return metric.name + ("_total" if metric.kind == "counter" else "") + labels
