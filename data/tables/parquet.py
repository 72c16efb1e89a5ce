"""Parquet files, and folders of the `datasets` library (Hugging Face): parquet or `save_to_disk`'s arrow files.

They are read with pyarrow alone; what the library writes into a file's metadata says which columns are pictures, and
the names of classes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.sources.field_options import FieldOption
from scoreray.data.sources.identity import identity
from scoreray.data.sources.labels import LABELS
from scoreray.data.sources.listing import is_hidden, shown, some_of
from scoreray.data.storage.store import Store, open_store
from scoreray.data.tables.files import named_files, open_file
from scoreray.data.tables.kinds import Column
from scoreray.data.tables.source import StoredTable
from scoreray.data.tables.values import Values
from scoreray.data.threads import map_in_threads

ARROW_SUFFIXES = (".parquet", ".arrow")
SPLITS = re.compile(r"(?:^|/)(train|test|validation|valid|val|dev)(?=[-._/])")
BATCH_BYTES = 16 << 20  # of a row group that are unpacked at once
FOOTER_THREADS = 16  # files whose footers are read at once


@dataclass(frozen=True, kw_only=True)
class ArrowTable(StoredTable):
    """A `Table` of parquet or arrow files. runs: of each run (row group, record batch) its file, and its number, or
    the byte at which it begins."""

    runs: Sequence[tuple[str, int]] = field(repr=False)

    def read(self, columns: Sequence[str], rows: np.ndarray) -> Mapping[str, Values]:
        run = int(np.searchsorted(self.starts, rows[0], "right")) - 1
        name, place = self.runs[run]
        wanted = rows - self.starts[run]
        found: dict[str, list[Any]] = {column: [] for column in columns}
        first = 0
        with _explained(self.store, name):
            for batch in _batches(self.store, name, place, columns):
                low, high = np.searchsorted(wanted, (first, first + batch.num_rows))
                part = batch.take(pa.array(wanted[low:high] - first))
                for column in columns:
                    found[column] += _values(part.column(column))
                first += batch.num_rows
                if high == len(wanted):
                    break
        return found


def open_parquet(url: str) -> ArrowTable:
    """The table in a file, in those that a pattern names (`URL/train-*.parquet`), or in those of a folder. Raises
    UserError for a folder of several splits, DataError, StorageError."""
    store, names = _files(url)
    is_parquet = names[0].endswith(".parquet")

    def look(number: int) -> _Layout:
        with _explained(store, names[number]):
            return _parquet_layout(store, names[number]) if is_parquet else _arrow_layout(store, names[number])

    layouts = list(map_in_threads(FOOTER_THREADS, look, range(len(names))))
    schema = layouts[0].schema
    for name, layout in zip(names, layouts, strict=True):
        if not layout.schema.equals(schema, check_metadata=False):
            raise DataError(
                f"{shown(store.url(name))}: its columns are not those of {shown(names[0])} "
                f"({some_of(_differences(schema, layout.schema))}); pack them as two data sets"
            )
    runs = [(name, place) for name, layout in zip(names, layouts, strict=True) for place in layout.places]
    counts = np.array([count for layout in layouts for count in layout.counts], np.int64)
    starts = np.cumsum(counts) - counts
    features = _features(schema)
    columns = {one.name: _column(one.type, features.get(one.name, {})) for one in schema}
    known = set(names)
    prefix = os.path.commonprefix(names)  # noqa: RUF071 (of keys)
    sizes = {name: size for name, size in store.list(prefix) if name in known}
    runs = [run for run, count in zip(runs, counts, strict=True) if count]
    return ArrowTable(
        url=url, num_rows=int(counts.sum()), columns=columns, starts=starts[counts > 0],
        fingerprint=identity(store, sizes), default=_default(schema, columns),
        is_random=not (is_parquet or store.is_remote), num_bytes=sum(sizes.values()), store=store, runs=runs,
    )  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Of a file: the rows of each run, and its number or the byte at which it begins."""

    schema: pa.Schema
    counts: list[int]
    places: list[int]


def _files(url: str) -> tuple[Store, list[str]]:
    """(the folder's store, the keys of its parquet files, or where it has none of its arrow files)."""
    if url.endswith(ARROW_SUFFIXES):
        store, found = named_files(url)
    else:
        store = open_store(url)
        found = [key for key, _ in store.list() if not is_hidden(key)]
    parquet = sorted(key for key in found if key.endswith(ARROW_SUFFIXES[0]))
    arrow = [
        key for key in found if key.endswith(ARROW_SUFFIXES[1]) and not key.rpartition("/")[2].startswith("cache-")
    ]
    names = parquet or sorted(arrow)
    if not names:
        raise UserError(f"{shown(url)}: there are no such files; *.parquet or *.arrow are read")
    splits = sorted({match[1] for name in names if (match := SPLITS.search(name))})
    if len(splits) > 1:
        first = next(name for name in names if SPLITS.search(name))
        at = SPLITS.search(first).end()  # type: ignore[union-attr]
        one = first[:at] if first[at] == "/" else f"{first[:at]}-*{os.path.splitext(first)[1]}"
        raise UserError(f"{url}: holds the splits {', '.join(splits)}; give one of them, such as {store.url()}/{one}")
    return store, names


def _parquet_layout(store: Store, name: str) -> _Layout:
    with open_file(store, name) as file:
        about = pq.ParquetFile(file)
        counts = [about.metadata.row_group(i).num_rows for i in range(about.num_row_groups)]
        return _Layout(about.schema_arrow, counts, list(range(len(counts))))


def _arrow_layout(store: Store, name: str) -> _Layout:
    """The record batches of a file in arrow's format of streams, which has no index, or in that of files, which begins
    with a stream after a word of 8 bytes. Of one on this machine the batches' bytes are not read."""
    with _arrow_file(store, name) as file:
        start = 8 if file.read(6) == b"ARROW1" else 0
        file.seek(start)
        messages = pa.ipc.MessageReader.open_stream(file)
        schema, places, counts = pa.ipc.read_schema(messages.read_next_message()), list[int](), list[int]()
        while True:
            place = file.tell()
            try:
                message = messages.read_next_message()
            except StopIteration:
                return _Layout(schema, counts, places)
            if message.type != "record batch":
                raise DataError(f"{store.url(name)}: has columns of dictionaries, which are not read; write parquet")
            places.append(place)
            counts.append(pa.ipc.read_record_batch(message, schema).num_rows)


def _arrow_file(store: Store, name: str) -> Any:
    if store.is_remote:
        return pa.PythonFile(open_file(store, name), "r")
    return pa.memory_map(f"{store.root}/{name}")


def _batches(store: Store, name: str, place: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a run, of these columns at least, some BATCH_BYTES at a time."""
    if name.endswith(".arrow"):
        schema = _schema(store, name)
        with _arrow_file(store, name) as file:
            file.seek(place)
            yield pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
        return
    with open_file(store, name) as file:
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        group = parquet.metadata.row_group(place)
        rows = max(1, min(group.num_rows, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
        yield from parquet.iter_batches(rows, row_groups=[place], columns=list(columns))


@lru_cache(maxsize=64)
def _schema(store: Store, name: str) -> pa.Schema:
    with _arrow_file(store, name) as file:
        file.seek(8 if file.read(6) == b"ARROW1" else 0)
        return pa.ipc.read_schema(pa.ipc.read_message(file))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the `datasets` library wrote of each column; of another writer's file nothing."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: one for name, one in about.items() if isinstance(one, dict)} if isinstance(about, dict) else {}


def _column(kind: pa.DataType, feature: Mapping[str, Any]) -> Column:
    says, names, shape = feature.get("_type"), feature.get("names"), feature.get("shape")
    if says == "ClassLabel" and isinstance(names, list):
        return Column(kind="class", classes=tuple(map(str, names)))
    if says == "Image":
        return Column(kind="image")
    if isinstance(shape, list) and shape and all(isinstance(length, int) and length > 0 for length in shape):
        return Column(tuple(shape), "array")  # Array2D to Array5D
    kind = _plain_type(kind)
    lengths = list[int | None]()
    while isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        lengths.append(kind.list_size if isinstance(kind, pa.FixedSizeListType) else None)
        kind = _plain_type(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Column(tuple(filter(None, lengths)) if None not in lengths else None)
    if lengths or pa.types.is_struct(kind) or pa.types.is_map(kind):
        is_file = not lengths and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return Column() if is_file else Column(kind="json")
    if _is_text(kind) or _is_binary(kind):
        return Column()
    return Column(refused=f"is of type {kind}, which can't be a field; numbers, text, bytes and lists of numbers can")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Without the names that libraries give to types, and without dictionaries."""
    while isinstance(kind, pa.BaseExtensionType | pa.DictionaryType):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return kind


def _default(schema: pa.Schema, columns: Mapping[str, Column]) -> list[FieldOption]:
    """The first column of pictures, or without one the first of arrays, and the one of classes."""
    pictures = [name for name, column in columns.items() if column.kind == "image"]
    pictures += [one.name for one in schema if columns[one.name] == Column() and not _is_text(_plain_type(one.type))]
    pictures = [name for name in pictures if not _is_numbers(schema.field(name).type)]
    arrays = [name for name, column in columns.items() if column.kind == "array"]
    chosen = [*(FieldOption("image", name) for name in pictures), *(FieldOption("array", name) for name in arrays)][:1]
    classes = [name for name, column in columns.items() if column.kind == "class"]
    classes += [name for name in LABELS if name in columns and columns[name].shape == ()]
    return [*chosen, *(FieldOption("label", name, kind="class") for name in classes[:1])] if chosen else []


def _values(array: pa.Array) -> list[Any]:
    """One value a row; None where there is none."""
    while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    if not _is_numbers(array.type):
        return array.to_pylist()
    values = list(_numbers(array))
    if array.null_count:
        values = [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


def _is_numbers(kind: pa.DataType) -> bool:
    kind = _plain_type(kind)
    while isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        kind = _plain_type(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _numbers(array: pa.Array) -> np.ndarray | list[Any]:
    """[N, ...] of numbers or of nested lists of them, where all are of the same lengths; else a list of N arrays. A row
    that has no value is 0, or empty; a number that is missing in a list is NaN."""
    while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    if not isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        filled = array if pa.types.is_floating(array.type) else array.fill_null(0)
        return filled.to_numpy(zero_copy_only=False)
    within = _numbers(array.flatten())
    lengths = pc.list_value_length(array).fill_null(0).to_numpy()
    if isinstance(within, np.ndarray) and len(lengths) and (lengths == lengths[0]).all() and lengths[0]:
        return within.reshape(len(lengths), lengths[0], *within.shape[1:])
    ends = np.cumsum(lengths)
    return [_stacked(within[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def _stacked(rows: Any) -> Any:
    return np.stack(rows) if isinstance(rows, list) and len({row.shape for row in rows}) == 1 else rows


def _differences(one: pa.Schema, other: pa.Schema) -> list[str]:
    names = [*one.names, *(name for name in other.names if name not in one.names)]
    return [n for n in names if n not in one.names or n not in other.names or one.field(n).type != other.field(n).type]


@contextmanager
def _explained(store: Store, name: str) -> Iterator[None]:
    """What pyarrow raises on bytes that it can't read, as a DataError."""
    try:
        yield
    except ScorerayError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{shown(store.url(name))}: can't be read: {' '.join(str(error).split())}") from error
