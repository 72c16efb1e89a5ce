"""URLs of several tars in brace notation, as WebDataset's users write them: s3://bucket/photos-{000000..000099}.tar"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from braceexpand import braceexpand

from scoreray.data.errors import UserError, shortened
from scoreray.data.storage.interface import NotFound
from scoreray.data.storage.store import Store, open_store

MAX_TARS = 2_000_000
EXAMPLE = "s3://bucket/photos-{000000..000099}.tar"
_OTHERS = re.compile(r"(https?|ftp|hdfs|pipe):", re.IGNORECASE)  # what webdataset opens, or others think of
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}")


@dataclass(frozen=True)
class StoredTar:
    """folder: the URL of the store that holds it under `key`."""

    folder: str
    key: str
    bytes: int

    @property
    def url(self) -> str:
        return f"{self.folder}/{self.key}"

    @property
    def store(self) -> Store:
        return open_store(self.folder)


def names_tars(url: str | Sequence[str]) -> bool:
    """Whether `url` names tars, by a list, in brace notation or one by its suffix; else it is a folder or prefix."""
    if not isinstance(url, str):
        return True
    if url.endswith(".tar") or _OTHERS.match(url):
        return True
    return ("{" in url or "::" in url) and list(itertools.islice(_braces(url), 2)) != [url]


def expand(url: str | Sequence[str]) -> list[str]:
    """The URLs of the tars that `url` names, in order. Raises UserError for what names none, or one twice."""
    patterns = [url] if isinstance(url, str) else list(url)
    found: list[str] = []
    for pattern in patterns:
        found += itertools.islice(_braces(pattern), MAX_TARS + 1 - len(found))
        if len(found) > MAX_TARS:
            raise UserError(f"'{shortened(pattern)}': names over {MAX_TARS:,} tars, the limit")
    if not found:
        raise UserError(f"an empty list names no tars; write {EXAMPLE}, or [{EXAMPLE}, ...]")
    for one in found:
        _check_url(one)
    if len(set(found)) < len(found):
        twice = next(one for one, count in Counter(found).items() if count > 1)
        raise UserError(f"'{shortened(twice)}': is named twice; its samples would count twice")
    return found


def find_tars(url: str | Sequence[str], patient: bool = False) -> list[StoredTar]:
    """The tars that `url` names, with their sizes. Raises UserError where one is missing, StorageError; unless
    `patient`, that within seconds where a store does not answer.

    A remote folder is listed: 13 requests for 12,346 tars, where one for the size of each would be as many.
    """
    urls = expand(url)
    by_folder: dict[str, list[str]] = {}
    for one in urls:
        folder, key = _split(one)
        by_folder.setdefault(folder, []).append(key)
    stores = {folder: open_store(folder) for folder in by_folder}
    for store in stores.values():
        if not patient:
            store.check_reachable()
    sizes = {folder: _sizes(stores[folder], keys) for folder, keys in by_folder.items()}
    found, missing = list[StoredTar](), list[str]()
    for folder, key in map(_split, urls):
        if key in sizes[folder]:
            found.append(StoredTar(stores[folder].url(), key, sizes[folder][key]))
        else:
            missing.append(stores[folder].url(key))
    if missing:
        more = f" (and {len(missing) - 1:,} more are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: there is no such tar{more}; {len(found):,} of the {len(urls):,} that were named are there: "
            "name only these, or put it there"
        )
    return found


def _split(url: str) -> tuple[str, str]:
    """(folder, key) of a tar."""
    key = url.rpartition("/")[2]
    return url[: len(url) - len(key)] or ".", key


def _sizes(store: Store, keys: Sequence[str]) -> dict[str, int]:
    """The sizes of those of `keys` that are there."""
    if store.is_remote:
        wanted, prefix = set(keys), os.path.commonprefix(list(keys))  # noqa: RUF071 (of names, not of folders)
        return {key: size for key, size in store.list(prefix) if key in wanted}
    found = {}
    for key in keys:
        try:
            found[key] = store.size(key)
        except NotFound:
            continue
    return found


def _braces(pattern: str) -> itertools.chain[str]:
    """What bash would make of the pattern, one after the other; `::` stands between patterns, as for webdataset."""
    sizes = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern)]
    if math.prod(sizes) > MAX_TARS:  # each range is made whole before the first name of it is known
        raise UserError(f"'{shortened(pattern)}': names over {MAX_TARS:,} tars, the limit")
    try:
        return itertools.chain(*(braceexpand(one) for one in pattern.split("::")))
    except ValueError:
        raise UserError(
            f"'{shortened(pattern)}': its braces don't pair; write {EXAMPLE}, and \\{{ for a brace in a name"
        ) from None


def _check_url(url: str) -> None:
    other = _OTHERS.match(url)
    if other and other[1].lower() == "pipe":
        raise UserError(f"'{shortened(url)}': runs a command, which is never done; give the tars' own URLs: {EXAMPLE}")
    if other:
        raise UserError(
            f"'{shortened(url)}': tars are read from s3://, gs://, az:// or a folder; copy them there first "
            "(aws s3 cp, rclone copyurl)"
        )
    if not url.endswith(".tar"):
        raise UserError(
            f"'{shortened(url)}': is not the name of a tar; a compressed one has to be unpacked to .tar first"
        )
