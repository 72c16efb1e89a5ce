"""Objects of a store as seekable files, for libraries that read formats with an index of their own."""

from __future__ import annotations

import fnmatch
import io
import os
from typing import BinaryIO, cast

from scoreray.data.errors import UserError
from scoreray.data.sources.listing import shown
from scoreray.data.storage.store import PathStore, Store, open_store

BUFFER_BYTES = 1 << 20  # that are fetched at once, and held


class _StoreFile(io.RawIOBase):
    """Reads of an object by ranged requests; nothing is kept."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key, self._size, self._at = store, key, store.size(key), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        end = min(self._size, self._at + len(buffer))
        if end <= self._at:
            return 0
        data = self._store.get(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_file(store: Store, key: str, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
    """The object, open for reading; `buffer_bytes` of it are in memory. Raises StorageError."""
    if isinstance(store, PathStore):
        return open(os.path.join(store.root, key), "rb")
    return cast(BinaryIO, io.BufferedReader(_StoreFile(store, key), buffer_bytes))


def named_files(url: str) -> tuple[Store, list[str]]:
    """(the store of the folder, keys) of the file at a URL, or of those that a pattern's last part names (`URL/*.nc`),
    ascending. Raises UserError where there is none, StorageError."""
    head, _, last = url.rstrip("/").rpartition("/")
    store = open_store(head or ".")
    if "*" not in last:
        names = [last] if store.exists(last) else []
    else:
        names = sorted(key for key, _ in store.list(last.partition("*")[0]) if fnmatch.fnmatchcase(key, last))
    if not names:
        raise UserError(f"{shown(url)}: there is no such file")
    return store, names
