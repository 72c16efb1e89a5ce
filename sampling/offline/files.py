"""From finished shards of samples to a folder of pictures, to one npz, or to a sheet of the first ones.

One shard is in memory at a time. The same shards give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from scoreray.data.errors import DataError
from scoreray.data.fields.record_layout import FORMATS, record_of
from scoreray.data.packing.inspect import field_pictures, picture_grid
from scoreray.data.packing.plan import PackedShard, put_record
from scoreray.data.packing.shards import ShardWriter, stored_fields
from scoreray.data.reading.decode import decode
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.reading.tars import Tape, members
from scoreray.data.scratch import scratch_folder
from scoreray.data.storage.store import Store
from scoreray.data.threads import map_in_threads
from scoreray.sampling.offline.generate import MAX_SHEET, class_labels, png_of_sheet
from scoreray.sampling.offline.place import (
    AT_ONCE,
    SHEET,
    Place,
    digest_of,
    digest_of_file,
    group_name,
    picture,
    shard_name,
)
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.sampling.offline.record import Digests


def write_pictures(place: Place, plan: SamplePlan, numbers: Sequence[int], made: Sequence[PackedShard]) -> Digests:
    """000000.png, ... of the shards `numbers`, which were made, and a sheet of the first ones, samples.png."""
    digests = {}
    for number, packed in zip(numbers, made, strict=True):
        pictures, data = (
            plan.job.shard_samples(number),
            [data for data, _ in _members(place.shards, packed, record_of(plan.fields))],
        )
        assert len(data) == len(pictures), f"{len(data)} samples instead of {len(pictures)}"
        put = partial(_put, place.store, pictures[0], data)
        for _ in map_in_threads(AT_ONCE, put, range(len(data))):
            pass
        digests[group_name(pictures)] = digest_of(data)
    first = [place.store.get(picture(i)) for i in range(min(MAX_SHEET, plan.job.request.count))]
    shape, dtype = plan.shape, np.dtype(plan.dtype)
    arrays = [decode(data, FORMATS["png"], shape, dtype, partial(picture, i)) for i, data in enumerate(first)]
    sheet = png_of_sheet(torch.from_numpy(np.stack([array.transpose(2, 0, 1) for array in arrays])))
    place.store.put(SHEET, sheet)
    return {**digests, SHEET: digest_of([sheet])}


def _put(store: Store, first: int, data: Sequence[bytes], i: int) -> None:
    store.put(picture(first + i), data[i])


def write_npz(place: Place, plan: SamplePlan, made: Sequence[PackedShard]) -> Digests:
    """`images` (uint8 [N, H, W, C], or float32 [N, ...] of what is no picture), `labels` and `seeds` int64 [N]. Of
    ensembles also `record` and `member`, int64 [N], and the records' other fields by name (`EnsembleRecords.arrays`).
    """
    request, count, records = plan.job.request, plan.job.request.count, plan.conditions.records
    whole = [plan.job.shard_samples(number) for number in range(plan.num_shards)]
    labels = torch.cat([class_labels(plan.conditions.of(part.start, part.stop), len(part)) for part in whole]).numpy()
    shape = plan.shape if plan.dtype == "float32" else (*plan.shape[1:], plan.shape[0])
    with scratch_folder() as folder:
        file = folder / "samples.npz"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            with _array(archive, "images", plan.dtype, (count, *shape)) as out:
                for packed in made:
                    out.write(np.stack(list(_arrays(place.shards, plan, packed))).tobytes())
            for name, values in (("labels", labels), ("seeds", request.sample_seeds(0, count).numpy())):
                with _array(archive, name, "int64", values.shape) as out:
                    out.write(values.tobytes())
            for name, (dtype, row) in (records.arrays() if records else {}).items():
                assert records is not None
                unlike = f"field_{name}" if name in ("images", "labels", "seeds") else name
                with _array(archive, unlike, dtype, (count, *row)) as out:
                    for part in whole:
                        out.write(records.array(name, part.start, part.stop).tobytes())
        place.store.put(place.name, file)
    return {place.name: digest_of_file(place.store, place.name)}


def take_back(place: Place, plan: SamplePlan, kept: Digests) -> None:
    """Makes a data set that was damaged one that is not finished: those of its shards that are `kept` count as made,
    and the manifest, which is the commit, goes."""
    for number in range(plan.num_shards):
        name = shard_name(number)
        if name in kept:
            packed = _packed_again(plan, number, place.store.get(name))
            if packed.shard.sha256 == kept[name].sha256:  # else an encoder that has changed: it is drawn again
                put_record(place.store, number, packed)
    place.store.delete([MANIFEST])


def _packed_again(plan: SamplePlan, number: int, tar: bytes) -> PackedShard:
    """What `SamplePlan.make` said of a shard, from its bytes."""
    target, numbers = stored_fields(plan.fields, "png")[0], plan.job.shard_samples(number)
    writer, array = ShardWriter(io.BytesIO(), plan.fields), np.empty(0)
    beside = iter(plan.beside(numbers.start, numbers.stop, plan.conditions.of(numbers.start, numbers.stop)))
    for member in members(Tape(lambda start, end: tar[start:end], len(tar))):
        key, _, kind = member.name.partition(".")
        if kind == target.member:
            code = FORMATS[kind.rpartition(".")[2]]
            array = decode(member.data, code, plan.shape, np.dtype(plan.dtype), partial(str, member.name))
        elif kind == "json":  # a sample's last
            writer.add(key, {target.name: array, **next(beside)}, member.data)
    return writer.finish(shard_name(number))


def sheet(place: Place) -> Image.Image:
    """The first samples of a finished job on one picture."""
    if place.format == "png":
        return Image.open(io.BytesIO(place.store.get(SHEET)))
    if place.format == "webdataset":
        count = min(MAX_SHEET, Manifest.load(place.store).num_samples)
        return _grid(read_samples(place.store.url(), range(count)).numpy())
    with zipfile.ZipFile(io.BytesIO(place.store.get(place.name))) as archive, archive.open("images.npy") as array:
        np.lib.format.read_magic(array)
        (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(array)
        count = min(MAX_SHEET, count)
        values = np.frombuffer(array.read(count * math.prod(shape) * dtype.itemsize), dtype).reshape(count, *shape)
    return _grid(values.transpose(0, 3, 1, 2) if dtype == np.uint8 else values)


def _grid(samples: np.ndarray) -> Image.Image:
    """A sheet of pictures uint8 [N, C, H, W], or of arrays in units of their own by a colour map."""
    return picture_grid(samples if samples.dtype == np.uint8 else field_pictures(samples))


def _array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> IO[bytes]:
    """An array of an npz, to be written in parts; without a time of day in it."""
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    out = archive.open(entry, "w", force_zip64=True)
    header: dict[str, Any] = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out


def _arrays(store: Store, plan: SamplePlan, packed: PackedShard) -> Iterator[np.ndarray]:
    """The samples of a shard: uint8 [H, W, C] or float32."""
    for data, code in _members(store, packed, record_of(plan.fields)):
        yield decode(data, code, plan.shape, np.dtype(plan.dtype), partial(store.url, packed.shard.name))


def _members(store: Store, packed: PackedShard, record: np.dtype) -> Iterator[tuple[bytes, int]]:
    """(encoded sample, format) of a shard whose bytes are what was put: of each sample the first member that its
    `record` knows. Raises DataError."""
    data = store.get(packed.shard.name)
    if hashlib.sha256(data).hexdigest() != packed.shard.sha256:
        raise DataError(f"{store.url(packed.shard.name)}: was changed since it was made; remove it and run again")
    records = np.frombuffer(packed.records, record)
    found = (records[name].reshape(len(records), -1)[:, 0].tolist() for name in ("offset", "size", "format"))
    for start, size, code in zip(*found, strict=True):
        yield data[start : start + size], code
