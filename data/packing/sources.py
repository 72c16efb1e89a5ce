"""What can be packed: `.npz`, IDX (`.gz` or not) and image folders (here or in S3), each read by sample number."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from scoreray.data.errors import DataError, StorageError, UserError, nearest
from scoreray.data.packing.arrays import Loaded, as_floats, as_images, read_idx, read_npz
from scoreray.data.packing.commit import map_in_threads
from scoreray.data.packing.identity import content_marks, digest_of
from scoreray.data.packing.layout import Layout
from scoreray.data.packing.listing import Listing, kinds_line, list_below, shown, some_of, suffix_of
from scoreray.data.reading.classes import in_order
from scoreray.data.reading.manifest import check_label, check_shape
from scoreray.data.reading.pictures import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    as_array,
    fit,
    is_grey,
    looks_like_a_picture,
    open_picture,
)
from scoreray.data.storage.interface import NotAFile
from scoreray.data.storage.paths import check_is_file, mode_of
from scoreray.data.storage.store import PathStore, Store, local_path, open_store

GET_THREADS = 16  # images that are fetched from S3 at once, by one maker of shards
LOOKED_AT = 32  # images of a folder that are looked at for colours


@dataclass(frozen=True)
class Reading:
    """How the samples of a source are read. `channels`: 1 or 3, None as most images of a folder are. `labelled`:
    subfolders, or the labels beside the samples, are classes. `layout`: of arrays with four axes, None as their shape
    says."""

    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    labelled: bool = True
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and not 1 <= self.image_size <= 8192:
            raise UserError(f"--image-size {self.image_size}: between 1 and 8192 is needed")
        if self.channels not in (None, 1, 3):
            raise UserError(f"--channels {self.channels}: 1 (grey) or 3 (RGB) is needed")
        if self.layout not in (None, *get_args(Layout)):
            raise UserError(f"--layout {self.layout}: {nearest(str(self.layout), get_args(Layout))}")


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
    reading: Reading
    array: np.ndarray | None = field(default=None, repr=False)
    files: list[str] = field(default_factory=list, repr=False)
    marks: dict[str, str] = field(default_factory=dict, repr=False)
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def check_here(self) -> None:
        """Raises UserError or DataError when this process does not see the source."""
        if self.files:
            store = open_store(self.path)
            for name in {self.files[0], self.files[-1]} - self.unreadable.keys():
                if not store.exists(name):
                    raise UserError(f"{shown(self.path, name)}: there is no such file")
        elif self.array is None:
            _again(self.path, self.reading, self.fingerprint)

    def check_readable(self, skip_bad: int) -> None:
        """Raises DataError where more of the files are known to be unreadable than may be left out."""
        if len(self.unreadable) > skip_bad:
            name, why = next(iter(self.unreadable.items()))
            count = f"{len(self.unreadable):,} files can't be read, --skip-bad is {skip_bad}; the first: "
            raise DataError(
                f"{count if skip_bad else ''}{shown(self.path, name)}: {why}; fix or remove it, or --skip-bad N "
                "leaves out up to N such files"
            )

    def read_all(self, numbers: Iterable[int]) -> Iterator[np.ndarray | DataError]:
        """The samples, in order; in place of one that can't be read, why."""
        remote = self.files and open_store(self.path).is_remote
        return map_in_threads(GET_THREADS, self._try, numbers) if remote else map(self._try, numbers)

    def _try(self, number: int) -> np.ndarray | DataError:
        try:
            return self.read(number)
        except DataError as error:
            return error
        except NotAFile as error:
            return DataError(str(error))

    def read(self, number: int) -> np.ndarray:
        """Sample `number`: uint8 [H, W, C] or the float32 array. Raises DataError, UserError naming the file."""
        size = self.reading.image_size
        if self.files:
            name = shown(self.path, self.files[number])
            if self.files[number] in self.unreadable:
                raise DataError(f"{name}: {self.unreadable[self.files[number]]}")
            picture = open_picture(open_store(self.path).get(self.files[number]), name)
            return as_array(picture, self.shape, size, name, to_grey=self.reading.channels == 1)
        array = self.array if self.array is not None else _again(self.path, self.reading, self.fingerprint)
        if self.dtype == "float32":
            return np.ascontiguousarray(array[number], np.float32)
        image = array[number]
        if size and image.shape[:2] != (size, size):
            squeezed = image[:, :, 0] if image.shape[2] == 1 else image
            image = np.asarray(fit(Image.fromarray(squeezed), size))
            image = image[:, :, None] if image.ndim == 2 else image
        return image


@lru_cache(maxsize=1)
def _again(path: str, reading: Reading, fingerprint: str) -> np.ndarray:
    """The array of a source that another process opened."""
    source = open_source(path, reading)
    if source.fingerprint != fingerprint or source.array is None:
        raise UserError(f"{path}: is not what it was when the packing began")
    return source.array


def open_source(path: str | os.PathLike[str], reading: Reading = Reading()) -> Source:
    """The source at `path`, by its kind. Raises UserError or DataError with one line that names the file."""
    where = local_path(path)
    if where is None:
        return _open_folder(open_store(path), reading)
    mode = mode_of(where)
    if not mode:
        raise UserError(f"{where}: there is no such file or folder to pack")
    if stat.S_ISDIR(mode):
        return _open_folder(PathStore(str(where)), reading)
    check_is_file(where, mode)
    name = where.name.removesuffix(".gz")
    if name.endswith(".npz"):
        return _of_arrays(where, read_npz(where, reading.labelled), reading)
    if "idx" in name and ("ubyte" in name or name.endswith("idx")):
        return _of_arrays(where, read_idx(where, reading.labelled), reading)
    raise UserError(
        f"{where}: can't tell what this is; accepted: .npz with 'images' (and 'labels'), IDX (*-idx3-ubyte[.gz]), "
        "a folder with one subfolder of images a class, or a folder of WebDataset tars"
    )


def _of_arrays(path: Path, loaded: Loaded, reading: Reading) -> Source:
    samples, labels, classes = loaded.samples, loaded.labels, loaded.classes
    num_samples = len(samples) if samples.ndim else 0
    _check_classes(str(path), classes)
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
    array, shape, notes = read(path, samples, reading)
    fingerprint = hashlib.sha256(repr((samples.shape, samples.dtype.str, classes)).encode())
    fingerprint.update(np.ascontiguousarray(samples).data)
    fingerprint.update(b"" if labels is None else labels.tobytes())
    dtype = "uint8" if array.dtype == np.uint8 else "float32"
    return Source(
        str(path), num_samples, shape, dtype, labels, classes, fingerprint.hexdigest(), reading, array=array,
        left_out=dict.fromkeys(loaded.left_out, 1), notes=(*notes, *loaded.notes),
    )  # fmt: skip


def _open_folder(store: Store, reading: Reading) -> Source:
    """Images below a folder or prefix. If all lie in subfolders, the first level names the class."""
    listing = list_below(store)
    pictures = _pictures(store, list(listing.files))
    sizes = {name: size for name, size in listing.files.items() if name in pictures}
    left_out = Counter(suffix_of(name) or "no suffix" for name in listing.files if name not in sizes)
    unreadable = _unreadable(store.url(), listing, left_out)
    if not sizes:
        there = f"; it holds {kinds_line(left_out)}" if left_out else ""
        raise UserError(f"{store.url()}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}), and no tars{there}")
    files = sorted([*sizes, *unreadable])
    classes, labels = _classes_of(store, files) if reading.labelled else ([], None)
    shape = _look(store, list(sizes), reading)
    marks = {**content_marks(store, sizes), **unreadable}
    return Source(
        store.url(), len(files), shape, "uint8", labels, classes, digest_of(marks), reading, files=files, marks=marks,
        unreadable=unreadable, left_out=dict(left_out), notes=_notes(store.url(), listing, left_out, classes),
    )  # fmt: skip


def _unreadable(url: str, listing: Listing, left_out: Counter[str]) -> dict[str, str]:
    """What is called like a picture and can't be one, and why; what else is no file is counted in `left_out`. Raises
    DataError for a broken link that may have led to a class."""
    found = {}
    for name, to in listing.broken.items():
        found[name] = f"is a broken link, to {shown(to)}"
        if not name.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(
                f"{shown(url, name)}: {found[name]}; restore what it leads to, as it may be a folder of images, or "
                "remove it"
            )
    for name, kind in listing.special.items():
        if name.lower().endswith(IMAGE_SUFFIXES):
            found[name] = f"is {kind}, no file"
        else:
            left_out[kind.rpartition(" ")[2]] += 1
    return found


def _pictures(store: Store, names: list[str]) -> set[str]:
    """Of these files, those that are pictures by their suffix or, where they have none, by their first bytes."""
    unnamed = [name for name in names if not suffix_of(name)]

    def is_one(number: int) -> bool:
        try:
            return looks_like_a_picture(store.get(unnamed[number], 0, HEAD_BYTES))
        except StorageError:  # gone, not to be read, or no file: left out, as others that are no pictures
            return False

    found = (
        map_in_threads(GET_THREADS, is_one, range(len(unnamed)))
        if store.is_remote
        else map(is_one, range(len(unnamed)))
    )
    by_content = {name for name, picture in zip(unnamed, found, strict=True) if picture}
    return by_content | {name for name in names if name.lower().endswith(IMAGE_SUFFIXES)}


def _notes(url: str, listing: Listing, left_out: Counter[str], classes: list[str]) -> tuple[str, ...]:
    """Lines about what lies in the folder and is not packed."""
    empty, notes = sorted(set(listing.folders) - set(classes)), []
    if left_out:
        notes.append(f"{left_out.total():,} files that are no images are left out ({kinds_line(left_out)})")
    if classes and empty:
        notes.append(f"{len(empty):,} folders hold no images and become no class: {some_of(empty)}")
    if listing.loops:
        notes.append(
            f"{len(listing.loops):,} links to a folder that they lie in are not followed: {some_of(listing.loops)}"
        )
    return tuple(f"{url}: {note}" for note in notes)


def _classes_of(store: Store, files: list[str]) -> tuple[list[str], np.ndarray | None]:
    loose = [name for name in files if "/" not in name]
    if len(loose) == len(files):
        return [], None
    if loose:
        raise UserError(
            f"{store.url()}: {len(loose)} images lie beside the folders of the classes "
            f"({shown(store.url(), loose[0])}); move them into one, or --no-classes packs all without classes"
        )
    tops = [name.split("/", 1)[0] for name in files]
    classes = in_order(tops)
    _check_classes(store.url(), classes)
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[top] for top in tops], np.int64)


def _check_classes(path: str, classes: list[str]) -> None:
    for name in classes:
        if not name.isprintable() or not 0 < len(name) <= 255:  # bytes that are not UTF-8 are not printable
            raise UserError(f"{path}: {ascii(name)[:300]} can't be the name of a class; rename it, or --no-classes")


def _look(store: Store, files: list[str], reading: Reading) -> tuple[int, int, int]:
    """(C, H, W) of the images in a folder, from some of them: grey only if all of these are. Raises DataError when
    none of these can be read, UserError when a size is needed."""
    some = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(LOOKED_AT, len(files))).astype(int))]
    images, problems = [], []
    for name in some:
        try:
            images.append((name, open_picture(store.get(name), shown(store.url(), name))))
        except (DataError, NotAFile) as error:
            problems.append(error)
    if not images:
        raise problems[0]
    channels = reading.channels or (1 if all(is_grey(image) for _, image in images) else 3)
    name, first = images[0]
    width, height = (reading.image_size, reading.image_size) if reading.image_size else first.size
    if width != height:
        raise UserError(f"{shown(store.url(), name)}: {width} x {height} pixels; give --image-size to crop to a square")
    return channels, height, width
