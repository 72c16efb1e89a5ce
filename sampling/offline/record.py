"""What a sample job is and what came of it, as `sampling.json` stores both beside the samples.

Everything that decides the samples' bytes is in the job, as text and numbers: it can be sent to other processes, and a
later start can see whether the samples at a place are those that it would draw.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from scoreray.sampling.guidance.steering import Guidance, Measurement
from scoreray.sampling.offline.driver import Form
from scoreray.sampling.offline.ensembles import ConditionsFrom
from scoreray.sampling.offline.generate import Request

VERSION = 2  # raised when the bytes that the same job makes change
Format = Literal["webdataset", "png", "npz"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class SampleJob:
    """All that decides the samples and their bytes.

    asked: the URL that was given; a run's stands for its newest checkpoint, and `checkpoint` is which that was.
    weights: their SHA-256. conditions_sha256: of the values of the request's conditions, which may be in files; ""
    without any. source_sha256: of the manifest of the data set that samples begin at, "" where they begin from noise.
    raw: latents are not decoded. own_code: the hash of a sampler of somebody else's. request: with
    sampler, steps and grid filled in; its batch_size decides nothing.
    """

    asked: str
    checkpoint: str
    ema: str
    weights: str
    request: Request
    format: Format
    samples_per_shard: int
    precision: str
    compile: str
    form: Form
    version: int = VERSION
    conditions_sha256: str = ""
    source_sha256: str = ""
    raw: bool = False
    own_code: dict[str, str] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        return math.ceil(self.request.count / self.samples_per_shard)

    def shard_samples(self, number: int) -> range:
        """The numbers of the samples in shard `number`."""
        first = number * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.request.count))

    def to_json(self) -> bytes:
        return SampleRecord(self).to_json()

    def differences(self, other: SampleJob) -> list[str]:
        """Where `other` is another job, each as "seed 7, not 8"; how it computes (`form`) is no difference."""
        mine, theirs = _fields(self), _fields(other)
        mine, theirs = mine | mine.pop("request"), theirs | theirs.pop("request")
        return [
            f"{name} {mine.get(name)!r}, not {theirs.get(name)!r}"
            for name in {**theirs, **mine}
            if name != "form" and mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class FileDigest:
    """Of a file, or of the pictures of one shard, one after another."""

    bytes: int
    sha256: str


Digests = dict[str, FileDigest]
"""By the name of the file, or of the group of pictures (`place.group_name`)."""


@dataclass(frozen=True)
class SampleRecord:
    """`sampling.json`: the job, and once it has finished the digest of every file that it made, by name.

    acceptance: the share of a Metropolis sampler's proposals that were accepted; None of other samplers. calls: of the
    network for one sample, on average where they differ; None of a Gibbs chain.
    """

    job: SampleJob
    finished: Digests | None = None
    acceptance: float | None = None
    calls: int | float | None = None

    def to_json(self) -> bytes:
        fields = _fields(self.job)
        if self.finished is not None:
            fields["finished"] = {name: asdict(digest) for name, digest in self.finished.items()}
        for name in ("acceptance", "calls"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return (json.dumps(fields, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, batch_size: int) -> SampleRecord:
        """Raises ValueError, TypeError or KeyError where `data` is not what `to_json` wrote."""
        fields = json.loads(data)
        finished, request = fields.pop("finished", None), fields.pop("request")
        acceptance, calls = fields.pop("acceptance", None), fields.pop("calls", None)
        interval = request["guidance"]["interval"]
        guidance = Guidance(**{**request["guidance"], "interval": tuple(interval) if interval else None})
        measurement = Measurement(**request["measurement"]) if request["measurement"] else None
        source = ConditionsFrom(**request["conditions_from"]) if request.get("conditions_from") else None
        typed = {"guidance": guidance, "measurement": measurement, "conditions_from": source, "batch_size": batch_size}
        whole = Request(**{**request, **typed})
        job = SampleJob(**{**fields, "request": whole, "form": Form(**fields["form"])})
        if not isinstance(finished, dict):
            return cls(job)
        return cls(job, {name: FileDigest(**digest) for name, digest in finished.items()}, acceptance, calls)


def _fields(job: SampleJob) -> dict[str, Any]:
    """As JSON has them: lists for tuples; guidance as an object also where it was given as a weight. What earlier
    versions did not know is left out where nothing is said, so that their jobs have the same bytes."""
    fields = asdict(job)
    request = fields["request"]
    del request["batch_size"]
    request["guidance"] = asdict(job.request.guided)
    for where, name in ((request, "conditions"), (request, "conditions_from"), (request, "prompt"), (request, "size"),
                        (request, "source"), (request, "max_calls"),
                        (request, "grid_checkpoint"), (request, "parallel"),
                        (request["guidance"], "weights"), (request["guidance"], "negative"),
                        (fields, "conditions_sha256"), (fields, "source_sha256"), (fields, "raw"),
                        (fields, "own_code")):  # fmt: skip
        if not where[name]:
            del where[name]
    return json.loads(json.dumps(fields))
