"""The shards of an encoding, each a function of the plan alone: what `packing.commit` carries out for a data set.

An encoder is always called with `batch_size` samples, the same ones at every start: those of a shard in their order. So
a sample's bits depend neither on which process encodes it nor on how many do.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.shards import ENCODING as SHARD_FORMAT
from scoreray.data.packing.shards import ShardWriter, stored_fields
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.manifest import Manifest, Shard
from scoreray.data.reading.samples import SampleReader
from scoreray.data.storage.lease import Lease
from scoreray.sampling.encoding.carried import carried_values
from scoreray.sampling.encoding.encode import BatchEncoder, Columns, FieldEncoder, as_columns, empty_columns, value_of
from scoreray.sampling.offline.place import shard_name

VERSION = 1  # raised when the bytes that the same plan makes change
DRAWS_VERSION = 2  # raised where those of draws alone do, with the keyed noise
CHUNK_BYTES = 16 << 20  # of samples that are read, encoded and sent to the writer together, decoded and encoded

OVERFLOW = "; float16 ends at 65504: --dtype bfloat16 or float32"


@dataclass(frozen=True)
class SampleChunk:
    """Samples [first, first + size) of the source, which go to shard `shard`."""

    shard: int
    first: int
    size: int


@dataclass
class EncodePlan:
    """A PackPlan (`packing.plan`) whose samples are those of `source`, some fields of them encoded.

    carried: fields of the source that are kept, without statistics.  seed: of draws.  device: "cpu" or "cuda"; None: a
    GPU where there is one.  lease: of the start that the shards are made for; where another start has taken over, no
    shard is stored.  first_sample: number of the source's first one in the whole set, where it is a bucket of one: by
    which noise of draws is keyed.
    """

    url: str
    name: str
    source: SampleReader
    encoders: tuple[FieldEncoder, ...]
    carried: tuple[Field, ...]
    seed: int
    batch_size: int
    samples_per_shard: int
    device: str | None = None
    lease: Lease | None = None
    first_sample: int = 0

    origin = ""  # only an equal plan goes on
    in_place = False

    @property
    def notes(self) -> list[str]:
        return []

    @property
    def num_samples(self) -> int:
        return self.source.manifest.num_samples

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_samples / self.samples_per_shard)

    @property
    def encoded(self) -> list[Field]:
        return [one.makes for one in self.encoders]

    @property
    def image_format(self) -> str:
        """Of carried pictures that are stored as arrays; others are kept as they are."""
        members = [one.member for one in self.carried if one.kind == "image"]
        return "npy" if any(member.endswith("npy") for member in members) else "png"

    @cached_property
    def fields(self) -> list[Field]:
        return stored_fields([*self.carried, *self.encoded], self.image_format)

    @property
    def sha256(self) -> str:
        """Of encoders it counts their hashes, wherever they are stored."""
        made = [one.as_dict() for one in self.encoded]
        for one in made:
            one["encoding"] = {k: v for k, v in one["encoding"].items() if k not in ("path", "preview")}
        is_drawn = any(one.is_drawn for one in self.encoders)
        noise = [DRAWS_VERSION, self.seed, self.first_sample] if is_drawn else 0
        parts = ["encode", VERSION, SHARD_FORMAT, self.name, self.source.manifest.identity, made, noise,
                 [one.name for one in self.carried], self.batch_size, self.samples_per_shard]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def inputs(self, number: int) -> str:
        return ""  # nothing but the plan

    def total_samples(self, done: list[Shard]) -> int:
        return self.num_samples

    def check_visible(self) -> None:
        """Raises UserError, DataError or StorageError where this process does not see the source, or another one."""
        if Manifest.at(self.source.url).identity != self.source.manifest.identity:
            raise UserError(f"{self.source.url}: is another data set on this machine")

    def check_owner(self) -> None:
        """Raises TakenOver or LeaseRemoved where another start has the place by now."""
        if self.lease is not None:
            self.lease.check()

    @cached_property
    def chunk_rows(self) -> int:
        """Samples of a chunk, whole batches of them. It decides no bytes."""
        read = self._decoder().bytes_per_sample
        made = sum(array.nbytes for array in empty_columns(self.encoded, 1).values())
        batches = max(1, CHUNK_BYTES // ((read + made) * self.batch_size))
        return self.batch_size * min(batches, math.ceil(self.samples_per_shard / self.batch_size))

    def chunks(self, number: int) -> list[SampleChunk]:
        """Those of a shard: of each one as many; of the last one some may be empty."""
        begin, rows = number * self.samples_per_shard, self.chunk_rows
        end = min(begin + self.samples_per_shard, self.num_samples)
        count = math.ceil(self.samples_per_shard / rows)
        firsts = [begin + i * rows for i in range(count)]
        return [SampleChunk(number, first, max(0, min(rows, end - first))) for first in firsts]

    def _decoder(self) -> FieldDecoder:
        """Of the fields that are encoded, or condition what encodes them."""
        wanted = [request for one in self.encoders for request in one.requests]
        by_name = {one.field: one for one in sorted(wanted, key=lambda one: one.max_length or 0)}
        return FieldDecoder(self.source.manifest, list(by_name.values()))

    def read(self, chunk: SampleChunk) -> Columns:
        """The decoded fields that are encoded. Raises DataError (shard, sample, offset), StorageError."""
        decoder, numbers = self._decoder(), range(chunk.first, chunk.first + chunk.size)
        return as_columns(self.source.read_arrays(numbers, decoder) if numbers else decoder.empty(0))

    def encode(self, chunk: SampleChunk, read: Columns) -> Columns:
        """What encoders make of a chunk, filled up with zeros to `chunk_rows`. Raises UserError, DataError."""
        manifest = self.source.manifest
        encoder = BatchEncoder(manifest, self.encoders, self.batch_size, self.seed, self.device)
        return encoder(read, self.first_sample + chunk.first, chunk.size, self.chunk_rows)

    def write(self, number: int, parts: Iterable[Columns]) -> tuple[bytes, PackedShard]:
        """The tar of a shard of what its chunks became. Raises DataError naming a sample that can't be stored."""
        tar = io.BytesIO()
        writer = ShardWriter(tar, [*self.carried, *self.encoded], self.image_format)
        for chunk, part in zip(self.chunks(number), parts, strict=True):
            numbers = range(chunk.first, chunk.first + chunk.size)
            for row, values in enumerate(carried_values(self.source, self.carried, numbers)):
                values |= {one.name: value_of(part, one, row) for one in self.encoded}
                try:
                    writer.add(f"{numbers[row]:08d}", values)
                except DataError as error:
                    hint = OVERFLOW if "inf at" in str(error) and "float16" in (f.dtype for f in self.encoded) else ""
                    raise DataError(f"{self.source.url}: sample {numbers[row]}: {error}{hint}") from None
        packed = writer.finish(shard_name(number))
        return tar.getvalue(), packed

    def make(self, number: int, scratch: Path) -> tuple[bytes, PackedShard]:
        self.check_owner()
        data, packed = self.write(number, [self.encode(chunk, self.read(chunk)) for chunk in self.chunks(number)])
        self.check_owner()  # once more: another start may have begun while this shard was made
        return data, packed


def without_statistics(field: Field) -> Field:
    """A field of the source, to be counted again."""
    none: dict[str, Any] = {key: [] for key in ("mean", "std", "low", "high", "log_mean", "log_std")}
    return replace(field, class_counts=[0] * len(field.classes), **none)
