"""Files of named arrays whose first axis is the samples' (.npy, .npz, HDF5, NetCDF, Zarr) as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.sources.field_options import FieldOption
from scoreray.data.sources.identity import identity
from scoreray.data.sources.labels import LABELS, samples_name
from scoreray.data.sources.listing import shown, some_of
from scoreray.data.storage.store import Store, open_store
from scoreray.data.tables.array_formats import Variable, arrays_of
from scoreray.data.tables.files import named_files
from scoreray.data.tables.kinds import Column
from scoreray.data.tables.source import StoredTable
from scoreray.data.tables.values import Values, is_pixels

ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".hdf", ".nc", ".nc4", ".cdf")
WINDOW_BYTES = 8 << 20  # of a variable that are read at once, unless a chunk is larger
MOST_BYTES = 64 << 20  # of a chunk's rows that are in memory at once


@dataclass(frozen=True, kw_only=True)
class ArraysTable(StoredTable):
    """A `Table` of the arrays in one file, or in several, one after the other. firsts: first row of each file."""

    files: Sequence[str]
    firsts: np.ndarray = field(repr=False)

    def read(self, columns: Sequence[str], rows: np.ndarray) -> Mapping[str, Values]:
        number = int(np.searchsorted(self.firsts, rows[0], "right")) - 1
        name, places = self.files[number], rows - self.firsts[number]
        with _explained(self.store, name):
            arrays = arrays_of(self.store, name)
            return {column: _rows(arrays[column], places) for column in columns}


def _rows(variable: Variable, places: np.ndarray) -> list[Any]:
    """The rows at `places`, ascending; of a part of MOST_BYTES all between the first and the last are read."""
    row_bytes = max(1, variable.num_bytes // max(1, variable.shape[0]))
    step = max(1, MOST_BYTES // row_bytes)
    found: list[Any] = []
    for part in np.split(places, np.flatnonzero(np.diff(places // step)) + 1):
        low, high = int(part[0]), int(part[-1]) + 1
        found += list(variable.rows(low, high)[part - low])
    return found


def open_arrays(url: str) -> ArraysTable:
    """The table of a file, of those that a pattern names (`URL/*.nc`), or of a Zarr folder. Raises
    UserError, DataError, StorageError."""
    arrays_of.cache_clear()  # a file may be another one by now
    store, names = _files(url)
    counts, columns, chunks, is_random = list[int](), dict[str, Column](), list[int](), not store.is_remote
    for name in names:
        with _explained(store, name):
            arrays = arrays_of(store, name)
        if not arrays:
            raise UserError(f"{shown(store.url(name) if name else store.url())}: holds no arrays")
        largest = max(arrays.values(), key=lambda one: one.num_bytes if one.shape else -1)
        counts.append(largest.shape[0] if largest.shape else 0)
        found = {key: _column(one, counts[-1]) for key, one in arrays.items()}
        if columns and _kinds(found) != _kinds(columns):
            differ = [key for key in {**columns, **found} if found.get(key) != columns.get(key)]
            raise DataError(f"{shown(store.url(name))}: its arrays are not those of {names[0]}: {some_of(differ)}")
        columns = columns or found
        row_bytes = max(1, largest.num_bytes // max(1, counts[-1]))
        is_random = is_random and all(one.chunk == 1 for one in arrays.values())
        chunks.append(max(WINDOW_BYTES // row_bytes, *(one.chunk for one in arrays.values()), 1))
    firsts = np.cumsum(counts) - counts
    starts = [first + np.arange(0, count, chunk) for first, count, chunk in zip(firsts, counts, chunks, strict=True)]
    sizes = dict(store.list(names[0] if len(names) == 1 else ""))
    known = {name: size for name, size in sizes.items() if names == [""] or name in set(names)}
    return ArraysTable(
        url=url, num_rows=sum(counts), columns=columns, starts=np.concatenate(starts).astype(np.int64),
        fingerprint=identity(store, known), default=_default(columns, arrays_of(store, names[0])),
        is_random=is_random, num_bytes=sum(known.values()), store=store, files=names, firsts=firsts,
    )  # fmt: skip


def _column(variable: Variable, num_rows: int) -> Column:
    if not variable.shape or variable.shape[0] != num_rows:
        count = f"{variable.shape[0]:,} rows" if variable.shape else "no rows"
        return Column(refused=f"has {count}, and there are {num_rows:,} samples")
    kind = variable.data.dtype.kind
    if kind in "SUOT":
        return Column()
    if kind == "M":
        return Column(refused="holds dates, which can't be a field; numbers and text can")
    return Column((1,) * variable.is_grid + variable.shape[1:])


def _kinds(columns: Mapping[str, Column]) -> dict[str, Column]:
    return {name: column for name, column in columns.items() if not column.refused}


def _default(columns: Mapping[str, Column], arrays: Mapping[str, Variable]) -> list[FieldOption]:
    """The array that is called as samples are, or the only one of more than numbers, and the one of classes; or the
    only array, of a number a sample."""
    numbers = [name for name, column in columns.items() if not column.refused and column.shape is not None]
    several = [name for name in numbers if columns[name].shape]
    chosen = samples_name(several) or next((found[0] for found in (several, numbers) if len(found) == 1), None)
    if chosen is None:
        return []
    if not columns[chosen].shape:
        return [FieldOption("scalar", chosen)]
    by_name = {name.lower(): name for name in numbers}
    labels = [by_name[name] for name in LABELS if name in by_name and columns[by_name[name]].shape == ()]
    labels = [name for name in labels if arrays[name].data.dtype.kind in "iu"]
    first = arrays[chosen]
    is_image = first.data.dtype == np.uint8 and is_pixels(first.shape[1:])
    target = FieldOption("image", chosen) if is_image else FieldOption("array", chosen, kind="array")
    return [target, *(FieldOption("label", name, kind="class") for name in labels[:1])]


def _files(url: str) -> tuple[Store, list[str]]:
    """(a store, keys of its files); of a Zarr folder the store itself and the key ""."""
    return named_files(url) if url.lower().endswith(ARRAY_SUFFIXES) else (open_store(url), [""])


def is_zarr(store: Store) -> bool:
    """Whether a folder is a Zarr group or array."""
    return any(store.exists(name) for name in ("zarr.json", ".zgroup", ".zarray"))


@contextmanager
def _explained(store: Store, name: str) -> Iterator[None]:
    """What libraries raise on bytes that they can't read, as a DataError."""
    where = shown(store.url(name) if name else store.url())
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}" if where not in str(error) else str(error)) from error
    except ScorerayError:
        raise
    except Exception as error:  # of decoders of bytes from outside
        raise DataError(f"{where}: can't be read: {' '.join(str(error).split()) or type(error).__name__}") from error
