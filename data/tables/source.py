"""Samples as rows of named columns: what parquet and arrow files, and files of arrays, have in common.

A `Table` gives the values of some of its columns for some of its rows; `TableSource` makes fields of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from scoreray.data.buckets.sizes import Bucket, Size
from scoreray.data.classes import in_order
from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.fields.field import Field
from scoreray.data.fields.limits import check_label
from scoreray.data.sources.arrays import points_note
from scoreray.data.sources.field_options import FieldOption, FieldOptions, option_for
from scoreray.data.sources.field_source import NO_PICTURE, Sample, as_sizes, in_size, only_picture
from scoreray.data.sources.layout import has_channels_first, is_of, order_of
from scoreray.data.sources.listing import shown, some_of
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.store import Store
from scoreray.data.tables.kinds import Column, field_of
from scoreray.data.tables.values import FieldColumn, Values, as_text, at_path, is_whole, raw_value

LOOKED_AT = 32  # rows that are looked at for kinds, shapes and colours
SMALL_BYTES = 256 << 20  # of a table that is read once for each shard, so that its rows are shuffled as a whole
ROWS_OF_PICTURES = 256  # that are read at once to see how large their pictures are
ROWS_AT_ONCE = 1 << 16  # of a column of classes, which is read whole


class Table(Protocol):
    """Rows of columns. `url`: of the file or folder.  starts: int64, first rows of the runs that are fetched and
    unpacked together (row groups, chunks), ascending from 0.  fingerprint: of the contents.  default: the fields that
    are packed where none is asked for.  is_random: a row by itself costs no more than among its neighbours.
    num_bytes: as it is stored."""

    @property
    def url(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def columns(self) -> Mapping[str, Column]: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def default(self) -> Sequence[FieldOption]: ...
    @property
    def is_random(self) -> bool: ...
    @property
    def num_bytes(self) -> int: ...

    def read(self, columns: Sequence[str], rows: np.ndarray) -> Mapping[str, Values]:
        """The values of these columns at these rows, ascending, of one run. Raises DataError, StorageError."""

    def file_at(self, path: str) -> bytes:
        """The bytes of a file that a value names, below the table's folder. Raises DataError, StorageError."""

    def row_name(self, row: int) -> str:
        """What messages call a row."""


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """What tables of files in one store have in common; the fields are those of `Table`."""

    url: str
    num_rows: int
    columns: Mapping[str, Column]
    starts: np.ndarray
    fingerprint: str
    default: Sequence[FieldOption]
    is_random: bool
    num_bytes: int
    store: Store

    def row_name(self, row: int) -> str:
        return f"row {row}"

    def file_at(self, path: str) -> bytes:
        return self.store.get(path)


OpenTable = Callable[[str], Table]
"""Opens the table at a URL: a module's function, so that another process can do the same."""


@dataclass(frozen=True)
class TableSource:
    """A FieldSource of a table's rows. Pickled, it leaves the table behind, and opens it again elsewhere.

    starts: of the table's runs; runs: these too, where a pack goes through them one by one.
    """

    path: str
    num_samples: int
    fields: Sequence[Field]
    asked: Sequence[FieldOption]
    columns: Sequence[tuple[str, ...]]
    fingerprint: str
    options: SourceOptions
    opens: OpenTable
    starts: np.ndarray = field(repr=False)
    runs: np.ndarray | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    @cached_property
    def _table(self) -> Table:
        table = _opened(self.opens, self.path)
        if table.fingerprint != self.fingerprint:
            _opened.cache_clear()
            raise UserError(f"{self.path}: is not what it was when the packing began")
        return table

    def inputs(self, numbers: Sequence[int]) -> str:
        return self.fingerprint

    def check_visible(self) -> None:
        """Raises UserError or DataError when this process does not see the source."""
        assert self._table

    def check_readable(self, skip_bad: int) -> None:
        """What can't be read is found while reading."""

    def picture_sizes(self) -> np.ndarray:
        """Of rows in their order, some at once; their values are read whole."""
        field = only_picture(self.fields, self.path)
        reader = self._readers()[list(self.fields).index(field)]

        def sizes() -> Iterator[Size]:
            for start, end in zip(self.starts.tolist(), [*self.starts[1:].tolist(), self.num_samples], strict=True):
                for first in range(start, end, ROWS_OF_PICTURES):
                    rows = np.arange(first, min(end, first + ROWS_OF_PICTURES))
                    values = self._table.read(reader.columns, rows)
                    for i, row in enumerate(rows.tolist()):
                        try:
                            stored = {name: values[name][i] for name in reader.columns}
                            yield reader.picture_size(stored, self._table.row_name(row))
                        except DataError:
                            yield NO_PICTURE

        return as_sizes(sizes())

    def in_bucket(self, bucket: Bucket) -> TableSource:
        options = replace(self.options, image_size=bucket)
        return replace(self, options=options, fields=in_size(self.fields, bucket))

    def read_all(self, numbers: Iterable[int]) -> Iterator[Sample | DataError]:
        """The samples, in order; in place of one that can't be read, or that lacks a field, why. Each run of rows is
        read once, whatever the order of `numbers`; in memory are the values of these samples, as they are stored."""
        rows, places = np.unique(np.fromiter(numbers, np.int64), return_inverse=True)
        names = list(dict.fromkeys(name for columns in self.columns for name in columns))
        stored: list[dict[str, Any]] = []
        for run in np.split(rows, np.searchsorted(rows, self.starts[1:])):
            if len(run):
                values = self._table.read(names, run)
                stored += [{name: values[name][i] for name in names} for i in range(len(run))]
        readers = self._readers()
        for place in places.tolist():
            yield _sample(readers, stored[place], self._table.row_name(int(rows[place])))

    def _readers(self) -> list[FieldColumn]:
        return [
            FieldColumn(field, asked, columns, self.path, self.options, self._table.file_at)
            for field, asked, columns in zip(self.fields, self.asked, self.columns, strict=True)
        ]


def _sample(readers: Sequence[FieldColumn], values: Mapping[str, Any], row: str) -> Sample | DataError:
    try:
        return {reader.field.name: reader.value(values, row) for reader in readers}
    except DataError as error:
        return error


@lru_cache(maxsize=4)
def _opened(opens: OpenTable, url: str) -> Table:
    return opens(url)


def open_table_source(opens: OpenTable, url: str, options: SourceOptions, asked: FieldOptions) -> TableSource:
    """The source that packs `asked`, or without it the table's default, from the table at a URL. Raises UserError for
    a column that is not there or makes no field, DataError, StorageError."""
    _opened.cache_clear()  # the file may be another one by now
    table = _opened(opens, url)
    if not table.num_rows:
        raise UserError(f"{table.url}: holds no samples")
    chosen, fields = _chosen(table, asked, options)
    columns = [_columns_of(table, one) for one in chosen]
    asked.check_names([field.name for field in fields], table.url)
    arrays = [one for one in fields if one.kind in ("image", "array")]
    if options.layout and not any(is_of(options.layout, one.shape) for one in arrays):
        raise UserError(
            f"--layout {options.layout} is for arrays of {len(options.layout)} axes, and none that is packed of "
            f"{table.url} has so many; --kind NAME=array makes arrays of lists of numbers"
        )
    rest = [name for name in table.columns if not any(name in one for one in columns)]
    notes: list[str] = []
    refused = [name for name in rest if table.columns[name].refused]
    if free := [name for name in rest if name not in refused]:
        take = option_for(free[0], free[0], (field.name for field in fields))
        notes.append(f"{table.url}: columns that no field takes: {some_of(free)}; {take}")
    if refused:
        first = f"{shown(refused[0])} {table.columns[refused[0]].refused}"
        notes.append(f"{table.url}: columns that no field can take: {some_of(refused)}; {first}")
    notes += [note for one in fields[:1] if one.kind == "array" for note in points_note(url, one.shape, options.layout)]
    runs = None if table.is_random or table.num_bytes <= SMALL_BYTES else table.starts
    return TableSource(
        url, table.num_rows, fields, chosen, columns, table.fingerprint, options, opens, table.starts, runs,
        tuple(notes), dict.fromkeys(rest, table.num_rows),
    )  # fmt: skip


def _chosen(table: Table, asked: FieldOptions, options: SourceOptions) -> tuple[list[FieldOption], list[Field]]:
    """What is packed, and its fields: the table's default, or what is asked for; then the default's image or array
    comes first where no such field is asked for, and its class last where no class is."""
    default = [one for one in _with_kinds(table.default, asked) if options.labelled or one.kind != "class"]
    taken = {one.name for one in asked.fields} | {one.where for one in asked.fields}
    named = list(asked.fields) or default
    fields = _fields(table, named, options)
    if asked.fields:
        kinds = {field.kind for field in fields}
        free = [one for one in default if not {one.name, one.where} & taken]
        first = [one for one in free if one.kind != "class" and not kinds & {"image", "array"}][:1]
        last = [one for one in free if one.kind == "class" and "class" not in kinds]
        named = [*first, *named, *last]
        fields = [*_fields(table, first, options), *fields, *_fields(table, last, options)]
    if not named:
        raise UserError(
            f"{table.url}: say which columns are packed: --field NAME=COLUMN; it has {some_of(list(table.columns))}"
        )
    return named, fields


def _fields(table: Table, chosen: Sequence[FieldOption], options: SourceOptions) -> list[Field]:
    columns = [_columns_of(table, one) for one in chosen]
    names = list(dict.fromkeys(name for one in columns for name in one))
    first = table.read(names, np.arange(min(LOOKED_AT, _first_run(table)))) if names else {}
    return [_field(table, one, parts, first, options) for one, parts in zip(chosen, columns, strict=True)]


def _with_kinds(default: Sequence[FieldOption], asked: FieldOptions) -> tuple[FieldOption, ...]:
    kinds, normalisations = dict(asked.kinds), dict(asked.normalisations)
    return tuple(
        replace(one, kind=kinds.get(one.name, one.kind), normalisation=normalisations.get(one.name)) for one in default
    )


def _first_run(table: Table) -> int:
    return int(table.starts[1]) if len(table.starts) > 1 else table.num_rows


def _columns_of(table: Table, asked: FieldOption) -> tuple[str, ...]:
    """The column that a field names, or those that it joins: a+b."""
    found = (asked.where,) if asked.where in table.columns else tuple(asked.where.split("+"))
    for name in found:
        if name not in table.columns:
            raise UserError(f"{asked}: {table.url} has no column '{name}'; {nearest(name, table.columns)}")
        if refused := table.columns[name].refused:
            raise UserError(f"{asked}: column '{name}' of {table.url} {refused}")
    return found


def _field(
    table: Table, asked: FieldOption, columns: tuple[str, ...], first: Mapping[str, Values], options: SourceOptions
) -> Field:
    """The field of a column, by its first values; of one of classes the whole column is read for their names."""
    what, about = f"{asked}: {table.url}", table.columns[columns[0]]
    num_rows = len(first[columns[0]])
    try:
        some = [raw_value({n: first[n][i] for n in columns}, columns, asked.path, what) for i in range(num_rows)]
    except DataError as error:  # columns that can't be joined
        raise UserError(str(error)) from error
    if len(columns) > 1:
        about = Column(None if about.shape is None or some[0] is None else some[0].shape)
        if about.shape and not has_channels_first(order_of(what, about.shape, options.layout)):
            raise UserError(f"{what}: columns are joined along the first axis, the channels, and these have none there")
    found = field_of(asked, Column() if asked.path else about, some, options, what, table.file_at)
    if found.kind == "class":
        classes = about.classes or _classes_of(table, asked, what)
        found = replace(found, classes=list(classes), class_counts=[0] * len(classes))
    return replace(found, normalisation=asked.normalisation or "none")


def _classes_of(table: Table, option: FieldOption, what: str) -> list[str]:
    """Names of the classes in a column: its words in order, or of whole numbers 0 to the largest."""
    words, largest = set[str](), -1
    for run in zip(table.starts.tolist(), [*table.starts[1:].tolist(), table.num_rows], strict=True):
        for start in range(*run, ROWS_AT_ONCE):
            rows = np.arange(start, min(run[1], start + ROWS_AT_ONCE))
            for value in (at_path(raw, option.path) for raw in table.read([option.where], rows)[option.where]):
                if isinstance(value, str | bytes):
                    words.add(as_text(value, what))
                elif value is not None:
                    if not is_whole(value):
                        raise UserError(f"{what}: {value} is no class; whole numbers from 0, or words, are needed")
                    largest = max(largest, int(value))
        check_label(max(largest, len(words) - 1), what)
    if words and largest >= 0:
        raise UserError(f"{what}: has words and numbers; classes are the one or the other")
    return in_order(sorted(words)) if words else [str(number) for number in range(largest + 1)]
