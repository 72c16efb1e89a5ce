"""Existing WebDataset tars, indexed in place: read once, checked, and given an index and a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.fields.field import Field, is_plain
from scoreray.data.packing.index_records import IndexRecords, StoredMember
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.tar_fields import TarFields, find_tar_fields, marks_of, naming, naming_sample
from scoreray.data.packing.tar_members import picture_in_place
from scoreray.data.reading.manifest import INDEX, MANIFEST, MAX_KEY, Shard
from scoreray.data.reading.pictures import IMAGE_SUFFIXES
from scoreray.data.reading.tars import Tape
from scoreray.data.sources.field_options import FieldOptions
from scoreray.data.sources.identity import content_marks, digest_of
from scoreray.data.sources.listing import kinds_line, list_below, shown, some_of, suffix_of
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.paths import mode_of
from scoreray.data.storage.patterns import find_tars, names_tars
from scoreray.data.storage.store import local_path, open_store


@dataclass(frozen=True)
class Tars:
    """Tars of one folder or prefix that `source` names: (key, bytes) of each, and notes about what else there is."""

    source: str
    url: str
    shards: list[tuple[str, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TarsPlan:
    """A PackPlan over tars that are there."""

    url: str
    name: str
    shards: list[tuple[str, int]]  # (key, bytes)
    reads: TarFields
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
        return self.reads.fields

    @property
    def sha256(self) -> str:
        parts = ["tars", self.name, self.shards, digest_of(self.marks), self.labelled]
        parts += [] if is_plain(self.fields) else [[field.as_dict() for field in self.fields]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def inputs(self, number: int) -> str:
        key = self.shards[number][0]
        return digest_of({key: f"{self.marks.get(key)} {marks_of(self.fields)}"})

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
    options: SourceOptions,
    asked: FieldOptions,
    skips_bad: bool = False,
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
    reads = find_tar_fields(store, shards, asked, options, skips_bad)
    name, marks = name or tars.url.rpartition("/")[2], content_marks(store, dict(shards))
    return TarsPlan(tars.url, name, shards, reads, skips_bad, marks, options.labelled, list(tars.notes))


def index_tar(plan: TarsPlan, number: int) -> PackedShard:
    """Reads and decodes all of one tar. Raises DataError naming it, the offset, and what is wrong or not accepted."""
    store = open_store(plan.url)
    key, size = plan.shards[number]
    records, skipped, sha256 = IndexRecords(plan.fields), list[str](), hashlib.sha256()

    def get(start: int, end: int) -> bytes:
        data = store.get(key, start, end)
        sha256.update(data)
        return data

    with naming(store, key):
        samples = plan.reads.samples(Tape(get, size))
        for sample in samples:
            try:
                values = plan.reads.values(sample, picture_in_place)
                with naming_sample(sample):
                    records.check(values)
            except DataError as error:
                if not plan.skips_bad:
                    raise
                skipped.append(f"{store.url(key)}: {error}")
                continue
            stored = {
                extension: StoredMember.of(member.offset, member.data, code)
                for extension, (member, code) in plan.reads.stored(sample).items()
            }
            records.add(stored, values)
        if not records and not skipped:
            raise DataError("holds no sample")
    return records.finish(key, size, sha256.hexdigest(), skipped, samples.left_out)
