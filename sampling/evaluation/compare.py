"""Two records of evaluations side by side; numbers that are not comparable are not compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scoreray.data.errors import UserError, nearest
from scoreray.sampling.metrics.record import CONFIDENCE, EvaluationRecord, MetricValue, as_text
from scoreray.sampling.metrics.registry import check_names, in_order, metric_of

FOR_PEOPLE = ("url", "name", "accuracy")  # in a record to be read; no number depends on them beyond the hashes


@dataclass(frozen=True)
class Comparison:
    """A metric of two records; `resolved`: whether they differ by more than two standard errors (None: not known)."""

    first: float | None
    second: float | None
    difference: float | None
    std_error: float | None
    resolved: bool | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    a: EvaluationRecord, b: EvaluationRecord, metrics: Sequence[str] = (), vary: Sequence[str] = ()
) -> dict[str, Comparison]:
    """Metric by metric both values, their difference and its error, of all that both records hold (or of `metrics`).

    Checkpoint and EMA length are what is compared. Settings of sampling must agree too, as a difference could come from
    them; `vary` names those that are meant to differ (sampler, steps, ...). Raises UserError when any of the metrics is
    not comparable, a line for each thing that differs.
    """
    wanted = list(metrics) or [name for name in in_order(a.metrics) if name in b.metrics]
    check_names(wanted)
    for name in wanted:
        for which, record in (("first", a), ("second", b)):
            if name not in record.metrics:
                raise UserError(f"the {which} record has no {name}; it has {', '.join(record.metrics)}")
    if not wanted:
        raise UserError("the records have no metric in common")
    known = type(a.subject.sampling).model_fields
    for key in vary:
        if key not in known:
            raise UserError(f"--vary {key}: no setting of sampling; {nearest(key, known)}")
    found: dict[str, list[str]] = {}
    for name in wanted:
        for line in differences(name, a, b, vary):
            found.setdefault(line, []).append(name)
    if found:
        lines = [f"{line} ({', '.join(names)})" for line, names in found.items()]
        raise UserError("these records are not comparable:\n  " + "\n  ".join(lines))
    return {name: _against(a.metrics[name], b.metrics[name]) for name in wanted}


def differences(metric: str, a: EvaluationRecord, b: EvaluationRecord, vary: Sequence[str] = ()) -> list[str]:
    """What keeps a metric of two records from being compared, a line each; empty when nothing does."""
    lines, about = [], metric_of(metric)
    for part in ("version", *about.parts(metric)):
        lines += _differ(part, a.protocol.get(part), b.protocol.get(part))
    if about.draws:
        left, right = (record.subject.sampling.model_dump(exclude=set(vary)) for record in (a, b))
        lines += [f"{line}; if it is meant to differ, --vary {line.split('.')[1].split(':')[0]}"
                  for line in _differ("sampling", left, right)]  # fmt: skip
    return lines


def notes(a: EvaluationRecord, b: EvaluationRecord) -> list[str]:
    """Differences of software and machine, which move a number by rounding only, as far as is known."""
    return [
        *_differ("numerics", a.numerics.model_dump(), b.numerics.model_dump()),
        *_differ("versions", a.versions, b.versions),
    ]


def comparison_text(found: dict[str, Comparison], beside: Sequence[str]) -> str:
    """A comparison for people: a line for each metric, then what else differs."""
    lines = []
    for name, one in found.items():
        error = "" if one.std_error is None else f" +- {CONFIDENCE * one.std_error:.3g}"
        verdict = "  (within the error)" if one.resolved is False else ""
        change = "" if one.difference is None else f"  by {one.difference:+.4g}"
        lines.append(f"{name:5} {as_text(one.first)} -> {as_text(one.second)}{change}{error}{verdict}")
    return "\n".join([*lines, *(f"note: {line}" for line in beside)])


def _differ(name: str, left: Any, right: Any) -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [key for key in {**left, **right} if key not in FOR_PEOPLE]
        return [line for key in keys for line in _differ(f"{name}.{key}", left.get(key), right.get(key))]
    return [] if left == right else [f"{name}: {_short(left)} in the first, {_short(right)} in the second"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 70 else text[:67] + "..."


def _against(a: MetricValue, b: MetricValue) -> Comparison:
    errors = [one.std_error for one in (a, b) if one.std_error is not None]
    error = math.hypot(*errors) if len(errors) == 2 else None
    change = None if a.value is None or b.value is None else b.value - a.value
    resolved = None if not error or change is None else abs(change) > 2 * error
    return Comparison(a.value, b.value, change, error, resolved)
