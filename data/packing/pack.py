"""`pack(source, url)`: images to WebDataset tar shards, their index and manifest.

The same source and arguments give the same bytes, whichever process makes the shards. Each shard is put when it is
done; the manifest comes last and is the commit. A pack that was killed is run again and keeps shards that are there;
another pack at the same URL is refused. Existing WebDataset tars are indexed in place, or made into new ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scoreray.data.buckets.sizes import Bucket
from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.fields.field import Field, is_plain
from scoreray.data.fields.record_layout import WRITTEN_FORMATS
from scoreray.data.own_code import is_own
from scoreray.data.packing.commit import Mapper, carry_out
from scoreray.data.packing.index_tars import Tars, TarsPlan, plan_tars, tars_at
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.repack import RepackPlan, plan_repack
from scoreray.data.packing.shards import ENCODING, ShardWriter, encode_value, stored_fields
from scoreray.data.reading.manifest import BUCKETS, Manifest, Shard
from scoreray.data.sources.field_options import NO_FIELDS, FieldOptions, of_extensions
from scoreray.data.sources.field_source import FieldSource, only_picture
from scoreray.data.sources.layout import Layout
from scoreray.data.sources.options import SourceOptions
from scoreray.data.sources.own_source import open_own_source
from scoreray.data.sources.source import Source, open_source
from scoreray.data.storage.paths import mode_of
from scoreray.data.storage.store import local_path, open_store
from scoreray.data.tables.open import open_table

SHARD_BYTES = 64 << 20  # about; large enough that a shard is one good read, small enough to make in memory


def pack(
    source: str | Path,
    url: str | Path,
    *,
    name: str | None = None,
    samples_per_shard: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    image_size: int | None = None,
    image_format: str | None = None,
    fields: FieldOptions = NO_FIELDS,
    source_options: Mapping[str, Any] | None = None,
    channels: Literal[1, 3] | None = None,
    layout: Layout | None = None,
    labelled: bool = True,
    skip_bad: int = 0,
    seed: int = 0,
    workers: int = 1,
    map_shards: Mapper | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Packs `source` (.npz, IDX, a folder of images here or in S3, WebDataset tars) at `url`; returns the manifest.

    Tars, of a folder or in brace notation, are indexed in place when `url` is where they are; at another URL, with
    `image_size`, `image_format` or `fields`, new ones are made of them.

    Args:
      samples_per_shard: None aims at `shard_bytes` by encoding a few samples first.
      image_size: resize the shorter side to it and crop the centre.
      image_format: png (the default), jpg (lossy) or npy; arrays of floats are always npy.
      fields: what else of a sample is packed, by names of their own.
      source_options: of a source of somebody else's, `package.module:Name`.
      channels: 1 or 3; None: as the images of the folder are.
      layout: of arrays, a letter an axis, NCHW; None: channels first, of four axes as `layout.layout_of` finds.
      labelled: subfolders of a folder, and labels that come with samples, are classes.
      skip_bad: up to so many samples that can't be read are left out (`PackedShard.skipped` names them).
      seed: of the permutation in which samples are packed.
      workers: threads that make shards; each holds one in memory.
      map_shards: makes the shards of a plan in another way (on a cluster) than by `workers`.
      progress: called with (samples done, samples in all) after each shard.

    Raises UserError for a source or URL that can't be used, DataError for an image that can't be read, StorageError.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    plan = plan_pack(
        source, url, name=name, samples_per_shard=samples_per_shard, shard_bytes=shard_bytes, image_size=image_size,
        image_format=image_format, fields=fields, source_options=source_options, channels=channels, layout=layout,
        labelled=labelled, skip_bad=skip_bad, seed=seed,
    )  # fmt: skip
    store = open_store(url)
    if store.exists(BUCKETS):
        raise UserError(f"{store.url()}: holds a data set in buckets; give another URL, or remove what is there")
    return carry_out(plan, workers=workers, map_shards=map_shards, progress=progress, skip_bad=skip_bad)


def plan_pack(
    source: str | Path,
    url: str | Path,
    *,
    name: str | None = None,
    samples_per_shard: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    image_size: int | Bucket | None = None,
    image_format: str | None = None,
    fields: FieldOptions = NO_FIELDS,
    source_options: Mapping[str, Any] | None = None,
    channels: Literal[1, 3] | None = None,
    layout: Layout | None = None,
    labelled: bool = True,
    skip_bad: int = 0,
    seed: int = 0,
) -> SourcePlan | TarsPlan | RepackPlan:
    """What is to be packed and how; arguments and errors as of `pack`."""
    if image_format not in (None, *WRITTEN_FORMATS):
        raise UserError(f"--image-format '{image_format}': {nearest(str(image_format), WRITTEN_FORMATS)}")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: at least 1 is needed")
    options = SourceOptions(image_size, channels, labelled, layout)
    own = is_own(source) and not Path(source).exists()
    if source_options and not own:
        raise UserError(f"--option {next(iter(source_options))}: is for a source of yours, package.module:Name")
    where = None if own else local_path(source)
    given = [ENCODING, str(source) if where is None else os.path.abspath(where), asdict(options), name,
             samples_per_shard, shard_bytes, image_format, seed]  # fmt: skip
    given += [_as_given(fields)] if fields else []
    given += [dict(source_options)] if source_options else []
    origin = hashlib.sha256(json.dumps(given).encode(errors="surrogateescape")).hexdigest()
    if own:
        opened: FieldSource = open_own_source(str(source), source_options or {})
        name = name or opened.path.rpartition(":")[2].lower()
    else:
        tars = tars_at(source)
        _check_apart(tars.url, url, bool(tars.shards))
        if tars.shards:
            if samples_per_shard is not None:
                raise UserError(f"{source}: each tar stays one; --samples-per-shard can't be given")
            plan = _plan_of_tars(tars, url, name, options, fields, image_format, skip_bad > 0)
            return replace(plan, origin=origin)
        if fields.decoders:
            raise UserError(f"--decoder {fields.decoders[0]}: is for members of tars, and {source} holds none")
        opened = open_table(source, options, fields) or open_source(source, options)
    if isinstance(image_size, Bucket):
        only_picture(opened.fields, str(source))
        opened = opened.in_bucket(image_size)
    opened.check_readable(skip_bad)
    chosen = "npy" if is_plain(opened.fields) and opened.fields[0].kind == "array" else image_format or "png"
    if samples_per_shard is None:
        samples_per_shard = max(1, min(opened.num_samples, round(shard_bytes / _sample_bytes(opened, chosen))))
    name = name or Path(opened.path).name.split(".")[0]
    return SourcePlan(
        open_store(url).url(), name, opened, samples_per_shard, chosen, seed, skip_bad > 0, origin, options
    )


def _as_given(fields: FieldOptions) -> dict[str, Any]:
    """Without the decoders that there are not, so that packs of earlier versions are recognised."""
    page = asdict(fields)
    for one in page["fields"]:
        if not one["decoder"]:
            del one["decoder"]
    return page


def _plan_of_tars(
    tars: Tars, url: str | Path, name: str | None, options: SourceOptions, fields: FieldOptions,
    image_format: str | None, skips_bad: bool,
) -> TarsPlan | RepackPlan:  # fmt: skip
    """Tars are indexed where they are, or made into new ones."""
    fields = of_extensions(fields)
    as_they_are = options.image_size is None and image_format is None and options.channels is None
    in_place = not fields or (open_store(url).url() == tars.url and not fields.decoders)
    if as_they_are and in_place:
        return plan_tars(tars, url, name, options, fields, skips_bad)
    made = None if as_they_are else image_format or "png"
    return plan_repack(tars, url, name, options, fields, made, skips_bad)


def _check_apart(source: str | Path, url: str | Path, holds_tars: bool) -> None:
    """A target below the source would be taken for a part of it by the next run. Tars may be indexed in place."""
    where = local_path(source)
    if where is None or stat.S_ISDIR(mode_of(where)):
        within, target = _real_place(source), _real_place(url)
        if target.startswith(f"{within}/") or (target == within and not holds_tars):
            how = "is" if target == within else "is inside"
            raise UserError(
                f"{open_store(url).url()}: {how} the folder that is packed ({open_store(source).url()}); give a place "
                "outside it"
            )


def _real_place(url: str | Path) -> str:
    """Where it is, whichever links lead there."""
    where = local_path(url)
    return open_store(url).url().rstrip("/") if where is None else os.path.realpath(where)


@dataclass(frozen=True)
class SourcePlan:
    """A PackPlan that writes shards of a source's samples."""

    url: str
    name: str
    source: FieldSource
    samples_per_shard: int
    image_format: str
    seed: int
    skips_bad: bool = False
    origin: str = ""
    options: SourceOptions = field(default_factory=SourceOptions)
    in_place = False

    @property
    def fields(self) -> Sequence[Field]:
        return stored_fields(self.source.fields, self.image_format)

    @property
    def num_shards(self) -> int:
        return -(-self.source.num_samples // self.samples_per_shard)

    @property
    def sha256(self) -> str:
        # Not skips_bad: a shard with a bad sample is only finished where that was skipped, and its record lists it; the
        # manifest has the number.
        parts = [ENCODING, *contents(self.source, self.options), self.name, self.samples_per_shard, self.image_format,
                 self.seed]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def inputs(self, number: int) -> str:
        parts = [self.source.inputs(self.numbers(number).tolist()), number * self.samples_per_shard]
        parts += (
            []
            if is_plain(self.source.fields)
            else [replace(field, normalisation="none").as_dict() for field in self.fields]
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        return list(self.source.notes)

    def total_samples(self, done: list[Shard]) -> int:
        return self.source.num_samples

    def check_visible(self) -> None:
        self.source.check_visible()

    def numbers(self, shard: int) -> np.ndarray:
        """Which samples of the source are in this shard: the permutation that the seed gives, cut into shards."""
        order = _permutation(self.seed, self.source)
        return order[shard * self.samples_per_shard : (shard + 1) * self.samples_per_shard]

    def make(self, number: int, scratch: Path) -> tuple[bytes | None, PackedShard]:
        return make_shard(self, number)


def _permutation(seed: int, source: FieldSource) -> np.ndarray:
    """Of the samples; of a source of runs these are permuted, and the samples of each, so that each shard is made of
    whole runs but for its ends, and all shards together read them about once."""
    runs = source.runs
    return _permuted(seed, source.num_samples, None if runs is None or len(runs) < 2 else runs.tobytes())


@lru_cache(maxsize=1)
def _permuted(seed: int, n: int, runs: bytes | None) -> np.ndarray:
    """Sorted raw Philox words: the same with every version of numpy."""
    words = np.random.Philox(key=[seed % (1 << 64), 0xDA7A]).random_raw(n)
    if runs is None:
        return np.argsort(words, kind="stable")
    starts = np.frombuffer(runs, np.int64)
    places = np.argsort(
        np.argsort(np.random.Philox(key=[seed % (1 << 64), 0x2B15]).random_raw(len(starts)), kind="stable")
    )
    return np.lexsort((words, np.repeat(places, np.diff(starts, append=n))))


def contents(source: FieldSource, options: SourceOptions) -> list[Any]:
    """What a pack is recognised by, besides its own arguments."""
    if not isinstance(source, Source):
        return [source.fingerprint, asdict(options), [field.as_dict() for field in source.fields]]
    # Of images or arrays alone as ever, so that packs of earlier versions are recognised.
    labels = b"" if source.labels is None else source.labels.tobytes()
    return [source.fingerprint, asdict(options), source.classes, hashlib.sha256(labels).hexdigest(), source.shape,
            source.dtype]  # fmt: skip


def make_shard(plan: SourcePlan, number: int) -> tuple[bytes | None, PackedShard]:
    """The bytes of a shard, and what is to be known of it. Keys are the samples' numbers in the data set."""
    source, tar, skipped = plan.source, io.BytesIO(), list[str]()
    writer = ShardWriter(tar, source.fields, plan.image_format)
    numbers = plan.numbers(number).tolist()
    for i, (sample, values) in enumerate(zip(numbers, source.read_all(numbers), strict=True)):
        error = values
        if not isinstance(values, DataError):
            try:
                writer.add(f"{number * plan.samples_per_shard + i:08d}", values)
                continue
            except DataError as found:
                error = DataError(f"{source.path}: sample {sample}: {found}")
        if not plan.skips_bad:
            raise DataError(f"{error}; fix or remove it, or --skip-bad N leaves out up to N such files")
        skipped.append(str(error))
    packed = writer.finish(
        f"shards/{number:06d}.tar", skipped, None if number or is_plain(source.fields) else source.left_out
    )  # what no field takes is counted once
    return tar.getvalue() if packed.shard.num_samples else None, packed


def _sample_bytes(source: FieldSource, image_format: str) -> float:
    """Bytes of a sample in a tar, from a few of them that can be read."""
    numbers = np.linspace(0, source.num_samples - 1, min(16, source.num_samples)).astype(int).tolist()
    fields = [field for field in stored_fields(source.fields, image_format) if not field.is_inline]
    sizes = [
        sum(len(encode_value(values[field.name], field, image_format)[1]) + 256 + 512 for field in fields)
        for values in source.read_all(numbers)
        if not isinstance(values, DataError)
    ]
    inline = 1024 * (len(source.fields) - len(fields))
    return float(np.mean(sizes or [(1 << 20) + 256 + 512])) + inline
