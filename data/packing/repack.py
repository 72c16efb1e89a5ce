"""New tars from existing ones: each sample decoded, fitted and encoded again; streaming, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from scoreray.data.buckets.sizes import Bucket, Size
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, is_plain
from scoreray.data.own_code import code_hash
from scoreray.data.packing.index_tars import Tars
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.shards import ENCODING, ShardWriter, stored_fields
from scoreray.data.packing.tar_fields import (
    TarFields,
    find_tar_fields,
    images_of_shape,
    marks_of,
    naming,
    naming_sample,
    tape_of,
    wanted_of,
)
from scoreray.data.packing.tar_members import member_of, picture_in_place
from scoreray.data.packing.tar_samples import TarSample, TarSamples
from scoreray.data.reading.manifest import Shard
from scoreray.data.reading.pictures import as_array, is_grey, open_picture, picture_size, plain_format
from scoreray.data.reading.tars import Member
from scoreray.data.sources.field_options import FieldOptions
from scoreray.data.sources.field_source import NO_PICTURE, FieldValue, in_size, only_picture
from scoreray.data.sources.identity import content_marks, digest_of
from scoreray.data.sources.source import SourceOptions
from scoreray.data.storage.store import Store, open_store

LOOKED_AT, TARS_LOOKED_AT = 32, 8  # samples, and tars that they are from, that are looked at for colours


@dataclass(frozen=True)
class RepackPlan:
    """A PackPlan that makes a new tar of each one at `source`; members that no field reads are not kept."""

    source: str
    url: str
    name: str
    tars: list[tuple[str, int]]  # (key, bytes)
    marks: dict[str, str]  # content_marks() of them
    reads: TarFields
    options: SourceOptions
    image_format: str | None  # None: pictures stay as they are
    skips_bad: bool
    notes: list[str] = field(default_factory=list)
    origin: str = ""
    in_place = False

    @property
    def num_shards(self) -> int:
        return len(self.tars)

    @property
    def fields(self) -> list[Field]:
        return stored_fields(self.reads.fields, self.image_format or "png")

    @property
    def sha256(self) -> str:
        plain = is_plain(self.reads.fields)
        what = self.reads.fields[0].shape if plain else [field.as_dict() for field in self.reads.fields]
        parts = ["repack", ENCODING, self.name, self.tars, digest_of(self.marks), what, asdict(self.options),
                 self.image_format, *self._code()]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def inputs(self, number: int) -> str:
        key = self.tars[number][0]
        return digest_of({key: " ".join([self.marks[key], marks_of(self.reads.fields), *self._code()])})

    def _code(self) -> list[str]:
        """The names and hashes of somebody else's decoders."""
        asked = [one.asked.decoder for one in self.reads.each if one.asked and one.asked.decoder]
        return [text for kind in asked for text in (kind, code_hash(kind))]

    def total_samples(self, done: list[Shard]) -> int:
        read = sum(size for _, size in self.tars[: len(done)])
        return round(sum(shard.num_samples for shard in done) / read * sum(size for _, size in self.tars))

    def check_visible(self) -> None:
        open_store(self.source).size(self.tars[0][0])

    def make(self, number: int, scratch: Path) -> tuple[Path | None, PackedShard]:
        key, size = self.tars[number]
        store, path, skipped = open_store(self.source), scratch / "shard.tar", list[str]()
        bucket = self.options.image_size if isinstance(self.options.image_size, Bucket) else None
        with open(path, "wb") as file, naming(store, key):
            writer = ShardWriter(file, self.reads.fields, self.image_format or "png")
            samples = self.reads.samples(tape_of(store, key, size))
            for i, sample in enumerate(samples):
                if bucket is not None and not bucket.takes(self._picture_size(sample)):
                    continue
                try:
                    values = self.reads.values(sample, self._picture)
                    with naming_sample(sample):
                        writer.add(f"{number:06d}-{i:08d}", values)
                except DataError as error:
                    if not self.skips_bad:
                        raise
                    skipped.append(f"{store.url(key)}: {error}")
            left_out = {} if bucket is not None and bucket.number else samples.left_out  # all buckets pass them
            packed = writer.finish(f"shards/{number:06d}.tar", skipped, left_out)
        return path if packed.shard.num_samples else None, packed

    def in_bucket(self, bucket: Bucket) -> RepackPlan:
        """The plan of the pictures of one bucket. Raises UserError where samples have no picture, or several."""
        only_picture(self.reads.fields, self.source)
        fields = in_size(self.reads.fields, bucket)
        each = tuple(replace(one, field=field) for one, field in zip(self.reads.each, fields, strict=True))
        return replace(self, reads=TarFields(each), options=replace(self.options, image_size=bucket))

    def _picture_size(self, sample: TarSample) -> Size:
        """NO_PICTURE where it can't be read, which one bucket then says."""
        asked = next(one.asked for one in self.reads.each if one.field.kind == "image")
        try:
            member = sample.member() if asked is None else member_of(asked, sample)
            return picture_size(member.data, member.place)
        except DataError:
            return NO_PICTURE

    def _picture(self, field: Field, member: Member) -> FieldValue:
        """The picture, fitted; or, where nothing about it is to change, its bytes."""
        if self.image_format is None and plain_format(member.data):
            return member.data
        if self.image_format is None:
            return picture_in_place(field, member)
        name = member.place
        to_grey = self.options.channels == 1
        return as_array(_open(member), tuple(field.shape), self.options.fitting, name, to_grey=to_grey)


def plan_repack(
    found: Tars,
    url: str | os.PathLike[str],
    name: str | None,
    options: SourceOptions,
    asked: FieldOptions,
    image_format: str | None,
    skips_bad: bool,
) -> RepackPlan:
    """Raises UserError when `url` is where the tars are, DataError when they hold no image that can be read."""
    store, tars = open_store(found.url), found.shards
    if open_store(url).url() == store.url():
        raise UserError(f"{store.url()}: new tars need another URL than that of the tars that they are made of")
    reads = find_tar_fields(store, tars, asked, options, skips_bad) if asked else None
    if reads is None or (image_format is not None and reads.own and reads.own.kind == "image"):
        images = _some_images(store, tars, options, wanted_of(asked.fields))
        width, height = (fitting.width, fitting.height) if (fitting := options.fitting) else images[0].size
        channels = options.channels or (1 if all(is_grey(image) for image in images) else 3)
        reads = images_of_shape((channels, height, width), options.labelled, reads)
    marks = content_marks(store, dict(tars))
    return RepackPlan(
        store.url(), open_store(url).url(), name or store.url().rpartition("/")[2], tars, marks, reads, options,
        image_format, skips_bad, notes=list(found.notes),
    )  # fmt: skip


def _some_images(
    store: Store, tars: list[tuple[str, int]], options: SourceOptions, wanted: Mapping[str, frozenset[str]]
) -> list[Image.Image]:
    """The first images of some tars spread over the set; where none can be read, of the first tar that has some."""
    apart = np.unique(np.linspace(0, len(tars) - 1, min(TARS_LOOKED_AT, len(tars))).astype(int)).tolist()
    images, problems = list[Image.Image](), list[str]()
    for number in [*apart, *(i for i in range(len(tars)) if i not in apart)]:
        if images and number not in apart:
            break
        key, size = tars[number]
        with naming(store, key):
            found = 0
            for sample in TarSamples(tape_of(store, key, size), options.labelled, wanted=wanted):
                try:
                    images.append(_open(sample.member()))
                    found += 1
                except DataError as error:
                    problems.append(f"{store.url(key)}: {error}")
                if found == LOOKED_AT // len(apart):
                    break
    if not images:
        why = f"; the first of {len(problems):,}: {problems[0]}" if problems else ""
        raise DataError(f"{store.url()}: its tars hold no image that can be read{why}")
    return images


def _open(member: Member) -> Image.Image:
    name = member.place
    if member.name.lower().endswith(".npy"):
        raise UserError(f"{name}: arrays are not made into images; index these tars in place")
    return open_picture(member.data, name)
