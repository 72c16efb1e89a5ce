"""A store: bytes by key. The interface that folders, S3 and other clouds share, and what its users may rely on.

A store holds nothing but its URL: it can be pickled, sent to a Ray worker and used after a fork. Every failure is a
StorageError of one line that names the URL, what is wrong and how to fix it.
"""

from __future__ import annotations

import abc
import threading
import uuid
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from scoreray.data.errors import StorageError

TEMPORARY = ".part-"  # what a write that was killed may leave in a folder; never listed
PROBE = "scoreray-probe"  # what the keys begin with by which a store is tried

abandoned: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)
"""Set once nobody waits for the answer any more: a request that fails then is not repeated."""


def probe_key() -> str:
    """A new one, of a small object that is written and removed."""
    return f"{PROBE}-{uuid.uuid4().hex}"


class NotFound(StorageError):
    """There is no such key."""


class NotAFile(StorageError):
    """What has this name is a FIFO, a socket or a device: reading it could wait, or go on, without an end."""


@dataclass(frozen=True, order=True)
class StoredObject:
    """An object as a listing has it. written_s: Unix time of its last write, by the store's clock."""

    key: str
    bytes: int
    written_s: float


@dataclass(frozen=True, order=True)
class UnfinishedWrite:
    """What a write that goes on, or was killed, has left so far: a multipart upload, or a temporary file.

    key: of the object that it would become. written_s: Unix time of its newest part. token: the store's name of it."""

    key: str
    bytes: int
    written_s: float
    token: str


@dataclass(frozen=True)
class Store(abc.ABC):
    """Bytes by key. Keys are relative, '/'-separated and the same on every kind of store."""

    root: str
    is_remote: ClassVar[bool] = False  # an answer may take long, or come damaged

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        """To another process as its URL: connections stay where they are."""
        return type(self), (self.root,)

    @abc.abstractmethod
    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or as a slice does, those of [start, end). Raises NotFound, StorageError."""

    @abc.abstractmethod
    def put(self, key: str, data: bytes | Path) -> None:
        """Writes the object whole or not at all, replacing an earlier one. A Path is a local file to upload."""

    @abc.abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Writes the object only if there is none: True if it is now ours, False if one was there before.

        An answer of a remote store can be lost after the write took place; the repeated request then finds its own
        object and the result is False. A caller to whom that matters writes something unique and reads it back.
        """

    @abc.abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFound."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(key, bytes) of every object whose key starts with `prefix`, sorted by key."""

    @abc.abstractmethod
    def objects(self, prefix: str = "") -> Sequence[StoredObject]:
        """`list`, with when each was written."""

    @abc.abstractmethod
    def unfinished(self, prefix: str = "") -> Sequence[UnfinishedWrite]:
        """Writes of keys that start with `prefix` and have not become objects, sorted by key."""

    @abc.abstractmethod
    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        """Removes what `unfinished` gave. One that has ended meanwhile is no error, and its object stays."""

    @abc.abstractmethod
    def stamps(self) -> dict[str, str]:
        """For every object a text that changes when it is written: a remote object's ETag, a file's time of change."""

    @abc.abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Removes the objects. One that is already gone is no error."""

    @abc.abstractmethod
    def clear_unfinished(self, prefix: str, but: str) -> None:
        """Removes what killed writes left of keys that start with `prefix`, unless `but` is in the key. None of it is
        ever listed or read, but it takes space."""

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def url(self, key: str = "") -> str:
        return f"{self.root}/{check_key(key)}" if key else self.root

    def child(self, prefix: str) -> Store:
        """The store of the keys below `prefix/`."""
        return type(self)(f"{self.root}/{check_key(prefix.rstrip('/'))}")

    def advise(self, key: str, start: int, end: int) -> None:  # noqa: B027 (a store need not)
        """A hint that these bytes will soon be read. Returns at once, whether they exist or not."""

    def check_reachable(self) -> None:  # noqa: B027 (a path always is)
        """Raises StorageError within seconds where the store does not answer; other requests are patient."""

    def check_writable(self) -> None:
        """Writes, reads back and removes a small object, so that a run finds out before it starts, not after."""
        key, data = probe_key(), uuid.uuid4().bytes
        try:
            self.put(key, data)
            found = self.get(key)
            self.delete([key])
        except StorageError as error:  # name the place that was given, not our probe
            raise type(error)(str(error).replace(f"/{key}", "")) from error
        if found != data:
            raise StorageError(f"{self.url(key)}: read back other bytes than were written; is the store consistent?")


def check_key(key: str) -> str:
    """`key` if it stays below the root, on a path as on S3."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in key or parts[-1].startswith(TEMPORARY):
        raise StorageError(f"'{key}' can't be the key of an object: a relative name without '..' is needed")
    return key
