"""Arrays that hold samples: an `.npz` or an IDX file with its labels, as images [N, H, W, C] or floats [N, C, ...]."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from scoreray.data.errors import DataError, UserError
from scoreray.data.sources.labels import LABELS, as_numbers, beside_idx, choose_arrays, of_nist, samples_name
from scoreray.data.sources.layout import Layout, channels_first, has_channels_first, is_given, order_of
from scoreray.data.sources.listing import some_of
from scoreray.data.sources.options import SourceOptions

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class LoadedArrays:
    """What a file holds. samples: [N, ...].  labels: whole numbers [N] or None.  classes: their names, if it has them.
    left_out: names of arrays that are not used.  notes: lines about that for a person."""

    samples: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, type) of the .npy that begins here."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def is_table(path: Path) -> bool:
    """Whether an archive is packed as a table of arrays, not by `read_npz`: none of its arrays is called as samples
    are, or it is of integers that are no pixels. Of a damaged one, or no file, others say what is wrong."""
    if not path.is_file():  # a FIFO would be waited for
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            chosen = samples_name(names)
            if chosen is None:
                return bool(names)
            with archive.open(f"{chosen}.npy") as file:
                dtype = npy_header(file)[2]
            return dtype.kind in "iub" and dtype != np.uint8
    except Exception:  # what zipfile and numpy raise on damaged bytes is not a short list
        return False


def read_npz(path: Path, labelled: bool) -> LoadedArrays:
    """An archive's samples and labels. Raises UserError, DataError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            check_memory(path, sum(entry.file_size for entry in archive.zip.infolist()))
            arrays = choose_arrays(archive, archive.files, labelled)
            if arrays is None:
                raise UserError(
                    f"{path}: holds {', '.join(archive.files) or 'nothing'}; 'images' is needed, or --field"
                )
    except UserError:
        raise
    except Exception as error:  # what zipfile and numpy raise on damaged bytes is not a short list
        raise DataError(f"{path}: no readable .npz of plain arrays: {' '.join(str(error).split())}") from error
    labels, classes = as_numbers(path, arrays.labels, arrays.classes)
    sought = f"; labels are looked for as {', '.join(LABELS[:4])}, ..." if labels is None and labelled else ""
    note = f"{path}: arrays that are left out: {some_of(arrays.left_out)}{sought}"
    return LoadedArrays(arrays.samples, labels, classes, arrays.left_out, (note,) if arrays.left_out else ())


def read_idx(path: Path, labelled: bool) -> LoadedArrays:
    """MNIST's format, with the labels from the file beside it. Raises UserError, DataError naming the file."""
    labels_path, sought = beside_idx(path) if labelled else (None, "")
    found = _read_idx(labels_path) if labels_path else None
    labels = None if found is None else of_nist(found)
    notes = []
    if sought and labels_path is None:
        notes.append(f"{path}: no labels beside it ({sought}, .gz or not): packed without classes")
    if found is not labels:
        notes.append(f"{labels_path}: the first column is the class, the others are left out")
    return LoadedArrays(_read_idx(path), as_numbers(path, labels, None)[0], [], notes=tuple(notes))


def _read_idx(path: Path) -> np.ndarray:
    """Not more is unpacked than the header says, whatever follows it."""
    try:
        with open(path, "rb") as raw:
            is_zipped = raw.read(2) == b"\x1f\x8b"  # whatever the name says: browsers unpack, people rename
        with gzip.open(path) if is_zipped else open(path, "rb") as file:
            zero, kind, rank = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{rank}I", file.read(4 * rank))
            dtype = np.dtype(IDX_TYPES[kind])
            size = math.prod(shape) * dtype.itemsize
            check_memory(path, size)
            data = file.read(size + 1)
        if zero or rank == 0 or len(data) != size:
            raise ValueError("its length is not what its header says")
        return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except UserError:
        raise
    except (struct.error, KeyError, ValueError, OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise DataError(f"{path}: no readable IDX file: {error}") from error


def check_memory(path: Path | str, size: int) -> None:
    """Raises UserError when `size` bytes, which a small file may announce, are more than this machine has."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > has // 2:
        raise UserError(
            f"{path}: {size:,} bytes unpacked, half of this machine's memory is {has // 2:,}; pack it in parts, or as "
            "a folder of files"
        )


ShapedArrays = tuple[np.ndarray, tuple[int, ...], tuple[str, ...]]  # [N, ...] as packed, a sample's shape, notes


def as_images(path: Path, images: np.ndarray, options: SourceOptions) -> ShapedArrays:
    """uint8 as [N, H, W, C]."""
    fitting = options.fitting
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and options.layout != "NCHW" and images.shape[3] in (1, 3):
        pass
    elif images.ndim == 4 and options.layout != "NHWC" and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    else:
        given = f" (--layout {options.layout})" if options.layout else ""
        raise UserError(
            f"{path}: images of shape {images.shape}{given}; [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3"
        )
    height, width, channels = images.shape[1:]
    if fitting is None and height != width:
        raise UserError(f"{path}: images of {height} x {width}; give --image-size to crop them to a square")
    if options.channels not in (None, channels):
        raise UserError(f"{path}: --channels {options.channels} is for folders of images; this has {channels}")
    return images, (channels, fitting.height, fitting.width) if fitting else (channels, height, width), ()


def as_floats(path: Path, arrays: np.ndarray, options: SourceOptions) -> ShapedArrays:
    """Floats as [N, C, ...]."""
    if arrays.dtype.kind != "f":
        raise UserError(f"{path}: samples are {arrays.dtype}; uint8 images or float arrays are packed")
    if options.image_size or options.channels:
        raise UserError(
            f"{path}: {arrays.dtype} {arrays.shape}; floats are packed as they are, [N, D, ...], without --image-size "
            "or --channels"
        )
    largest = np.finfo(np.float32).max
    for start in range(0, len(arrays), 1024):  # at once it would take as much memory again
        part = arrays[start : start + 1024]
        bad = ~(np.abs(part) <= largest)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            what = "that is not finite" if not np.isfinite(part[at]) else f"above the largest float32: {part[at]:.3g}"
            raise UserError(f"{path}: sample {start + at[0]} holds a value {what}")
    if options.layout and not is_given(options.layout, arrays.ndim - 1):
        raise UserError(
            f"{path}: --layout {options.layout} is for arrays of {len(options.layout)} axes, this has {arrays.ndim}"
        )
    layout = order_of(str(path), arrays.shape[1:], options.layout)
    arrays = channels_first(arrays, layout)
    shape, note = " x ".join(map(str, arrays.shape[1:])), points_note(str(path), arrays.shape[1:], options.layout)
    if not has_channels_first(layout) and not options.layout:
        note = (f"{path}: arrays with their channels last become [C, H, W] = {shape}",)
    return arrays, arrays.shape[1:], note


def points_note(name: str, shape: Sequence[int], layout: Layout | None) -> tuple[str, ...]:
    """A line about samples [D] that might be signals."""
    if len(shape) != 1 or layout is not None:
        return ()
    return (f"{name}: samples are points of {shape[0]:,} numbers; --layout NT packs signals [1, {shape[0]}]",)
