"""The shards of a sample job, each a function of the job alone: what `packing.commit` carries out for a data set."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from scoreray.data.errors import DataError
from scoreray.data.fields.field import Field, plain_fields
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.shards import ShardWriter, stored_fields
from scoreray.data.reading.manifest import Shard
from scoreray.data.sources.field_source import FieldValue
from scoreray.data.storage.lease import Lease, LeaseRemoved, TakenOver
from scoreray.data.traces import span
from scoreray.sampling.guidance.known_pixels import KnownPixels
from scoreray.sampling.guidance.steering import known_pixels
from scoreray.sampling.model.load import SampledModel
from scoreray.sampling.offline.conditions import sha256_of
from scoreray.sampling.offline.driver import in_form
from scoreray.sampling.offline.ensembles import NUMBERS
from scoreray.sampling.offline.generate import Draw, SampleConditions, class_labels, prepare
from scoreray.sampling.offline.place import shard_name, taken_over
from scoreray.sampling.offline.record import SampleJob
from scoreray.sampling.offline.starts import SourceStarts
from scoreray.sampling.samplers.noise import Acceptance
from scoreray.sampling.samplers.sample import SamplerState
from scoreray.trainer.diffusion.condition import LABEL, Condition

Mapper = Callable[["SamplePlan", Sequence[int]], Iterable[PackedShard]]
"""Makes the shards of these numbers, in order: in this process or on a cluster."""


@dataclass
class SamplePlan:
    """The plan of a job (`packing.plan.PackPlan`). `done(n)` is called after each batch of n samples.

    lease: of the start that the shards are made for; where another start has taken over, no shard is stored.
    """

    job: SampleJob
    url: str
    model: SampledModel
    done: Callable[[int], None] = field(default=lambda n: None)
    lease: Lease | None = None

    def __post_init__(self) -> None:
        self._prepared: Draw | None = None
        self.shape = self.model.info.sample_shape
        self.dtype = self.model.info.sample_dtype
        self.name = f"{self.model.info.config.run.name}-samples"
        self.notes: list[str] = []

    @cached_property
    def conditions(self) -> SampleConditions:
        return SampleConditions(self.job.request, self.model.info)

    @cached_property
    def known(self) -> KnownPixels | None:
        """What is known of all samples before they are encoded, of a model of latents."""
        return known_pixels(self.model.info, self.job.request.measurement)

    @cached_property
    def fields(self) -> list[Field]:
        """The samples, then their classes; of ensembles the records' other fields, then whose each sample is."""
        classes = list(self.model.info.classes)
        plain = plain_fields(self.shape, self.dtype, classes, [0] * len(classes), [], [])
        records = self.conditions.records
        if records is None:
            return plain
        target = replace(plain[0], name=records.target)
        return stored_fields([target, *records.fields, *NUMBERS], "png")

    def beside(self, first: int, last: int, condition: Condition | None) -> list[dict[str, FieldValue]]:
        """The values of samples [first, last) in all fields but the first."""
        if self.conditions.records is not None:
            return self.conditions.records.values(first, last)
        return [{LABEL: label} for label in class_labels(condition, last - first).tolist()]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.job.to_json()).hexdigest()

    origin = ""  # only the same job goes on
    in_place = False

    def inputs(self, number: int) -> str:
        return ""  # nothing but the job

    @property
    def num_shards(self) -> int:
        return self.job.num_shards

    def total_samples(self, done: list[Shard]) -> int:
        return self.job.request.count

    def num_outside(self, numbers: Sequence[int]) -> int:
        """How many samples are in other shards than these."""
        return self.job.request.count - sum(len(self.job.shard_samples(number)) for number in numbers)

    def check_visible(self) -> None:
        """The model is loaded already."""

    def check_owner(self) -> None:
        """Raises TakenOver where the job is another start's by now."""
        if self.lease is None:
            return
        try:
            self.lease.check()
        except (TakenOver, LeaseRemoved):  # removed: the other start has finished, and cleared up
            raise taken_over(self.url) from None

    def _draw(self) -> Draw:
        """Read and checked for the first shard. Raises DataError where a file of a condition has changed."""
        if self._prepared is None:
            if sha256_of(self.conditions.fixed) != self.job.conditions_sha256:
                raise DataError("--condition: a file holds other values than when this job began; give another --out")
            if SourceStarts.sha256(self.model.info, self.job.request.source) != self.job.source_sha256:
                raise DataError("--source: the data set was changed since this job began; give another --out")
            self._prepared = prepare(in_form(self.model, self.job.form), self.job.request)
        return self._prepared

    def make(self, number: int, scratch: Path) -> tuple[bytes, PackedShard]:
        """Members `<i>.png` (or .npy), `<i>.cls` where there are classes, and `<i>.json` with the sample's seed."""
        job, request = self.job, self.job.request
        self.check_owner()
        draw = self._draw()
        tar, numbers, acceptance, calls = io.BytesIO(), job.shard_samples(number), Acceptance(), 0
        writer = ShardWriter(tar, self.fields)

        def count(state: SamplerState) -> None:
            nonlocal calls
            calls += len(state.x)

        for first in range(numbers.start, numbers.stop, request.batch_size):
            last = min(first + request.batch_size, numbers.stop)
            seeds, condition = request.sample_seeds(first, last), self.conditions.of(first, last)
            with span("sample.batch", first=first, rows=last - first, sampler=request.sampler):
                x = draw(seeds, condition, acceptance=acceptance, callback=count)
            labels = class_labels(condition, last - first).tolist()
            samples = self.model.info.in_data_units(x)
            if self.known is not None:
                samples = self.known.put_back(self.model.info, samples)
            arrays = (samples.permute(0, 2, 3, 1) if self.dtype == "uint8" else samples).numpy()
            rows = zip(arrays, labels, seeds.tolist(), self.beside(first, last, condition), strict=True)
            for i, (array, label, seed, others) in enumerate(rows, first):
                note = {"sample": i, "seed": seed, "class_label": label if label >= 0 else None}
                writer.add(f"{i:08d}", {self.fields[0].name: array, **others}, json.dumps(note).encode())
            self.done(last - first)
        called = {"calls": calls, "samples": len(numbers)} if calls else {}  # no network in a Gibbs chain
        packed = replace(writer.finish(shard_name(number)), counts={**acceptance.counts(), **called})
        self.check_owner()  # once more: another start may have begun while this shard was drawn
        return tar.getvalue(), packed
