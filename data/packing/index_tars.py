"""Existing WebDataset tars, indexed in place: read once, checked, and given an index and a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.fields.field import Field, plain_fields
from scoreray.data.packing.commit import PackedShard
from scoreray.data.packing.index_records import IndexRecords, StoredMember
from scoreray.data.packing.tar_samples import TarSamples
from scoreray.data.reading.allowlist import found_format
from scoreray.data.reading.decode import decode_as_found
from scoreray.data.reading.manifest import INDEX, MANIFEST, MAX_KEY, Shard
from scoreray.data.reading.pictures import IMAGE_SUFFIXES
from scoreray.data.reading.tars import WINDOW_BYTES, Member, Tape
from scoreray.data.sources.identity import content_marks, digest_of
from scoreray.data.sources.layout import Layout, checked_layout
from scoreray.data.sources.listing import kinds_line, list_below, shown, some_of, suffix_of
from scoreray.data.storage.paths import mode_of
from scoreray.data.storage.patterns import find_tars, names_tars
from scoreray.data.storage.store import NotFound, Store, local_path, open_store


@dataclass(frozen=True)
class Tars:
    """Tars of one folder or prefix that `source` names: (key, bytes) of each, and notes about what else there is."""

    source: str
    url: str
    shards: list[tuple[str, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TarsPlan:
    """A PackPlan over tars that are there. `shape` has three channels for images: whether all are grey is known
    when all are read."""

    url: str
    name: str
    shards: list[tuple[str, int]]  # (key, bytes)
    shape: tuple[int, ...]
    dtype: str
    skips_bad: bool = False
    marks: dict[str, str] = field(default_factory=dict)  # content_marks() of them
    labelled: bool = True
    notes: list[str] = field(default_factory=list)
    origin: str = ""
    in_place = True

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def fields(self) -> list[Field]:
        return tar_fields(self.shape, self.dtype)

    @property
    def sha256(self) -> str:
        parts = ["tars", self.name, self.shards, digest_of(self.marks), self.labelled]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def inputs(self, number: int) -> str:
        key = self.shards[number][0]
        return digest_of({key: f"{self.marks.get(key)} {self.shape} {self.dtype}"})

    def total_samples(self, done: list[Shard]) -> int:
        per_byte = sum(shard.num_samples for shard in done) / sum(shard.bytes for shard in done)
        return round(per_byte * sum(size for _, size in self.shards))

    def check_visible(self) -> None:
        open_store(self.url).size(self.shards[0][0])

    def make(self, number: int, scratch: Path) -> tuple[None, PackedShard]:
        return None, index_tar(self, number)


def tars_at(source: str | os.PathLike[str]) -> Tars:
    """The tars below `source`, an S3 URL or a folder, or those of one folder that it names, in brace notation or one by
    its suffix; none if it is another file."""
    text = os.fspath(source)
    if names_tars(text) and not os.path.isdir(text):
        return _named_tars(text)
    where = local_path(source)
    if where is not None and not stat.S_ISDIR(mode_of(where)):
        return Tars(text, text, [])
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
    others = Counter(
        suffix_of(key) or "no suffix" for key in listing.files if not key.endswith(".tar") and not _is_ours(key)
    )
    note = f"{store.url()}: {others.total():,} files beside the tars are left out ({kinds_line(others)})"
    return Tars(store.url(), store.url(), tars, (note,) if others else ())


def _named_tars(source: str) -> Tars:
    found = find_tars(source)
    folders = sorted({tar.folder for tar in found})
    if len(folders) > 1:
        raise UserError(f"{source}: names tars of {len(folders)} folders ({some_of(folders)}); name those of one")
    return Tars(source, folders[0], [(tar.key, tar.bytes) for tar in found])


def _is_ours(key: str) -> bool:
    """Whether an earlier pack in this place made the file."""
    return key in (MANIFEST, INDEX) or key.startswith("packing/")


def plan_tars(
    tars: Tars,
    url: str | os.PathLike[str],
    name: str | None,
    skips_bad: bool = False,
    layout: Layout | None = None,
    labelled: bool = True,
) -> TarsPlan:
    """Raises UserError when `url` is not where the tars are, DataError when no sample can be read, or, without
    `skips_bad`, the first."""
    store, shards = open_store(tars.url), tars.shards
    if open_store(url).url() != store.url():
        raise UserError(
            f"{tars.url}: holds tars, which are indexed in place, not copied; give it as the URL too: "
            f"scoreray data pack '{tars.source}' {tars.url}; or make new ones of them: --image-size or --image-format"
        )
    for key, _ in shards:
        if not key.isprintable() or len(key) > MAX_KEY:  # the manifest names them, as text
            raise UserError(f"{shown(store.url(), shortened(key))}: can't be the name of a shard; rename it")
    shape, dtype = _first_shape(store, shards, skips_bad, labelled, layout)
    name, marks = name or tars.url.rpartition("/")[2], content_marks(store, dict(shards))
    return TarsPlan(tars.url, name, shards, shape, dtype, skips_bad, marks, labelled, list(tars.notes))


def _first_shape(
    store: Store, shards: list[tuple[str, int]], skips_bad: bool, labelled: bool, layout: Layout | None
) -> tuple[tuple[int, ...], str]:
    """(shape, dtype) of the first sample that can be read, images with three channels."""
    for key, size in shards:
        with naming(store, key):
            for sample in TarSamples(tape_of(store, key, size), labelled):
                try:
                    member = sample.member()
                    array, _ = decoded(member)
                except DataError:
                    if not skips_bad:
                        raise
                    continue
                if array.dtype == np.uint8:
                    return (3, *array.shape[:2]), "uint8"
                if array.ndim == 3 and checked_layout(member.name, array.shape, layout) == "NHWC":
                    raise UserError(
                        f"'{member.name}': an array of {' x '.join(map(str, array.shape))} with its channels last, "
                        "where the model takes [C, H, W] and tars are indexed as they are; write them so, or if they "
                        "are, say --layout NCHW"
                    )
                return array.shape, "float32"
    key = shards[0][0]
    raise DataError(f"{store.url(key)}: holds no sample" + " that can be read" * skips_bad)


def index_tar(plan: TarsPlan, number: int) -> PackedShard:
    """Reads and decodes all of one tar. Raises DataError naming it, the offset, and what is wrong or not accepted."""
    store = open_store(plan.url)
    key, size = plan.shards[number]
    records, skipped = IndexRecords(plan.fields), list[str]()
    with naming(store, key):
        tape = tape_of(store, key, size)
        samples = TarSamples(tape, plan.labelled)
        for sample in samples:
            try:
                member = sample.member()
                array, code = decoded(member)
                check_fits(plan.shape, plan.dtype, member, array, "--image-size makes new tars of one size")
            except DataError as error:
                if not plan.skips_bad:
                    raise
                skipped.append(f"{store.url(key)}: {error}")
                continue
            stored = StoredMember.of(member.offset, member.data, code)
            records.add({"": stored}, {plan.fields[0].name: array, "label": sample.label})
        if not records and not skipped:
            raise DataError("holds no sample")
    return records.finish(key, size, tape.sha256(), skipped, samples.left_out)


def tar_fields(shape: Sequence[int], dtype: str) -> list[Field]:
    """An image or array, and its class: which there are is known when all tars are read."""
    return [*plain_fields(shape, dtype, [], [], [], []), Field("label", "class", [], "int64", "")]


def decoded(member: Member) -> tuple[np.ndarray, int]:
    """A sample as it is found, and the format by which it is read again. Raises DataError naming the member."""
    code = found_format(member.name.lower(), member.data)
    try:
        return decode_as_found(member.data, code), code
    except DataError as error:
        raise DataError(f"byte {member.offset}: '{member.name}': {error}") from error


def check_fits(shape: Sequence[int], dtype: str, member: Member, values: np.ndarray, fix: str) -> None:
    """Raises DataError for a sample of another shape or type than the first has, or one that is not finite. Grey
    pictures are among coloured ones. `fix`: what to do about pictures of another size."""
    name = f"byte {member.offset}: '{member.name}'"
    if values.dtype == dtype == "uint8" and values.shape[:2] != tuple(shape[1:]):
        height, width = values.shape[:2]
        raise DataError(f"{name}: is {width} x {height} pixels, the first sample has {shape[2]} x {shape[1]}; {fix}")
    if values.dtype != dtype or (dtype != "uint8" and values.shape != tuple(shape)):
        raise DataError(f"{name}: is {values.dtype} {values.shape}, the first sample {dtype} {tuple(shape)}")
    if dtype != "uint8" and not np.isfinite(values).all():
        raise DataError(f"{name}: holds a value that is not finite")


def tape_of(store: Store, key: str, size: int, window_bytes: int = WINDOW_BYTES) -> Tape:
    return Tape(partial(store.get, key), size, window_bytes=window_bytes)


@contextlib.contextmanager
def naming(store: Store, key: str) -> Iterator[None]:
    """Puts the shard's URL before what an error in it says."""
    try:
        yield
    except NotFound as error:
        raise DataError(f"{error}; it was there when the tars were listed") from error
    except (DataError, UserError) as error:
        raise type(error)(f"{store.url(key)}: {error}") from error
