"""`scoreray clean`: what killed starts left in storage, found by the formats, and removed where asked to.

Left over, if nothing of it was written for `older_s`:

- a checkpoint or snapshot of a run without its marker: no start reads it, as starts go on from committed ones alone;
- shards and records of a pack without a manifest (never tars that are indexed in place), records beside a manifest;
- files of a model whose export or import did not get to its last file (`trainer/checkpoints/unfinished.py`);
- `samples.unfinished/`, `NAME.npz.unfinished/`: shards of samples that were never put together;
- multipart uploads and temporary files of keys of ours, which no listing shows;
- the small objects by which a start tries whether it can write.

Nothing else is touched: nothing committed, nothing that is not of our formats, nothing unreadable.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scoreray.cluster.verbs.inventory import Facts, Kind, age, places_of
from scoreray.data.errors import StorageError, UserError, printable
from scoreray.data.packing.commit import IN_PLACE, PLAN
from scoreray.data.reading.manifest import MANIFEST
from scoreray.data.storage.interface import PROBE, StoredObject, UnfinishedWrite, probe_key
from scoreray.data.storage.lease import Lease
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.data.units import counted_noun, readable_bytes
from scoreray.trainer.checkpoints.checkpoint import FOLDER, MARKER, OWNER, SNAPSHOTS
from scoreray.trainer.checkpoints.unfinished import UNFINISHED, Unfinished, read_unfinished

LEAST_S = 3600.0  # a commit may wait half an hour for a rank's share
A_PROBE = re.compile(rf"(.*/)?{PROBE}-[0-9a-f]{{32}}")
PROBE_BYTES = 16
ATTEMPT = re.compile(rf"({FOLDER}|{SNAPSHOTS})/\d{{12,18}}-([^/]+)/[^/]+")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Leftover:
    """Something that a killed start left.

    keys: of the objects to remove, the first one first. writes: unfinished ones. run, attempt: whose checkpoint it is,
    where it is one. whole: the key of what makes it no leftover once it is there.
    """

    url: str
    what: str
    bytes: int
    written_s: float
    keys: tuple[str, ...] = ()
    writes: tuple[UnfinishedWrite, ...] = ()
    run: str = ""
    attempt: str = ""
    whole: str = ""

    def answer(self) -> dict[str, Any]:
        found = asdict(self)
        return {key: found[key] for key in ("url", "what", "bytes", "written_s")}


@dataclass(frozen=True)
class Cleaned:
    """found: what is left over. removed: whether it was removed."""

    url: str
    found: tuple[Leftover, ...]
    removed: bool
    now: float

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.found)

    def answer(self) -> dict[str, Any]:
        return {"removed": self.removed, "bytes": self.bytes, "found": [one.answer() for one in self.found]}

    def text(self) -> str:
        if not self.found:
            return f"{self.url}: nothing is left over"
        lines = [
            printable(f"{one.what}: {one.url}, {readable_bytes(one.bytes)}, written {age(self.now - one.written_s)}")
            for one in self.found
        ]
        total = f"{counted_noun(len(self.found), 'leftover')}, {readable_bytes(self.bytes)}"
        return "\n".join([*lines, f"{total} removed" if self.removed else f"{total}; --yes removes them"])


def parse_age(text: str) -> float:
    """Seconds of "1d", "12h", "90m". Raises UserError for anything else and for less than an hour."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smhdw])", text.strip())
    if match is None:
        raise UserError(f"--older-than '{text}': write a number and s, m, h, d or w, e.g. 1d")
    if (seconds := float(match[1]) * UNITS_S[match[2]]) < LEAST_S:
        raise UserError(f"--older-than {text}: at least 1h, as what is still being written may look like a leftover")
    return seconds


def clean(url: str, older_s: float, *, remove: bool, now: float | None = None) -> Cleaned:
    """Finds what is left over under a URL, and removes it if `remove`. Raises UserError, StorageError.

    now: Unix time; by default the store's own where something is removed, as this machine's clock may be wrong.
    """
    store = open_store(url)
    if now is None:
        now = store_time(store) if remove else time.time()
    found = tuple(leftovers(store, older_s, now))
    removed = tuple(one for one in found if _remove(store, one, older_s, now)) if remove else found
    return Cleaned(store.url(), removed, remove, now)


def store_time(store: Store) -> float:
    """By the clock that objects' times are of."""
    key = probe_key()
    store.put(key, uuid.uuid4().bytes)
    try:
        return next(one.written_s for one in store.objects(key))
    except StopIteration:
        raise StorageError(
            f"{store.url()}: what was written just now is not listed; is the store consistent?"
        ) from None
    finally:
        store.delete([key])


def leftovers(store: Store, older_s: float, now: float) -> Iterator[Leftover]:
    """What is left over; nothing of which was written in the `older_s` before `now`."""
    objects, before = store.objects(), now - older_s
    places = {place: found for place, found in places_of(store, objects).items() if not found[1].note}
    candidates = [one for place, (kind, about) in places.items() for one in _of(store, place, kind, about, objects)]
    yield from (one for one in candidates if one.written_s < before)
    by_key, exported = {one.key: one for one in objects}, set[str]()
    for one in objects:
        if A_PROBE.fullmatch(one.key) and one.bytes == PROBE_BYTES and one.written_s < before:
            yield Leftover(store.url(one.key), "a probe", one.bytes, one.written_s, (one.key,))
        is_list = one.key.rpartition("/")[2] == UNFINISHED and one.written_s < before
        if is_list and (listed := _listed(store, one.key)) is not None:
            exported.update(listed.keys(one.key.removesuffix(UNFINISHED)))
            yield from _of_export(store, one, listed, by_key, before)
    for write in store.unfinished():
        is_ours = write.key in exported or any(write.key.startswith(place) for place in places)
        if is_ours and write.written_s < before:
            what = "an unfinished upload" if store.is_remote else "a temporary file"
            yield Leftover(store.url(write.key), what, write.bytes, write.written_s, writes=(write,))


def _of(store: Store, place: str, kind: Kind, about: Facts, objects: Sequence[StoredObject]) -> Iterator[Leftover]:
    ours = {one.key.removeprefix(place): one for one in objects if one.key.startswith(place)}
    if kind == "run":
        yield from _of_run(store, place, ours)
    elif kind == "data set":
        yield from _of_pack(store, place, about, ours)
    for folder in sorted({found[0] for key in ours if (found := re.match(UNFINISHED_SAMPLES, key))}):
        yield _leftover(store, place, "samples that were not put together", folder,
                        [one for key, one in ours.items() if key.startswith(folder)])  # fmt: skip


UNFINISHED_SAMPLES = r"(samples|[^/]+\.npz)\.unfinished/(?=(shards|packing)/)"


def _of_run(store: Store, run: str, ours: dict[str, StoredObject]) -> Iterator[Leftover]:
    folders: dict[str, list[StoredObject]] = {}
    for key, one in ours.items():
        if ATTEMPT.fullmatch(key):
            folders.setdefault(key.rpartition("/")[0], []).append(one)
    for folder, some in folders.items():
        if f"{folder}/{MARKER}" in ours:
            continue
        what = "a checkpoint that was not committed" if folder.startswith(FOLDER) else "averages not committed"
        attempt = folder.rpartition("/")[2].partition("-")[2]
        yield _leftover(store, run, what, f"{folder}/", some, attempt)


def _of_pack(store: Store, data: str, about: Facts, ours: dict[str, StoredObject]) -> Iterator[Leftover]:
    records = [one for key, one in ours.items() if re.fullmatch(r"packing/(plan|\d{6,})", key)]
    if about.is_done:
        if records and MANIFEST in ours and ours[MANIFEST].written_s >= max(one.written_s for one in records):
            yield _leftover(store, data, "records of a pack that is done", "packing/", records)
        return
    begun, words = ours[PLAN].written_s, store.get(data + PLAN).decode(errors="replace").split()
    shards = [] if IN_PLACE in words else [
        one for key, one in ours.items() if re.fullmatch(r"shards/\d{6,}\.tar", key) and one.written_s >= begun
    ]  # fmt: skip
    yield _leftover(store, data, "a pack that was not finished", "", [*records, *shards])


def _listed(store: Store, key: str) -> Unfinished | None:
    try:
        return read_unfinished(store.get(key))
    except NotFound:
        return None


def _of_export(
    store: Store, begun: StoredObject, listed: Unfinished, objects: Mapping[str, StoredObject], before: float
) -> Iterator[Leftover]:
    """The list of what an export was writing, and where its last file did not come what it wrote since then."""
    folder = begun.key.removesuffix(UNFINISHED)
    if folder + listed.last in objects:
        yield _leftover(store, folder, "the list of an export that is done", UNFINISHED, [begun])
        return
    written = [objects[key] for key in sorted({*listed.keys(folder)}) if key in objects]
    some = [begun, *(one for one in written if one.written_s >= begun.written_s)]
    if max(one.written_s for one in some) < before:
        yield _leftover(store, folder, "a model that was not written whole", "", some, whole=folder + listed.last)


def _leftover(
    store: Store, place: str, what: str, folder: str, some: Sequence[StoredObject], attempt: str = "", whole: str = ""
) -> Leftover:
    url, keys = store.url(f"{place}{folder}".rstrip("/")), tuple(one.key for one in some)
    size, written_s = sum(one.bytes for one in some), max(one.written_s for one in some)
    return Leftover(url, what, size, written_s, keys, run=place if attempt else "", attempt=attempt, whole=whole)


def _remove(store: Store, one: Leftover, older_s: float, now: float) -> bool:
    """False where it has turned out to be in use. What was begun may go on, after a machine's sleep: the run's lease is
    taken before what its newest start wrote is removed, so that this start ends instead of committing the rest."""
    if one.whole:
        store.delete(one.keys[:1])  # the list: an export that goes on after all finds it gone, or is found here
        if store.exists(one.whole):
            return False
    if one.attempt:
        run = store.child(one.run) if one.run else store
        if _holder(run) == one.attempt:
            if max(o.written_s for o in run.objects()) >= now - older_s:
                return False
            Lease.take(run, OWNER, "run")
        folder = one.keys[0].rpartition("/")[0]
        there = {o.key: o.written_s for o in store.objects(f"{folder}/")}
        if f"{folder}/{MARKER}" in there or max(there.values(), default=0.0) >= now - older_s:
            return False
    store.delete(one.keys)
    store.abandon(one.writes)
    return True


def _holder(run: Store) -> str:
    try:
        return run.get(OWNER).decode(errors="replace")
    except NotFound:
        return ""
