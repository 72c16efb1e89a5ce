"""Which reader opens a source of rows and columns: parquet, `datasets` folders, files of arrays, image folders."""

from __future__ import annotations

import os

from scoreray.data.errors import UserError
from scoreray.data.sources.arrays import is_table
from scoreray.data.sources.field_options import FieldOptions
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.store import local_path, open_store
from scoreray.data.tables.image_table import open_image_table
from scoreray.data.tables.source import OpenTable, TableSource, open_table_source


def open_table(url: str | os.PathLike[str], options: SourceOptions, asked: FieldOptions) -> TableSource | None:
    """The source at a URL that is a table; None for one that is not, such as an archive .npz of images or floats with
    labels that is packed without --field. Raises UserError, DataError, StorageError."""
    where = local_path(url)
    text = os.fspath(url) if where is None else os.path.abspath(where)
    reader = reader_of(text)
    if reader is None and asked and (where is None or where.is_dir()):
        reader = open_image_table
    if reader is None and asked and where is not None and where.is_file():
        raise UserError(f"{url}: {asked.flag()}: images and their classes are all that such a file holds")
    if reader is None or (text.endswith(".npz") and where is not None and not asked and not is_table(where)):
        return None
    return open_table_source(reader, text, options, asked)


def reader_of(url: str) -> OpenTable | None:
    """What opens a table at a URL: by its suffix, or of a folder by what is in it; None of a folder of images, too,
    which is one where fields are asked for."""
    from scoreray.data.tables.array_files import ARRAY_SUFFIXES, is_zarr, open_arrays
    from scoreray.data.tables.parquet import ARROW_SUFFIXES, open_parquet

    name = url.rstrip("/").rpartition("/")[2].lower()
    if name.endswith(ARROW_SUFFIXES):
        return open_parquet
    if name.endswith(ARRAY_SUFFIXES):
        return open_arrays
    where, store = local_path(url), open_store(url)
    if where is not None and not where.is_dir():
        return None
    if is_zarr(store):
        return open_arrays
    if where is None:
        found = any(key.endswith(ARROW_SUFFIXES) for key, _ in store.list())
    else:  # names alone: a folder of a million pictures is looked through in a second
        found = any(name.endswith(ARROW_SUFFIXES) for _, _, names in os.walk(where) for name in names)
    return open_parquet if found else None
