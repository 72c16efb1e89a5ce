"""The shards of a sample job, each a function of the job alone: what `packing.commit` carries out for a data set."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scoreray.data.packing.commit import PackedShard
from scoreray.data.packing.shards import ShardWriter
from scoreray.data.reading.manifest import Shard, is_picture
from scoreray.data.storage.lease import Lease, LeaseRemoved, TakenOver
from scoreray.data.traces import span
from scoreray.sampling.model.load import LoadedDenoiser, LoadedMachine
from scoreray.sampling.offline.driver import in_form
from scoreray.sampling.offline.generate import prepare
from scoreray.sampling.offline.place import shard_name, taken_over
from scoreray.sampling.offline.record import SampleJob
from scoreray.trainer.step import to_uint8

Model = LoadedDenoiser | LoadedMachine
Mapper = Callable[["SamplePlan", Sequence[int]], Iterable[PackedShard]]
"""Makes the shards of these numbers, in order: in this process or on a cluster."""


@dataclass
class SamplePlan:
    """The plan of a job (`packing.commit.PackPlan`). `done(n)` is called after each batch of n samples.

    lease: of the start that the shards are made for; where another start has taken over, no shard is stored.
    """

    job: SampleJob
    url: str
    model: Model
    done: Callable[[int], None] = field(default=lambda n: None)
    lease: Lease | None = None

    def __post_init__(self) -> None:
        self._draw: Callable[[int, torch.Tensor], torch.Tensor] | None = None
        self.shape = tuple(self.model.info.image_shape)
        self.dtype = "uint8" if is_picture(self.shape) else "float32"
        self.classes = list(self.model.info.classes)
        self.name = f"{self.model.info.config.run.name}-samples"
        self.notes: list[str] = []

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

    def make(self, number: int, scratch: Path) -> tuple[bytes, PackedShard]:
        """Members `<i>.png` (or .npy), `<i>.cls` where there are classes, and `<i>.json` with the sample's seed."""
        job, request, info = self.job, self.job.request, self.model.info
        self.check_owner()
        if self._draw is None:
            self._draw = prepare(in_form(self.model, job.form), request)
        tar, numbers = io.BytesIO(), job.shard_samples(number)
        writer = ShardWriter(tar, self.shape, self.dtype, "png" if self.dtype == "uint8" else "npy")
        for first in range(numbers.start, numbers.stop, request.batch_size):
            last = min(first + request.batch_size, numbers.stop)
            labels, seeds = request.labels(first, last, info), request.sample_seeds(first, last).tolist()
            with span("sample.batch", first=first, rows=last - first, sampler=request.sampler):
                x = self._draw(first, labels)
            arrays = to_uint8(x).permute(0, 2, 3, 1).numpy() if self.dtype == "uint8" else x.numpy()
            for i, (array, label, seed) in enumerate(zip(arrays, labels.tolist(), seeds, strict=True), first):
                note = {"sample": i, "seed": seed, "class_label": label if label >= 0 else None}
                writer.add(f"{i:08d}", array, label, json.dumps(note).encode())
            self.done(last - first)
        packed = writer.finish(shard_name(number))
        self.check_owner()  # once more: another start may have begun while this shard was drawn
        return tar.getvalue(), packed
