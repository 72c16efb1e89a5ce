"""New tars from existing ones: each sample decoded, fitted and encoded again; streaming, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.packing.commit import PackedShard
from scoreray.data.packing.index_tars import Tars, naming, tape_of, tar_fields
from scoreray.data.packing.shards import ENCODING, ShardWriter
from scoreray.data.packing.tar_samples import TarSamples
from scoreray.data.reading.manifest import Shard
from scoreray.data.reading.pictures import as_array, is_grey, open_picture
from scoreray.data.reading.tars import Member
from scoreray.data.sources.identity import content_marks, digest_of
from scoreray.data.sources.source import SourceOptions
from scoreray.data.storage.store import Store, open_store

LOOKED_AT, TARS_LOOKED_AT = 32, 8  # samples, and tars that they are from, that are looked at for colours


@dataclass(frozen=True)
class RepackPlan:
    """A PackPlan that makes a new tar of each one at `source`; labels are kept, other members are not."""

    source: str
    url: str
    name: str
    tars: list[tuple[str, int]]  # (key, bytes)
    marks: dict[str, str]  # content_marks() of them
    shape: tuple[int, ...]
    options: SourceOptions
    image_format: str
    skips_bad: bool
    dtype: str = "uint8"
    notes: list[str] = field(default_factory=list)
    origin: str = ""
    in_place = False

    @property
    def num_shards(self) -> int:
        return len(self.tars)

    @property
    def fields(self) -> list[Field]:
        return tar_fields(self.shape, self.dtype)

    @property
    def sha256(self) -> str:
        parts = ["repack", ENCODING, self.name, self.tars, digest_of(self.marks), self.shape, asdict(self.options),
                 self.image_format]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def inputs(self, number: int) -> str:
        key = self.tars[number][0]
        return digest_of({key: f"{self.marks[key]} {self.shape}"})

    def total_samples(self, done: list[Shard]) -> int:
        read = sum(size for _, size in self.tars[: len(done)])
        return round(sum(shard.num_samples for shard in done) / read * sum(size for _, size in self.tars))

    def check_visible(self) -> None:
        open_store(self.source).size(self.tars[0][0])

    def make(self, number: int, scratch: Path) -> tuple[Path | None, PackedShard]:
        key, size = self.tars[number]
        store, path, skipped = open_store(self.source), scratch / "shard.tar", list[str]()
        with open(path, "wb") as file, naming(store, key):
            writer = ShardWriter(file, self.fields, self.image_format)
            samples = TarSamples(tape_of(store, key, size), self.options.labelled)
            for i, sample in enumerate(samples):
                try:
                    array = _array(sample.member(), self.shape, self.options)
                except DataError as error:
                    if not self.skips_bad:
                        raise
                    skipped.append(f"{store.url(key)}: {error}")
                    continue
                writer.add(f"{number:06d}-{i:08d}", {"image": array, "label": sample.label})
            packed = writer.finish(f"shards/{number:06d}.tar", skipped, samples.left_out)
        return path if packed.shard.num_samples else None, packed


def plan_repack(
    found: Tars,
    url: str | os.PathLike[str],
    name: str | None,
    options: SourceOptions,
    image_format: str,
    skips_bad: bool,
) -> RepackPlan:
    """Raises UserError when `url` is where the tars are, DataError when they hold no image that can be read."""
    store, tars = open_store(found.url), found.shards
    if open_store(url).url() == store.url():
        raise UserError(f"{store.url()}: new tars need another URL than that of the tars that they are made of")
    images = _some_images(store, tars, options)
    height = width = options.image_size or 0
    if not options.image_size:
        width, height = images[0].size
    channels = options.channels or (1 if all(is_grey(image) for image in images) else 3)
    marks = content_marks(store, dict(tars))
    return RepackPlan(
        store.url(), open_store(url).url(), name or store.url().rpartition("/")[2], tars, marks,
        (channels, height, width), options, image_format, skips_bad, notes=list(found.notes),
    )  # fmt: skip


def _some_images(store: Store, tars: list[tuple[str, int]], options: SourceOptions) -> list[Image.Image]:
    """The first images of some tars spread over the set; where none can be read, of the first tar that has some."""
    apart = np.unique(np.linspace(0, len(tars) - 1, min(TARS_LOOKED_AT, len(tars))).astype(int)).tolist()
    images, problems = list[Image.Image](), list[str]()
    for number in [*apart, *(i for i in range(len(tars)) if i not in apart)]:
        if images and number not in apart:
            break
        key, size = tars[number]
        with naming(store, key):
            found = 0
            for sample in TarSamples(tape_of(store, key, size), options.labelled):
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
    name = f"byte {member.offset}: '{member.name}'"
    if member.name.lower().endswith(".npy"):
        raise UserError(f"{name}: arrays are not made into images; index these tars in place")
    return open_picture(member.data, name)


def _array(member: Member, shape: tuple[int, ...], options: SourceOptions) -> np.ndarray:
    name = f"byte {member.offset}: '{member.name}'"
    return as_array(_open(member), shape, options.image_size, name, to_grey=options.channels == 1)
