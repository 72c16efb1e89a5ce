"""Image folders with `metadata.jsonl` or `metadata.csv` beside the files, as Hugging Face's imagefolder has them.

A row of metadata names its picture in `file_name`, relative to the metadata's own folder.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scoreray.data.classes import in_order
from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.reading.pictures import IMAGE_SUFFIXES
from scoreray.data.sources.arrays import check_memory
from scoreray.data.sources.field_options import FieldOption
from scoreray.data.sources.identity import identity
from scoreray.data.sources.image_folders import GET_THREADS, check_classes
from scoreray.data.sources.listing import list_below, shown
from scoreray.data.storage.interface import NotAFile
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.data.tables.kinds import Column
from scoreray.data.tables.values import Values
from scoreray.data.threads import map_in_threads

Read = Callable[[str], Any]
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME, FOLDER = "file_name", "folder"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ImageTable:
    """A `Table` with a row a picture, in the order of their names: `file_name`, `folder` (the first level's, where it
    names a class), and the columns of the metadata."""

    url: str
    columns: Mapping[str, Column]
    fingerprint: str
    num_bytes: int
    store: Store = field(repr=False)
    values: Mapping[str, Sequence[Any]] = field(repr=False)
    is_random = True

    @property
    def num_rows(self) -> int:
        return len(self.values[FILE_NAME])

    @property
    def starts(self) -> np.ndarray:
        return np.zeros(1, np.int64)

    @property
    def default(self) -> Sequence[FieldOption]:
        label = [FieldOption("label", FOLDER, kind="class")] if FOLDER in self.columns else []
        return [FieldOption("image", FILE_NAME, kind="image"), *label]

    def read(self, columns: Sequence[str], rows: np.ndarray) -> Mapping[str, Values]:
        """Pictures of a remote store as their bytes, which are fetched side by side."""
        found = {name: [self.values[name][row] for row in rows.tolist()] for name in columns}
        if self.store.is_remote and FILE_NAME in found:
            names = found[FILE_NAME]
            found[FILE_NAME] = list(map_in_threads(GET_THREADS, lambda i: self._fetched(names[i]), range(len(names))))
        return found

    def _fetched(self, name: str) -> bytes | str:
        try:
            return self.store.get(name)
        except (NotFound, NotAFile):
            return name  # is named when the sample is made

    def file_at(self, path: str) -> bytes:
        return self.store.get(path)

    def row_name(self, row: int) -> str:
        return shown(self.values[FILE_NAME][row])


def open_image_table(url: str) -> ImageTable:
    """The table of an image folder. Raises UserError, DataError naming the file and line, StorageError."""
    store = open_store(url)
    listing = list_below(store)
    sizes = listing.files
    files = [name for name in sizes if name.rpartition("/")[2] in METADATA]
    rows: dict[str, Row] = {}
    for name in files:
        folder = name.rpartition("/")[0]
        check_memory(store.url(name), sizes[name])
        for line, row in _rows(store, name):
            where = f"{shown(store.url(name))}: line {line}"
            key = row.get(FILE_NAME)
            if not isinstance(key, str) or not key:
                raise DataError(f"{where}: has no '{FILE_NAME}'")
            key = posixpath.normpath(f"{folder}/{key}" if folder else key)  # "./a.png" is a.png
            if key in rows:
                raise UserError(f"{where}: '{shortened(key)}' has a row already")
            rows[key] = row
    pictures = {name for name in sizes if name.lower().endswith(IMAGE_SUFFIXES)} | listing.broken.keys() & rows.keys()
    names = sorted(pictures | rows.keys())
    columns = dict.fromkeys(column for row in rows.values() for column in row if column != FILE_NAME)
    values: dict[str, Sequence[Any]] = {FILE_NAME: names}
    for column in columns:
        try:
            values[column] = _typed([rows.get(name, {}).get(column) for name in names])
        except (OverflowError, RecursionError) as error:  # an integer above all doubles, lists a thousand deep
            raise DataError(f"{shown(store.url())}: column '{shortened(column)}' of the metadata: {error}") from None
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    about = {name: Column() for name in values}
    if all(tops) and FOLDER not in values and not any("/" in name for name in files):
        classes = in_order(tops)
        check_classes(store.url(), classes)
        values[FOLDER], about[FOLDER] = tops, Column(kind="class", classes=tuple(classes))
    marked = {name: sizes[name] for name in sizes if name in pictures or name in files}
    url = store.url() if files else f"{store.url()} (with no {' or '.join(METADATA)})"
    return ImageTable(url, about, identity(store, marked), sum(marked.values()), store, values)


def _rows(store: Store, name: str) -> Iterator[tuple[int, Row]]:
    """(line, row) of a metadata file. Raises DataError naming the line."""
    url = shown(store.url(name))
    try:
        text = store.get(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: is not UTF-8, at byte {error.start}") from None
    if name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                raise UserError(f"{url}: line 1: two columns are called '{shortened(twice)}'; give one another name")
            for cells in reader:
                if None in cells or None in cells.values():
                    raise DataError(f"{url}: line {reader.line_num}: has not as many cells as the first line")
                yield reader.line_num, cells
        except csv.Error as error:
            raise DataError(f"{url}: line {reader.line_num}: {error}") from error
        return
    for line, one in enumerate(text.split("\n"), 1):  # splitlines() cuts at U+2028 too, which may be in a caption
        if one.strip():
            try:
                row = json.loads(one)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{url}: line {line}: is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{url}: line {line}: is {type(row).__name__}, an object is needed")
            yield line, row


def _typed(column: list[Any]) -> list[Any]:
    """Values of a column in one type: numbers are floats unless all are whole; what CSV writes as text is read as
    numbers, or as lists of them, where all of it is."""
    texts = [value for value in column if value not in (None, "")]
    if texts and all(isinstance(value, str) for value in texts):
        reads: tuple[Read, ...] = (int, float, _list_of_numbers)
        for read in reads:
            try:
                parsed = {text: read(text) for text in texts}
            except (ValueError, RecursionError):
                continue
            column = [None if value in (None, "") else parsed[value] for value in column]
            break
        else:
            return column
    numbers = [value for value in column if value is not None]
    kinds = {kind for value in numbers for kind in _types_in(value)}
    return [value if value is None else _as_floats(value) for value in column] if kinds == {int, float} else column


def _list_of_numbers(text: str) -> list[Any]:
    """Raises ValueError for other text than a JSON list of numbers."""
    found = json.loads(text)
    if not isinstance(found, list) or not _types_in(found) <= {int, float}:
        raise ValueError(text)
    return found


def _types_in(value: Any) -> set[type]:
    found, left = set[type](), [value]
    while left:  # lists in lists are as deep as their file says
        one = left.pop()
        if isinstance(one, list):
            left += one
        else:
            found.add(type(one))
    return found


def _as_floats(value: Any) -> Any:
    return [_as_floats(one) for one in value] if isinstance(value, list) else float(value)
