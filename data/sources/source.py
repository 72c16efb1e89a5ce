"""What can be packed: files of arrays by their names, and folders of images, each read by sample number."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from scoreray.data.buckets.sizes import Bucket, Size
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, plain_fields
from scoreray.data.fields.limits import check_label, check_shape
from scoreray.data.reading.pictures import as_array, fitted_pixels, open_picture, picture_size
from scoreray.data.sources.arrays import LoadedArrays, as_floats, as_images, read_idx, read_npz
from scoreray.data.sources.field_source import NO_PICTURE, Sample, as_sizes
from scoreray.data.sources.identity import digest_of
from scoreray.data.sources.image_folders import GET_THREADS, check_classes, read_image_folder
from scoreray.data.sources.listing import shown
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.interface import NotAFile
from scoreray.data.storage.paths import check_is_file, mode_of
from scoreray.data.storage.store import PathStore, Store, local_path, open_store
from scoreray.data.threads import map_in_threads

PICTURE_HEADER_BYTES = 64 << 10  # of a file, which mostly say how large its picture is
ReadArrays = Callable[[Path, bool], LoadedArrays]  # (file, whether its labels are read)
ARRAY_FILES: dict[str, tuple[re.Pattern[str], ReadArrays]] = {
    ".npz with 'images' (and 'labels')": (re.compile(r".*\.npz(\.gz)?"), read_npz),
    "IDX (*-idx3-ubyte[.gz])": (re.compile(r"(.*idx.*ubyte.*|.*ubyte.*idx.*|.*idx)(\.gz)?"), read_idx),
}
"""What messages call a kind of file -> the names that such files have, and what reads one. A new kind is a function in
a module of its own and a line here."""


@dataclass(frozen=True)
class Source:
    """Samples to pack. `shape` is (C, H, W) of images (`dtype` uint8), else an array's. `labels` int64 [N] or None.

    Either `array` holds all samples ([N, H, W, C] or [N, ...]) or `files` names them. Pickled, it leaves the array
    behind: another process reads it again, and sees that it is the same. `fingerprint`: of the contents; `marks`: of
    those of each of `files`. `unreadable`: those of `files` that are broken links or no files, and why. `left_out`:
    what is not used, by kind. `notes`: lines about it for a person.
    """

    path: str
    num_samples: int
    shape: tuple[int, ...]
    dtype: str
    labels: np.ndarray | None
    classes: list[str]
    fingerprint: str
    options: SourceOptions
    array: np.ndarray | None = field(default=None, repr=False)
    files: list[str] = field(default_factory=list, repr=False)
    marks: dict[str, str] = field(default_factory=dict, repr=False)
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    runs = None

    @property
    def fields(self) -> list[Field]:
        classes = [] if self.labels is None else self.classes
        return plain_fields(self.shape, self.dtype, classes, [0] * len(classes), [], [])

    def inputs(self, numbers: Sequence[int]) -> str:
        if not self.files:
            return self.fingerprint
        names = [self.files[number] for number in numbers]
        labels = [] if self.labels is None else self.labels[list(numbers)].tolist()
        parts = [self.shape, [(name, self.marks[name]) for name in names], labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def check_visible(self) -> None:
        """Raises UserError or DataError when this process does not see the source."""
        if self.files:
            store = open_store(self.path)
            for name in {self.files[0], self.files[-1]} - self.unreadable.keys():
                if not store.exists(name):
                    raise UserError(f"{shown(self.path, name)}: there is no such file")
        elif self.array is None:
            _again(self.path, self.options, self.fingerprint)

    def check_readable(self, skip_bad: int) -> None:
        """Raises DataError where more of the files are known to be unreadable than may be left out."""
        if len(self.unreadable) > skip_bad:
            name, why = next(iter(self.unreadable.items()))
            count = f"{len(self.unreadable):,} files can't be read, --skip-bad is {skip_bad}; the first: "
            raise DataError(
                f"{count if skip_bad else ''}{shown(self.path, name)}: {why}; fix or remove it, or --skip-bad N "
                "leaves out up to N such files"
            )

    def read_all(self, numbers: Iterable[int]) -> Iterator[Sample | DataError]:
        """The samples, in order; in place of one that can't be read, why."""
        remote = self.files and open_store(self.path).is_remote
        return map_in_threads(GET_THREADS, self._try, numbers) if remote else map(self._try, numbers)

    def picture_sizes(self) -> np.ndarray:
        if self.array is not None:
            return np.tile(np.array(self.array.shape[2:0:-1], np.int32), (self.num_samples, 1))
        store = open_store(self.path)
        size, numbers = partial(self._picture_size, store), range(self.num_samples)
        return as_sizes(map_in_threads(GET_THREADS, size, numbers) if store.is_remote else map(size, numbers))

    def _picture_size(self, store: Store, number: int) -> Size:
        """By the first bytes of the file, and all of it where these do not say it."""
        name = self.files[number]
        if name in self.unreadable:
            return NO_PICTURE
        for end in (PICTURE_HEADER_BYTES, None):
            try:
                return picture_size(store.get(name, 0, end), name)
            except (DataError, NotAFile):
                continue
        return NO_PICTURE

    def in_bucket(self, bucket: Bucket) -> Source:
        width, height = bucket.size
        return replace(self, options=replace(self.options, image_size=bucket), shape=(self.shape[0], height, width))

    def _try(self, number: int) -> Sample | DataError:
        try:
            array = self.read(number)
        except DataError as error:
            return error
        except NotAFile as error:
            return DataError(str(error))
        target = "image" if self.dtype == "uint8" else "array"
        return {target: array} if self.labels is None else {target: array, "label": int(self.labels[number])}

    def read(self, number: int) -> np.ndarray:
        """Sample `number`: uint8 [H, W, C] or the float32 array. Raises DataError, UserError naming the file."""
        fitting = self.options.fitting
        if self.files:
            name = shown(self.path, self.files[number])
            if self.files[number] in self.unreadable:
                raise DataError(f"{name}: {self.unreadable[self.files[number]]}")
            picture = open_picture(open_store(self.path).get(self.files[number]), name)
            return as_array(picture, self.shape, fitting, name, to_grey=self.options.channels == 1)
        array = self.array if self.array is not None else _again(self.path, self.options, self.fingerprint)
        if self.dtype == "float32":
            return np.ascontiguousarray(array[number], np.float32)
        return fitted_pixels(array[number], fitting, f"{self.path}: sample {number}")


@lru_cache(maxsize=1)
def _again(path: str, options: SourceOptions, fingerprint: str) -> np.ndarray:
    """The array of a source that another process opened."""
    source = open_source(path, options)
    if source.fingerprint != fingerprint or source.array is None:
        raise UserError(f"{path}: is not what it was when the packing began")
    return source.array


def open_source(path: str | os.PathLike[str], options: SourceOptions | None = None) -> Source:
    """The images or arrays at `path`, by its kind. Raises UserError or DataError with one line that names the file."""
    options, where = options or SourceOptions(), local_path(path)
    if where is None:
        return _of_folder(open_store(path), options)
    mode = mode_of(where)
    if not mode:
        raise UserError(f"{where}: there is no such file or folder to pack")
    if stat.S_ISDIR(mode):
        return _of_folder(PathStore(str(where)), options)
    check_is_file(where, mode)
    for pattern, read in ARRAY_FILES.values():
        if pattern.fullmatch(where.name):
            return _of_arrays(where, read(where, options.labelled), options)
    raise UserError(
        f"{where}: can't tell what this is; accepted: {', '.join(ARRAY_FILES)}, a folder with one subfolder of "
        "images a class, a folder of WebDataset tars, parquet, .npy, HDF5 (.h5), NetCDF (.nc), Zarr"
    )


def _of_folder(store: Store, options: SourceOptions) -> Source:
    found = read_image_folder(store, options)
    return Source(
        store.url(), len(found.files), found.shape, "uint8", found.labels, found.classes, digest_of(found.marks),
        options, files=found.files, marks=found.marks, unreadable=found.unreadable, left_out=found.left_out,
        notes=found.notes,
    )  # fmt: skip


def _of_arrays(path: Path, loaded: LoadedArrays, options: SourceOptions) -> Source:
    samples, labels, classes = loaded.samples, loaded.labels, loaded.classes
    num_samples = len(samples) if samples.ndim else 0
    check_classes(str(path), classes)
    if num_samples == 0:
        raise UserError(f"{path}: holds no samples")
    check_shape(str(path), samples.shape[1:])
    if labels is not None:
        if labels.shape != (num_samples,):
            raise UserError(
                f"{path}: {num_samples} samples, but labels of shape {labels.shape}; one a sample is needed"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UserError(
                f"{path}: labels must be whole numbers from 0, they are {labels.dtype}, from {labels.min()}"
            )
        check_label(int(labels.max()), str(path))
        labels = labels.astype(np.int64)
        if classes and int(labels.max()) >= len(classes):
            raise UserError(f"{path}: label {labels.max()}, but only {len(classes)} classes are named")
        classes = classes or [str(c) for c in range(int(labels.max()) + 1)]
    read = as_images if samples.dtype == np.uint8 else as_floats
    array, shape, notes = read(path, samples, options)
    fingerprint = hashlib.sha256(repr((samples.shape, samples.dtype.str, classes)).encode())
    fingerprint.update(np.ascontiguousarray(samples).data)
    fingerprint.update(b"" if labels is None else labels.tobytes())
    dtype = "uint8" if array.dtype == np.uint8 else "float32"
    return Source(
        str(path), num_samples, shape, dtype, labels, classes, fingerprint.hexdigest(), options, array=array,
        left_out=dict.fromkeys(loaded.left_out, 1), notes=(*notes, *loaded.notes),
    )  # fmt: skip
