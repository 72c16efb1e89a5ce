"""The files below a folder that is to be packed: links are followed, and what can't be packed is listed too."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scoreray.data.errors import printable
from scoreray.data.storage.paths import explained, special_kind
from scoreray.data.storage.store import Store

LONGEST_SUFFIX = 12  # of a file's name; what is longer is a part of the name
OF_SYSTEMS = ("__MACOSX", "lost+found")  # folders that an archiver or a file system makes


@dataclass(frozen=True)
class Listing:
    """What is below a folder or prefix. Hidden files and folders are not looked into.

    files: bytes of each file, by its key.  folders: those of the first level, also without a file.
    broken: links that lead nowhere, and where to.  loops: links to a folder above them, which are not followed.
    special: what is neither a file nor a folder, and what it is.
    """

    files: dict[str, int] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    loops: list[str] = field(default_factory=list)
    special: dict[str, str] = field(default_factory=dict)


def list_below(store: Store) -> Listing:
    """Raises StorageError naming the folder or file that can't be read."""
    found = Listing()
    if store.is_remote:
        for key, size in store.list():
            if not is_hidden(key) and not key.endswith("/"):  # an empty object that stands for a folder
                found.files[key] = size
        found.folders.extend(sorted({key.split("/", 1)[0] for key in found.files if "/" in key}))
        return found
    above = [("", store.root, frozenset[tuple[int, int]]())]
    while above:
        prefix, folder, parents = above.pop()
        with explained(Path(folder)):
            status = os.stat(folder)
            within = parents | {(status.st_dev, status.st_ino)}
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        for name in names:
            if not is_hidden(name) and _add(found, prefix + name, f"{folder}/{name}", within):
                above.append((f"{prefix}{name}/", f"{folder}/{name}", within))
    return Listing(
        dict(sorted(found.files.items())),
        sorted(found.folders),
        dict(sorted(found.broken.items())),
        sorted(found.loops),
        dict(sorted(found.special.items())),
    )


def _add(found: Listing, key: str, path: str, within: frozenset[tuple[int, int]]) -> bool:
    """Adds what is at `path`; True for a folder that is to be looked into. `within`: the folders above it."""
    with explained(Path(path)):
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            found.broken[key] = os.readlink(path)  # a file that was removed since the listing is not there either
            return False
    if stat.S_ISDIR(status.st_mode):
        if (status.st_dev, status.st_ino) in within:
            found.loops.append(key)
            return False
        if "/" not in key:
            found.folders.append(key)
        return True
    if stat.S_ISREG(status.st_mode):
        found.files[key] = status.st_size
    else:
        found.special[key] = special_kind(status.st_mode) or "a special file"
    return False


def is_hidden(key: str) -> bool:
    return any(part.startswith(".") or part in OF_SYSTEMS for part in key.split("/"))


def suffix_of(name: str) -> str:
    """A file's lower-case suffix; "" for one that says nothing of its kind, such as that of `img_0.05`."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if any(letter.isalpha() for letter in suffix) and len(suffix) <= LONGEST_SUFFIX else ""


def kinds_line(counts: Counter[str]) -> str:
    """What was left out, by kind, the most first: "60 .txt, 2 .csv"."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    rest = [f"{len(counts) - 5:,} other kinds"] if len(counts) > 5 else []
    return ", ".join([*(f"{n:,} {shown(kind)}" for kind, n in most), *rest])


def shown(*parts: str) -> str:
    """A file's path, on one line whatever its name is."""
    return printable("/".join(parts))


def some_of(names: Sequence[str]) -> str:
    """The first names of many, on one line."""
    return ", ".join([*map(shown, names[:5]), *["..."] * (len(names) > 5)])
