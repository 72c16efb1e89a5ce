"""Where a job's samples go: names of the files there, whose place it is, whether files still are as they were drawn."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scoreray.data.errors import StorageError, UserError, nearest
from scoreray.data.reading.manifest import INDEX, MANIFEST
from scoreray.data.reading.outputs import PICTURE_FORMATS, check_folder, suffix_of
from scoreray.data.sources.identity import WINDOW_BYTES
from scoreray.data.storage.lease import Lease, TakenOver
from scoreray.data.storage.store import NotFound, Store, local_path, open_store
from scoreray.data.threads import map_in_threads
from scoreray.sampling.offline.record import FORMATS, Digests, FileDigest, Format, SampleJob

RECORD = "sampling.json"
SHEET = "samples.png"
OWNER = "packing/owner"  # beside the shards while a job goes on: the lease of its newest start
AT_ONCE = 8  # pictures that are put or read at once
PICTURE = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True)
class Place:
    """Where samples go. `shards`: the store of the finished shards until the end, for webdataset for good."""

    store: Store
    format: Format
    name: str = ""  # of the npz

    @property
    def record(self) -> str:
        return f"{self.name}.json" if self.name else RECORD

    @property
    def result(self) -> str:
        """What a person looks at first."""
        return {"webdataset": MANIFEST, "png": SHEET, "npz": self.name}[self.format]

    @property
    def unfinished(self) -> str:
        """Prefix of the shards that are no part of the result."""
        return "" if self.format == "webdataset" else f"{self.name or 'samples'}.unfinished"

    @property
    def shards(self) -> Store:
        return self.store.child(self.unfinished) if self.unfinished else self.store

    def clear(self) -> None:
        """Removes what is no part of the result, what killed writes left of it included."""
        prefix = f"{self.unfinished or 'packing'}/"
        written = {"webdataset": ["shards/"], "png": [*"0123456789", SHEET], "npz": [self.name]}[self.format]
        with contextlib.suppress(StorageError):  # it takes space, no more: a store may not let us look for it
            for start in (f"{prefix}shards/", f"{prefix}packing/", prefix, *written):
                self.store.clear_unfinished(start, but="\0")
        self.store.delete([key for key, _ in self.store.list(prefix)])


def place_of(url: str, format: str = "auto") -> Place:
    """auto: npz where the URL ends so, shards in S3, pictures in a folder. Raises UserError."""
    if format not in ("auto", *FORMATS):
        raise UserError(f"--format {format}: {nearest(format, ('auto', *FORMATS))}")
    ends = suffix_of(url) == ".npz"
    if ends != (format == "npz") and format != "auto":
        raise UserError(f"--format {format}, --out {url}: an npz, and only that, has a name that ends in .npz")
    if ends:
        parent, _, name = url.rpartition("/")
        return Place(open_store(parent or "."), "npz", name)
    picture_hint = f"; for one picture of the first samples give --picture {url} and a folder to --out"
    check_folder(url, "--out", picture_hint if suffix_of(url) in PICTURE_FORMATS else "; only .npz is one file")
    guess: Format = "webdataset" if local_path(url) is None else "png"
    chosen = next((f for f in FORMATS if f == format), guess)
    return Place(open_store(url), chosen)


def refuse_same(place: Place, file: Path, word: str) -> None:
    """Raises UserError where a local file that another option names is one that samples at the place are kept in."""
    root = place.store.url()
    if "://" in root or not file.resolve().is_relative_to(Path(root).resolve()):
        return
    key = file.resolve().relative_to(Path(root).resolve()).as_posix()
    ours = {place.record, place.result, SHEET, MANIFEST, INDEX} if place.format != "npz" else {place.record, place.name}
    parts = ("shards", "packing", place.unfinished) if place.format != "npz" else (place.unfinished,)
    if key in ours or key.split("/")[0] in parts or (place.format != "npz" and PICTURE.fullmatch(key)):
        raise UserError(f"{word} {file}: is one of the files that --out makes; give it another name")


def refuse_strangers(place: Place) -> None:
    """Raises UserError where there is anything that no request for samples left and that samples would mix with: a
    data set or a part of one, pictures with numbers for names, a sheet; for an npz the file itself."""
    found = next(_strangers(place), None)
    if found is not None:
        raise UserError(f"{place.store.url(found)}: is there already, of another origin; give another --out")


def _strangers(place: Place) -> Iterator[str]:
    store = place.store
    single = [place.name] if place.format == "npz" else [MANIFEST, INDEX, SHEET]
    yield from (name for name in single if store.exists(name))
    folders = [place.unfinished] if place.format == "npz" else ["shards", "packing", "samples.unfinished"]
    for folder in folders:
        yield from (key for key, _ in store.list(f"{folder}/"))
    if place.format != "npz":
        for digit in "0123456789":  # by prefix: the place may hold much else
            yield from (key for key, _ in store.list(digit) if PICTURE.fullmatch(key))


def taken_over(where: str) -> TakenOver:
    return TakenOver(
        f"{where}: another start of this job has taken over from this one, which ends without changing anything more"
    )


def give_way(lease: Lease, place: Place) -> None:
    """After an error: raises TakenOver where another start has begun meanwhile, and clears the place where that one was
    done before our last shard came. Returns where ours is still the newest, so that the error is its own."""
    newest = lease.holder()
    if newest == lease.token:
        return
    if not newest:
        place.clear()
    raise taken_over(place.store.url(place.name)) from None


def picture(number: int) -> str:
    return f"{number:06d}.png"


def files_of(place: Place, job: SampleJob) -> dict[str, list[str]]:
    """What a finished job leaves beside its record, by the names that the record gives: the keys of each. The pictures
    of a shard are one."""
    if place.format == "npz":
        return {place.name: [place.name]}
    shards = range(job.num_shards)
    if place.format == "webdataset":
        return {name: [name] for name in (*(shard_name(number) for number in shards), INDEX, MANIFEST)}
    groups = (job.shard_samples(number) for number in shards)
    return {**{group_name(numbers): [picture(i) for i in numbers] for numbers in groups}, SHEET: [SHEET]}


def shard_name(number: int) -> str:
    return f"shards/{number:06d}.tar"


def group_name(numbers: range) -> str:
    """What the record calls the pictures of a shard."""
    return f"{picture(numbers[0])} to {picture(numbers[-1])}"


def intact(place: Place, job: SampleJob, recorded: Digests) -> Digests:
    """Those of the recorded files whose bytes are what the record says; each is read once."""
    found = {}
    for name, keys in files_of(place, job).items():
        wanted = recorded.get(name)
        if wanted is not None and _digest(place.store, keys) == wanted:
            found[name] = wanted
    return found


def digest_of(parts: Sequence[bytes]) -> FileDigest:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return FileDigest(sum(map(len, parts)), found.hexdigest())


def digest_of_file(store: Store, key: str) -> FileDigest:
    """Of one that may be larger than memory. Raises NotFound, StorageError."""
    found, size = hashlib.sha256(), 0
    while part := store.get(key, size, size + WINDOW_BYTES):
        found.update(part)
        size += len(part)
    return FileDigest(size, found.hexdigest())


def _digest(store: Store, keys: Sequence[str]) -> FileDigest | None:
    """None where one is missing."""
    try:
        if len(keys) == 1:
            return digest_of_file(store, keys[0])
        return digest_of(list(map_in_threads(AT_ONCE, lambda i: store.get(keys[i]), range(len(keys)))))
    except NotFound:
        return None
