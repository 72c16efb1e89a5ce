"""Existing WebDataset tars, indexed where they lie: read once, checked, and given an index and a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from scoreray.data.decode import decode, decode_class, look
from scoreray.data.errors import DataError, UserError
from scoreray.data.identity import identity
from scoreray.data.layout import Layout, checked_layout
from scoreray.data.listing import list_below
from scoreray.data.manifest import FORMATS, RECORD, Shard, digest
from scoreray.data.packing import Moments, Packed
from scoreray.data.pictures import IMAGE_SUFFIXES
from scoreray.data.records import records_sha256
from scoreray.data.store import NotFound, Store, local_path, open_store
from scoreray.data.tars import Member, Tape, members

SUFFIXES = {**FORMATS, "jpeg": FORMATS["jpg"]}


@dataclass(frozen=True)
class TarsPlan:
    """A packing.Plan over tars that are there."""

    url: str
    name: str
    shards: list[tuple[str, int]]  # (key, bytes)
    shape: tuple[int, ...]
    dtype: str
    skips_bad: bool = False
    contents: str = ""  # identity() of them

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def classes(self) -> list[str] | None:
        return None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(["tars", self.name, self.shards, self.contents]).encode()).hexdigest()

    def total_samples(self, done: list[Shard]) -> int:
        per_byte = sum(shard.num_samples for shard in done) / sum(shard.bytes for shard in done)
        return round(per_byte * sum(size for _, size in self.shards))

    @property
    def notes(self) -> list[str]:
        return []

    def check_here(self) -> None:
        open_store(self.url).size(self.shards[0][0])

    def make(self, number: int, scratch: Path) -> tuple[None, Packed]:
        return None, index_tar(self, number)


def tars_at(source: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """(key, bytes) of the tars below `source`, an S3 URL or a folder; none if it is neither."""
    where = local_path(source)
    if where is not None and not where.is_dir():
        return []
    store = open_store(source)
    listing = list_below(store)
    tars = [(key, size) for key, size in listing.files.items() if key.endswith(".tar")]
    images = [key for key in listing.files if key.lower().endswith(IMAGE_SUFFIXES)]
    for key, to in listing.broken.items():
        if tars or key.endswith(".tar"):
            raise DataError(f"{store.url(key)}: a broken link, to {to}; restore what it leads to, or remove it")
    if tars and images:
        raise UserError(
            f"{source}: holds tars ({tars[0][0]!r}) and images ({images[0]!r}); give the folder of the ones to pack"
        )
    return tars


def plan_tars(
    source: str | os.PathLike[str],
    url: str | os.PathLike[str],
    name: str | None,
    skips_bad: bool = False,
    layout: Layout | None = None,
) -> TarsPlan:
    """Raises UserError when `url` is not where the tars lie, DataError when the first sample can't be read."""
    store = open_store(source)
    if open_store(url).url() != store.url():
        raise UserError(
            f"{store.url()}: holds tars, which are indexed where they lie, not copied; give it as the URL too: "
            f"scoreray data pack {source} {source}; or make new ones of them: --image-size or --image-format"
        )
    shards = tars_at(source)
    key, size = shards[0]
    with naming(store, key):
        image, _ = next(samples(tape_of(store, key, size)), (None, 0))
        if image is None:
            raise DataError("holds no sample")
        shape, dtype = look(image.data, SUFFIXES[image.name.rpartition(".")[2].lower()])
        if dtype == "float32" and len(shape) == 3 and checked_layout(image.name, shape, layout) == "NHWC":
            raise UserError(
                f"'{image.name}': an array of {' x '.join(map(str, shape))} with its channels last, where the model "
                "takes [C, H, W] and tars are indexed as they are; write them so, or if they are, say --layout NCHW"
            )
    contents = identity(store, dict(shards))
    return TarsPlan(store.url(), name or store.url().rpartition("/")[2], shards, shape, dtype, skips_bad, contents)


def samples(tape: Tape) -> Iterator[tuple[Member, int]]:
    """(image member, label or -1) of each sample: neighbouring members with the same key, as WebDataset groups them."""
    seen: set[bytes] = set()
    key, image, label, kinds = "", None, -1, set[str]()
    for member in members(tape):
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        its_key, kind = f"{folder}/{stem}", kind.lower()
        if its_key != key:
            if key:
                yield _whole(key, image, label)
            hashed = hashlib.blake2b(its_key.encode(), digest_size=8).digest()
            if hashed in seen:
                raise DataError(f"byte {member.offset}: sample '{stem}' comes twice, or its members lie apart")
            seen.add(hashed)
            key, image, label, kinds = its_key, None, -1, set()
        if kind in kinds:
            raise DataError(f"byte {member.offset}: '{member.name}' comes twice")
        kinds.add(kind)
        if kind in SUFFIXES:
            if image is not None:
                raise DataError(f"byte {member.offset}: sample '{stem}' has two images")
            image = member
        elif kind == "cls":
            label = decode_class(member.data, f"byte {member.offset}: '{member.name}'")
    if key:
        yield _whole(key, image, label)


def _whole(key: str, image: Member | None, label: int) -> tuple[Member, int]:
    if image is None:
        raise DataError(f"sample '{key.strip('/')}' has no image ({', '.join(SUFFIXES)})")
    return image, label


def index_tar(plan: TarsPlan, number: int) -> Packed:
    """Reads and decodes all of one tar. Raises DataError naming it, the offset, and what is wrong or not accepted."""
    store = open_store(plan.url)
    key, size = plan.shards[number]
    dtype = np.dtype(plan.dtype)
    records: list[tuple[int, int, int, int, int]] = []
    moments, class_counts, skipped = Moments(plan.shape, plan.dtype), [0], list[str]()
    with naming(store, key):
        tape = tape_of(store, key, size)
        for image, label in samples(tape):
            code = SUFFIXES[image.name.rpartition(".")[2].lower()]
            where = partial("byte {}: '{}'".format, image.offset, image.name)
            try:
                values = decode(image.data, code, plan.shape, dtype, where)
                if not np.isfinite(values).all():
                    raise DataError(f"{where()}: holds a value that is not finite")
            except DataError as error:
                if not plan.skips_bad:
                    raise
                skipped.append(f"{store.url(key)}: {error}")
                continue
            moments.add(values)
            class_counts += [0] * (label + 1 - len(class_counts))
            if label >= 0:
                class_counts[label] += 1
            records.append((image.offset, len(image.data), label, code, digest(image.data)))
        if not records and not skipped:
            raise DataError("holds no sample")
        array = np.zeros(len(records), RECORD)
        array[:] = records
        shard = Shard(key, len(records), size, tape.sha256(), records_sha256(array.tobytes()))
    sums, squares = moments.sums.tolist(), moments.squares.tolist()
    return Packed(shard, sums, squares, class_counts if any(class_counts) else [], array.tobytes(), skipped)


def tape_of(store: Store, key: str, size: int) -> Tape:
    return Tape(partial(store.get, key), size)


@contextlib.contextmanager
def naming(store: Store, key: str) -> Iterator[None]:
    """Puts the shard's URL before what an error in it says."""
    try:
        yield
    except NotFound as error:
        raise DataError(f"{error}; it was there when the tars were listed") from error
    except (DataError, UserError) as error:
        raise type(error)(f"{store.url(key)}: {error}") from error
