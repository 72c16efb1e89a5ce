"""The record of an evaluation, record.json: every number with all that changes it.

A record is JSON in four parts: `subject` is what was evaluated, `protocol` how, `numerics` and `versions` on what, and
`metrics` what came out. docs/evaluation.md has the schema. Neither the time nor the place of the computation is in it,
so the same evaluation gives the same bytes on any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.storage.store import NotFound, open_store
from scoreray.sampling.measures.distances import Estimate

FORMAT = 1
KIND = "scoreray evaluation"
CONFIDENCE = 1.96  # standard errors to either side of a value: 95%
MOST_CHANNELS = 8  # that are shown one by one


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class EvaluatedCheckpoint(_Strict):
    """sha256: of the weights' hashes and the EMA length."""

    url: str
    sha256: str
    images_seen: int
    ema: str


class SamplingSettings(_Strict):
    """How samples were drawn; null where a machine is drawn by Gibbs, which has no such setting. grid_checkpoint: which
    one the levels were optimised on, where they were."""

    sampler: str | None
    steps: int | None
    grid: str | list[float] | None
    sigma_range: list[float]
    seed: int
    guidance: float
    options: dict[str, Any]
    grid_checkpoint: str | None = None

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the checkpoint of a grid that has none: a record's digest is that of before there were any."""
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if name != "grid_checkpoint" or value is not None}


class EvaluationSubject(_Strict):
    """What was evaluated."""

    checkpoint: EvaluatedCheckpoint
    sampling: SamplingSettings


class Numerics(_Strict):
    """What a sum's rounding depends on."""

    device: str
    threads: int
    batch_size: int


class RecordHead(_Strict):
    """What is known before anything is computed.

    protocol: `version`, and for each part that a metric depends on (`sampling/metrics/registry.py`) its settings.
    """

    subject: EvaluationSubject
    protocol: dict[str, Any]
    numerics: Numerics
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """A short name for everything that changes the numbers."""
        return digest(self.model_dump())


class MetricValue(_Strict):
    """A number, its standard error and 95% interval (None where the count gives none), and what belongs to it."""

    model_config = ConfigDict(extra="allow")

    value: float | None
    std_error: float | None
    interval: list[float | None] | None = None

    @staticmethod
    def of(estimate: Estimate, **more: Any) -> MetricValue:
        value, error = estimate.value, estimate.std_error
        interval: list[float | None] | None = (
            None if error is None else [value - CONFIDENCE * error, value + CONFIDENCE * error]
        )
        return MetricValue(value=value, std_error=error, interval=interval, **more)

    def get(self, name: str) -> Any:
        """What belongs to the value under a name; None where there is nothing."""
        return (self.model_extra or {}).get(name)

    @property
    def interval_text(self) -> str:
        """The interval as a person reads it; nothing where there is none."""
        if self.interval is None or None in self.interval:
            return ""
        low, high = self.interval
        return f"{low:.5g} to {high:.5g}"

    @property
    def channels_text(self) -> str:
        """The value of each channel, where a metric is a mean over several: they may be of different units."""
        channels = self.get("channels") or []
        more = f", ... ({len(channels)} in all)" if len(channels) > MOST_CHANNELS else ""
        values = ", ".join(as_text(value, ".4g") for value in channels[:MOST_CHANNELS])
        return f"by channel {values}{more}" if len(channels) > 1 else ""


def parts_of(parts: Mapping[str, Estimate]) -> dict[str, Any]:
    """Values that stand beside a metric's own, by name, as the record has them, the printed line and the page."""
    return {"parts": {name: MetricValue.of(one).model_dump() for name, one in parts.items()}}


@dataclass(frozen=True)
class MetricResult:
    """What a metric found: its value, what stands beside it in the record, warnings, and what the page draws of it."""

    estimate: Estimate
    beside: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    drawn: Any = None

    def value(self) -> MetricValue:
        return MetricValue.of(self.estimate, **self.beside)


class EvaluationRecord(RecordHead):
    """record.json."""

    kind: str = KIND
    format: int = FORMAT
    metrics: dict[str, MetricValue]
    warnings: list[str]

    def to_json(self) -> bytes:
        """Sorted keys, numbers as they are, what is not finite as null: JSON has no NaN and no infinity."""
        return (json.dumps(finite(self.model_dump()), indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> EvaluationRecord:
        """Raises DataError in one line that names `url`."""
        try:
            record = json.loads(data, parse_constant=lambda constant: None)
            if not isinstance(record, dict) or record.get("kind") != KIND:
                raise DataError(f"{url}: not the record of an evaluation")
            if record.get("format") != FORMAT:
                raise DataError(f"{url}: format {shortened(repr(record.get('format')))}, this version reads {FORMAT}")
            return EvaluationRecord.model_validate(record)
        except ValidationError as error:
            where = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
            raise DataError(f"{url}: not the record of an evaluation: {shortened(where)} is missing or wrong") from None
        except (ValueError, RecursionError):  # no text, no JSON, a number of 5,000 digits
            raise DataError(f"{url}: not the record of an evaluation: not JSON") from None


def read_record(url: str) -> EvaluationRecord:
    """A record by its URL or path. Raises UserError when there is none, DataError when it is something else."""
    folder, _, name = os.fspath(url).rpartition("/")
    try:
        data = open_store(folder or ("/" if url.startswith("/") else ".")).get(name)
    except NotFound:
        raise UserError(f"{url}: no such record; an evaluation leaves one as record.json") from None
    return EvaluationRecord.from_json(data, url)


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


def digest(parts: Any) -> str:
    """Ten hexadecimal digits of a hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
