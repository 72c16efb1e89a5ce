"""A digest of a source's contents, by which the same pack is recognised; cheap also for terabytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import numpy as np

from scoreray.data.storage.store import Store

WINDOW_BYTES = 8 << 20  # of an object that is hashed
READ_WHOLE_BYTES = 4 << 30  # a folder of more is known by its files' times, and by the contents of some
NUM_SAMPLED, SAMPLED_BYTES = 256, 1 << 16  # files of such a folder, and bytes at the start, middle and end of each
MD5 = re.compile(r"[0-9a-f]{32}")


def identity(store: Store, sizes: Mapping[str, int]) -> str:
    """SHA-256 of the names, sizes and contents of these files, {key: bytes}. Raises StorageError."""
    return digest_of(content_marks(store, sizes))


def digest_of(marks: Mapping[str, str]) -> str:
    found = hashlib.sha256()
    for name in sorted(marks):
        found.update(f"{name}\0{marks[name]}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def content_marks(store: Store, sizes: Mapping[str, int]) -> dict[str, str]:
    """A mark of each of these files, {key: bytes}, that changes with its size or contents.

    In S3 the listing's ETags stand for contents: of an object put in one piece it is the MD5, which is computed of
    local files, so that both give the same. A local folder of more than READ_WHOLE_BYTES is not read twice: times of
    change stand for contents, and parts of NUM_SAMPLED files spread over it are read. Reading a smaller folder twice
    costs 3 to 5% of a pack's CPU time (benchmarks/RESULTS.md): the MD5 is cheap beside decoding and encoding, and a
    finished pack must be recognised before anything is made. Raises StorageError.
    """
    names = sorted(sizes)
    if store.is_remote:
        stamps = store.stamps()
        marks = {name: stamps.get(name, "gone") for name in names}
        marks = {name: f"md5 {mark}" if MD5.fullmatch(mark) else mark for name, mark in marks.items()}
    elif sum(sizes.values()) <= READ_WHOLE_BYTES:
        marks = {name: f"md5 {hash_object(store, name, sizes[name], 'md5')}" for name in names}
    else:
        stamps = store.stamps()
        marks = {name: stamps.get(name, "gone") for name in names}
        for i in np.unique(np.linspace(0, len(names) - 1, min(NUM_SAMPLED, len(names))).astype(int)):
            marks[names[i]] += f" {_sampled(store, names[i], sizes[names[i]])}"
    return {name: f"{sizes[name]} {mark}" for name, mark in marks.items()}


def hash_object(store: Store, key: str, size: int, algorithm: str = "sha256") -> str:
    """The digest of an object of `size` bytes, of which a window is in memory at a time."""
    found = hashlib.new(algorithm, usedforsecurity=algorithm != "md5")
    for start in range(0, size, WINDOW_BYTES):
        found.update(store.get(key, start, min(size, start + WINDOW_BYTES)))
    return found.hexdigest()


def _sampled(store: Store, key: str, size: int) -> str:
    found = hashlib.sha256()
    for start in sorted({0, max(0, (size - SAMPLED_BYTES) // 2), max(0, size - SAMPLED_BYTES)}):
        found.update(store.get(key, start, min(size, start + SAMPLED_BYTES)))
    return found.hexdigest()
