"""The record of an evaluation: every number with all that changes it; two that are not comparable are not compared.

A record is JSON in four parts: `subject` is what was evaluated, `protocol` how, `numerics` and `versions` on what, and
`metrics` what came out. docs/evaluation.md has the schema. Nothing in it tells time or place of the computation, so the
same evaluation gives the same bytes on any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.storage.store import NotFound, open_store

FORMAT = 1
KIND = "scoreray evaluation"

# Parts of the protocol that a metric depends on: two records are comparable in it where these agree.
PROTOCOL: dict[str, tuple[str, ...]] = {
    "fid": ("reference", "samples", "extractor", "fid"),
    "kid": ("reference", "samples", "extractor", "kid"),
    "is": ("samples", "extractor", "is"),
    "pr": ("reference", "samples", "extractor", "pr"),
    "sw": ("reference", "samples", "sw"),
    "nn": ("reference", "samples", "extractor", "nn"),
    "kde": ("reference", "samples", "kde"),
    "bpd": ("reference", "likelihood"),
    "nats": ("reference", "likelihood"),
    "loss": ("reference", "loss"),
    "psnr": ("reference", "restoration"),
    "ssim": ("reference", "restoration"),
    "ais": ("reference", "ais"),
}
OF_SAMPLES = frozenset(metric for metric, parts in PROTOCOL.items() if "samples" in parts) | {"psnr", "ssim"}
ONLY_TOLD = ("url", "name", "accuracy")  # in a record for people; no number depends on them beyond the hashes


def to_json(record: dict[str, Any]) -> bytes:
    """The record's bytes: sorted keys, numbers as they are, what is not finite as null."""
    return (json.dumps(finite(record), indent=1, sort_keys=True) + "\n").encode()


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: these become null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(value: float | None, spec: str = ".5g") -> str:
    """A number of a record as a person reads it; null stands for one that is not finite."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, spec)


def interval_text(values: dict[str, Any]) -> str:
    """The 95% interval of a metric as a person reads it; nothing where there is none."""
    ends = values.get("interval")
    return "" if ends is None or None in ends else f"{ends[0]:.5g} to {ends[1]:.5g}"


def digest(parts: Any) -> str:
    """A short name for everything that changes the numbers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def read_record(url: str) -> dict[str, Any]:
    """A record by its URL or path. Raises UserError when there is none, DataError when it is something else."""
    folder, _, name = os.fspath(url).rpartition("/")
    try:
        data = open_store(folder or ("/" if url.startswith("/") else ".")).get(name)
    except NotFound:
        raise UserError(f"{url}: no such record; an evaluation leaves one as record.json") from None
    try:
        record = json.loads(data, parse_constant=lambda constant: None)
        if not isinstance(record, dict) or record.get("kind") != KIND:
            raise DataError(f"{url}: not the record of an evaluation")
        if record.get("format") != FORMAT:
            raise DataError(f"{url}: format {shortened(repr(record.get('format')))}, this version reads {FORMAT}")
        _Parts.model_validate(record)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        raise DataError(f"{url}: not the record of an evaluation: {shortened(where)} is missing or wrong") from None
    except (ValueError, RecursionError):  # no text, no JSON, a number of 5,000 digits
        raise DataError(f"{url}: not the record of an evaluation: not JSON") from None
    return record


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Metric(_Strict):
    value: float | None
    std_error: float | None


class _Checkpoint(_Strict):
    url: str
    images_seen: int
    ema: str


class _Subject(_Strict):
    checkpoint: _Checkpoint
    sampling: dict[str, Any]


class _Parts(_Strict):
    """What a record must hold to be compared."""

    subject: _Subject
    protocol: dict[str, Any]
    versions: dict[str, Any]
    metrics: dict[str, _Metric]


def compare(
    a: dict[str, Any], b: dict[str, Any], metrics: Sequence[str] = (), vary: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Metric by metric both values, their difference and its error, of all that both records hold (or of `metrics`).

    Checkpoint and EMA length are what is compared. Settings of sampling must agree too, as a difference could come from
    them; `vary` names those that are meant to differ (sampler, steps, ...). Raises UserError when any of the metrics is
    not comparable, a line for each thing that differs.
    """
    wanted = list(metrics) or [name for name in PROTOCOL if name in a["metrics"] and name in b["metrics"]]
    for name in wanted:
        if name not in PROTOCOL:
            raise UserError(f"unknown metric '{name}'; {nearest(name, PROTOCOL)}")
        for which, record in (("first", a), ("second", b)):
            if name not in record["metrics"]:
                raise UserError(f"the {which} record has no {name}; it has {', '.join(record['metrics'])}")
    if not wanted:
        raise UserError("the records have no metric in common")
    for key in vary:
        if key not in a["subject"]["sampling"]:
            raise UserError(f"--vary {key}: no setting of sampling; {nearest(key, a['subject']['sampling'])}")
    found: dict[str, list[str]] = {}
    for name in wanted:
        for line in differences(name, a, b, vary):
            found.setdefault(line, []).append(name)
    if found:
        lines = [f"{line} ({', '.join(names)})" for line, names in found.items()]
        raise UserError("these records are not comparable:\n  " + "\n  ".join(lines))
    return {name: _against(a["metrics"][name], b["metrics"][name]) for name in wanted}


def differences(metric: str, a: dict[str, Any], b: dict[str, Any], vary: Sequence[str] = ()) -> list[str]:
    """What keeps a metric of two records from being compared, a line each; empty when nothing does."""
    lines = []
    for part in ("version", *PROTOCOL[metric]):
        lines += _differ(part, a["protocol"].get(part), b["protocol"].get(part))
    if metric in OF_SAMPLES:
        left, right = (
            {key: value for key, value in record["subject"]["sampling"].items() if key not in vary} for record in (a, b)
        )
        lines += [f"{line}; if it is meant to differ, --vary {line.split('.')[1].split(':')[0]}"
                  for line in _differ("sampling", left, right)]  # fmt: skip
    return lines


def notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Differences of software and machine, which move a number by rounding only, as far as is known."""
    return [
        line for part in ("numerics", "versions") for line in _differ(part, a.get(part), b.get(part))
    ]  # fmt: skip


def comparison_text(found: dict[str, dict[str, Any]], beside: Sequence[str]) -> str:
    """A comparison for people: a line for each metric, then what else differs."""
    lines = []
    for name, one in found.items():
        error = "" if one["std_error"] is None else f" +- {1.96 * one['std_error']:.3g}"
        verdict = {None: "", True: "", False: "  (within the error)"}[one["resolved"]]
        change = "" if one["difference"] is None else f"  by {one['difference']:+.4g}"
        lines.append(f"{name:5} {as_text(one['first'])} -> {as_text(one['second'])}{change}{error}{verdict}")
    return "\n".join([*lines, *(f"note: {line}" for line in beside)])


def _differ(name: str, left: Any, right: Any) -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [key for key in {**left, **right} if key not in ONLY_TOLD]
        return [line for key in keys for line in _differ(f"{name}.{key}", left.get(key), right.get(key))]
    return [] if left == right else [f"{name}: {_short(left)} in the first, {_short(right)} in the second"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 70 else text[:67] + "..."


def _against(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    errors = [float(one["std_error"]) for one in (a, b) if one.get("std_error") is not None]
    error = math.hypot(*errors) if len(errors) == 2 else None
    there = a["value"] is not None and b["value"] is not None
    change = b["value"] - a["value"] if there else None
    resolved = None if not error or change is None else abs(change) > 2 * error
    return {"first": a["value"], "second": b["value"], "difference": change, "std_error": error, "resolved": resolved}
