"""New tars of existing ones: each sample decoded, fitted, encoded; a tar at a time, streaming, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.identity import identity
from scoreray.data.index_tars import SUFFIXES, naming, samples, tape_of, tars_at
from scoreray.data.manifest import FORMATS, Shard
from scoreray.data.packing import Packed
from scoreray.data.pictures import as_array, is_grey, open_picture
from scoreray.data.shards import ENCODING, ShardWriter
from scoreray.data.sources import Reading
from scoreray.data.store import open_store
from scoreray.data.tars import Member

LOOKED_AT = 32  # samples of the first tar that are looked at for colours


@dataclass(frozen=True)
class RepackPlan:
    """A packing.Plan that makes a new tar of each one at `source`; labels are kept, other members are not."""

    source: str
    url: str
    name: str
    tars: list[tuple[str, int]]  # (key, bytes)
    contents: str  # identity() of them
    shape: tuple[int, ...]
    reading: Reading
    image_format: str
    skips_bad: bool
    dtype: str = "uint8"

    @property
    def num_shards(self) -> int:
        return len(self.tars)

    @property
    def classes(self) -> list[str] | None:
        return None

    @property
    def notes(self) -> list[str]:
        return []

    @property
    def sha256(self) -> str:
        parts = ["repack", ENCODING, self.name, self.tars, self.contents, self.shape, asdict(self.reading),
                 self.image_format]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def total_samples(self, done: list[Shard]) -> int:
        read = sum(size for _, size in self.tars[: len(done)])
        return round(sum(shard.num_samples for shard in done) / read * sum(size for _, size in self.tars))

    def check_here(self) -> None:
        open_store(self.source).size(self.tars[0][0])

    def make(self, number: int, scratch: Path) -> tuple[Path | None, Packed]:
        key, size = self.tars[number]
        store, path, skipped = open_store(self.source), scratch / "shard.tar", list[str]()
        with open(path, "wb") as file, naming(store, key):
            writer = ShardWriter(file, self.shape, self.dtype, self.image_format)
            for i, (image, label) in enumerate(samples(tape_of(store, key, size))):
                try:
                    array = _array(image, self.shape, self.reading)
                except DataError as error:
                    if not self.skips_bad:
                        raise
                    skipped.append(f"{store.url(key)}: {error}")
                    continue
                writer.add(f"{number:06d}-{i:08d}", array, label)
            packed = writer.finish(f"shards/{number:06d}.tar", skipped)
        return path if packed.shard.num_samples else None, packed


def plan_repack(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    name: str | None,
    reading: Reading,
    image_format: str,
    skips_bad: bool,
) -> RepackPlan:
    """Raises UserError when `url` is where the tars lie or they hold no images, DataError for a first tar that can't
    be read."""
    store, tars = open_store(source), tars_at(source)
    if open_store(url).url() == store.url():
        raise UserError(f"{store.url()}: new tars need another URL than that of the tars that they are made of")
    key, size = tars[0]
    with naming(store, key):
        images = list(_first(samples(tape_of(store, key, size))))
    if not images:
        raise DataError(f"{store.url(key)}: holds no image that can be read")
    height = width = reading.image_size or 0
    if not reading.image_size:
        width, height = images[0].size
    channels = reading.channels or (1 if all(is_grey(image) for image in images) else 3)
    return RepackPlan(
        store.url(), open_store(url).url(), name or store.url().rpartition("/")[2], tars, identity(store, dict(tars)),
        (channels, height, width), reading, image_format, skips_bad,
    )  # fmt: skip


def _first(found: Iterator[tuple[Member, int]]) -> Iterator[Image.Image]:
    for _, (member, _) in zip(range(LOOKED_AT), found, strict=False):
        try:
            yield _open(member)
        except DataError:
            continue


def _open(member: Member) -> Image.Image:
    name = f"byte {member.offset}: '{member.name}'"
    if SUFFIXES[member.name.rpartition(".")[2].lower()] == FORMATS["npy"]:
        raise UserError(f"{name}: arrays are not made into images; index these tars where they lie")
    return open_picture(member.data, name)


def _array(member: Member, shape: tuple[int, ...], reading: Reading) -> np.ndarray:
    name = f"byte {member.offset}: '{member.name}'"
    return as_array(_open(member), shape, reading.image_size, name, to_grey=reading.channels == 1)
