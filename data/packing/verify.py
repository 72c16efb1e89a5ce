"""Verifying a data set: every byte of its shards and index, every member of every field, values and statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from scoreray.data.buckets.bucketed import BucketedSet, is_bucketed, progress_of_part
from scoreray.data.errors import DataError, StorageError
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.fields.record_layout import FORMATS, digest
from scoreray.data.packing.moments import FieldCounter, check_finite, with_statistics
from scoreray.data.reading.allowlist import json_value
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.reading.reader import Reader, wanted_members
from scoreray.data.reading.records import taken
from scoreray.data.sources.identity import hash_object
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import Store, open_store

WINDOW_BYTES = 8 << 20  # of a shard that is checked
CLOSE = 1e-6  # of a channel's mean and deviation: sums of floats depend on their order
JPG_LEVELS = 2.0  # of 255, by which means and deviations may differ from those that were taken before the encoding
STATISTICS = ("shape", "class_counts", "mean", "std", "low", "high", "log_mean", "log_std")


def verify(url: str, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Every problem of the data set, one line for a shard's size and digest and one for each range of samples that are
    bad for the same reason; an empty list if it is whole. A window of a shard is in memory at a time.

    Checks each shard's size and SHA-256, the index, each member's digest, that each field of each sample decodes to the
    shape and type that the manifest says and is finite, classes, and, where nothing else is wrong, the statistics.
    `progress` is called with (samples done, samples in all) after each shard.
    """
    store = open_store(url)
    if is_bucketed(store):
        return _verify_buckets(store, progress)
    manifest = Manifest.load(store)
    problems = []
    reader, values = Reader(store, manifest, ReadStats()), _Values(manifest)
    for number in range(len(manifest.shards)):
        try:
            problems += _verify_shard(store, reader, values, number)
        except (DataError, StorageError) as error:
            problems.append(str(error))
        if progress:
            progress(int(reader.first_samples[number + 1]), manifest.num_samples)
    index = manifest.index.name
    if not problems and hash_object(store, index, store.size(index)) != manifest.index.sha256:
        problems.append(f"{store.url(index)}: its SHA-256 is not the manifest's; pack the data set again")
    return problems or [f"{store.url(MANIFEST)}: {problem}" for problem in values.wrong_statistics()]


def _verify_buckets(store: Store, progress: Callable[[int, int], None] | None) -> list[str]:
    """`verify` of each bucket, and that they are those of the list."""
    try:
        data = BucketedSet.load(store)
        assert data.fields  # of which a bucket with others would be a problem
    except DataError as error:
        return [str(error)]
    problems: list[str] = []
    for number, first in enumerate(data.first_samples[:-1].tolist()):
        problems += verify(data.bucket_url(number), progress_of_part(progress, first, data.num_samples))
    return problems


class _Values:
    """Decodes and checks the values of samples, and adds them up."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._counters = {one.name: FieldCounter(one, plain=False) for one in manifest.fields}
        self._of_member, self._jpgs = [], set[str]()
        for extension in manifest.members:
            fields = [one for one in manifest.fields if one.member == extension and not one.is_inline]
            decoder = FieldDecoder(manifest, [FieldRequest(one.name) for one in fields if one.kind != "json"])
            self._of_member.append((decoder, decoder.empty(1), [one for one in fields if one.kind == "json"]))

    def check_member(self, record: np.ndarray, column: int, data: bytes, name: Callable[[], str]) -> None:
        """Raises DataError for a member that is not what its fields are."""
        decoder, out, kept = self._of_member[column]
        decoder.decode_row(record, [data], out, 0, name)
        if record["format"].reshape(-1)[column] == FORMATS["jpg"]:
            self._jpgs.update(one.name for one in decoder.fields)
        for one in decoder.fields:
            value = out.values[one.name][0]
            value = value[: int(out.lengths[one.name][0])] if one.is_varying else value
            check_finite(value, one)
            self._counters[one.name].add(value.tobytes() if one.kind == "text" else value)
        for one in kept:
            try:
                json_value(data, "")
            except DataError as error:
                raise DataError(f"field '{one.name}': {error}") from error
            self._counters[one.name].add(data)

    def wrong_inline(self, records: np.ndarray) -> Iterator[tuple[int, str]]:
        """(place, reason) of classes that have no name, and scalars that are not finite."""
        for one in (one for one in self._manifest.fields if one.is_inline):
            for place, value in enumerate(records[self._manifest.column(one)]):
                try:
                    check_finite(value, one)
                    if one.kind == "class" and not -1 <= value < len(one.classes):
                        raise DataError(f"field '{one.name}': class {value}, the manifest names {len(one.classes)}")
                    self._counters[one.name].add(int(value) if one.kind == "class" else value)
                except DataError as error:
                    yield place, str(error)

    def wrong_statistics(self) -> Iterator[str]:
        """Of all samples: what the manifest says otherwise."""
        for one in self._manifest.fields:
            found = with_statistics(replace(one, normalisation="none"), self._counters[one.name].finish())
            is_jpg = one.name in self._jpgs
            for name in ("shape", "mean", "std") if is_jpg else STATISTICS:
                said, is_so = getattr(one, name), getattr(found, name)
                if said and not _is_close(said, is_so, one, JPG_LEVELS if is_jpg and name != "shape" else 0.0):
                    yield f"field '{one.name}': its {name} is {is_so}, the manifest says {said}"


def _is_close(said: list[float], found: list[float], one: Field, more: float) -> bool:
    if len(said) != len(found):
        return False
    scale = np.abs(np.asarray(one.mean)) + np.asarray(one.std) if len(said) == len(one.mean) == len(one.std) else 0
    return bool((np.abs(np.subtract(said, found)) <= CLOSE * (np.abs(said) + scale) + more).all())


def _verify_shard(store: Store, reader: Reader, values: _Values, number: int) -> list[str]:
    manifest, records = reader.manifest, reader.records(number)
    shard, url, extensions = manifest.shards[number], store.url(manifest.shards[number].name), manifest.members
    size, found, window, at = store.size(shard.name), hashlib.sha256(), b"", 0  # `window` begins at byte `at`
    bad = list(values.wrong_inline(records))
    wanted = wanted_members(records, 0, range(len(extensions)))
    wanted = taken(wanted, np.argsort(wanted["offset"], kind="stable"))
    for place, column, start, length, expected in wanted.tolist():
        while at + len(window) < min(size, start + length):
            end = at + len(window)
            fresh = store.get(shard.name, end, min(size, end + WINDOW_BYTES))
            if not fresh:
                break
            found.update(fresh)
            kept = min(start, end)
            window, at = window[kept - at :] + fresh, kept
        data = window[start - at : start - at + length] if start >= at else store.get(shard.name, start, start + length)
        if digest(data) != expected:
            which = f"member .{extensions[column]}: " if len(extensions) > 1 else ""
            bad.append((place, f"{which}their bytes are not those of the index"))
            continue
        name = partial(reader.name, number, place)
        try:
            values.check_member(records[place], column, data, name)
        except DataError as error:
            bad.append((place, str(error).removeprefix(f"{name()}: ")))
    while at + len(window) < size:
        at, window = at + len(window), store.get(shard.name, at + len(window), at + len(window) + WINDOW_BYTES)
        found.update(window)
    problems = []
    if size != shard.bytes:
        problems.append(
            f"{url}: {size} bytes, the manifest says {shard.bytes}" + (": it is cut" * (size < shard.bytes))
        )
    elif found.hexdigest() != shard.sha256:
        problems.append(f"{url}: its SHA-256 is not the manifest's")
    first = int(reader.first_samples[number])
    return problems + [_range_line(url, records, first, *run) for run in _runs(bad)]


def _runs(bad: list[tuple[int, str]]) -> list[tuple[int, int, str]]:
    """(first place, last place, reason) of neighbours that are bad for the same reason."""
    runs: list[tuple[int, int, str]] = []
    for place, reason in sorted(bad, key=lambda one: (one[1], one[0])):
        if runs and runs[-1][1] == place - 1 and runs[-1][2] == reason:
            runs[-1] = (runs[-1][0], place, reason)
        else:
            runs.append((place, place, reason))
    return sorted(runs)


def _range_line(url: str, records: np.ndarray, first: int, low: int, high: int, reason: str) -> str:
    offset = int(records["offset"][low].min())
    if low == high:
        return f"{url}: sample {first + low} at byte {offset}: {reason.replace('their bytes', 'its bytes')}"
    return f"{url}: samples {first + low} to {first + high}, from byte {offset}: {reason}"
