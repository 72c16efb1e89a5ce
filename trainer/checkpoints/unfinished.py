"""Folders that are whole once their last file is there: what is written before it stands in a list until then.

<folder>/model.unfinished.json    {"last": "model.json", "files": ["ema-0.050.safetensors", ...], "id": "..."}

By it `scoreray clean` finds what a killed export or import left. A writer that finds its list gone, or another one, has
been overtaken and commits nothing: `clean` takes the list before the files, and a second export puts its own there.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, ValidationError

from scoreray.data.errors import StorageError, UserError
from scoreray.data.storage.interface import check_key
from scoreray.data.storage.store import NotFound, Store

UNFINISHED = "model.unfinished.json"


class Unfinished(BaseModel):
    """last: the name of the file that will make the folder whole. files: those written before. id: of who writes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    last: str
    files: list[str]
    id: str

    def keys(self, folder: str) -> list[str]:
        """Those of `files` that lie in the folder ("" or "a/b/"): the list itself may be anybody's."""
        return [f"{folder}{name}" for name in self.files if _is_inside(name) and name != UNFINISHED]


def read_unfinished(data: bytes) -> Unfinished | None:
    """None for what is not such a list."""
    try:
        found = Unfinished.model_validate_json(data)
    except ValidationError:
        return None
    return found if _is_inside(found.last) else None


def _is_inside(name: str) -> bool:
    try:
        check_key(name)
    except StorageError:
        return False
    return True


@dataclass
class FolderWriter:
    """What `being_written` gives: the list of a folder that is not whole yet, and its end."""

    store: Store
    last: str
    _files: list[str] = field(default_factory=list)
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def lists(self, files: Iterable[str]) -> None:
        """Files that will be written from now on; before any of them is. From then on the folder is not whole."""
        self._files += files
        self.store.put(UNFINISHED, self._list())
        self.store.delete([self.last])

    def commit(self, data: bytes) -> None:
        """Puts the last file. Raises UserError where the list is no longer this writer's."""
        self._check()
        self.store.put(self.last, data)
        try:
            self._check()  # `clean` looks for the last file after it has taken the list: one of both sees the other
        except UserError:
            self.store.delete([self.last])
            raise

    def _list(self) -> bytes:
        return Unfinished(last=self.last, files=self._files, id=self._id).model_dump_json().encode()

    def _check(self) -> None:
        url, last = self.store.url(), self.last
        try:
            listed = self.store.get(UNFINISHED)
        except NotFound:
            raise UserError(
                f"{url}: taken for a leftover by scoreray clean, so no {last}; give the command again"
            ) from None
        if listed != self._list():
            raise UserError(f"{url}: another command writes here too, so no {last}; give the command again")


@contextlib.contextmanager
def being_written(store: Store, last: str, files: Iterable[str] = ()) -> Iterator[FolderWriter]:
    """Around the writing of a folder's files, the last of which is `FolderWriter.commit`'s. Those of `files` are listed
    at once; a folder that was whole stays it as long as none is."""
    writer = FolderWriter(store, last)
    if listed := list(files):
        writer.lists(listed)
    yield writer
    store.delete([UNFINISHED])
