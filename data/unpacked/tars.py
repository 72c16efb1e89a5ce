"""Tars without a manifest as a run's data: their first samples show shape, type and scale, settings say the rest."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import DataError, UserError, key_in_errors
from scoreray.data.fields.field import Field, plain_fields
from scoreray.data.packing.index_tars import tars_at
from scoreray.data.packing.moments import ChannelMoments, statistics
from scoreray.data.packing.tar_fields import naming, tape_of
from scoreray.data.packing.tar_members import check_fits, decoded
from scoreray.data.packing.tar_samples import TarSample, TarSamples
from scoreray.data.reading.manifest import BUCKETS, Manifest
from scoreray.data.reading.pictures import Fitting, as_array, is_grey, open_picture
from scoreray.data.reading.tars import Member
from scoreray.data.sources.layout import layout_of
from scoreray.data.storage.patterns import StoredTar, find_tars, names_tars
from scoreray.data.storage.store import open_store

PACKING = "packing/"  # what a pack that has begun makes: it has to be finished
LOOKED_AT, TARS_LOOKED_AT = 256, 8  # samples, and tars that they are from, spread over the list
LOOK_BYTES = 1 << 20  # of a tar in a request of the look
FIT = "data.image_size resizes and crops all to one size"
NO_CLASSES = "data.num_classes=0 trains without classes"


@dataclass(frozen=True)
class TarSettings:
    """What the first samples can't show.

    num_classes: 0 for none; None where the samples have none either.  image_size: pictures' shorter side is resized to
    it and the centre cropped; None takes them as they are, all of one size.  skips_bad: the look passes over samples
    that can't be read, as the run does that quarantines them.
    """

    num_classes: int | None = None
    image_size: int | None = None
    skips_bad: bool = False


@dataclass(frozen=True)
class UnpackedTars:
    """A DataDescription: shape and dtype are those of the first samples, mean, std and sigma_data measured on them.

    source: the URL or list of URLs that names the tars.  bytes_per_sample: of a tar, about.
    """

    source: str | tuple[str, ...]
    settings: TarSettings
    tars: tuple[StoredTar, ...]
    shape: list[int]
    dtype: str
    classes: list[str]
    mean: list[float]
    std: list[float]
    sigma_data: float
    bytes_per_sample: float
    num_looked_at: int
    num_unlabelled: int
    num_samples: None = None

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the tars' names and sizes, in order, and of how their samples are read."""
        tars = [(tar.key.rpartition("/")[2], tar.bytes) for tar in self.tars]
        parts = [self.shape, self.dtype, self.classes, self.settings.image_size, tars]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def channel_means(self) -> list[float]:
        return self.mean

    @property
    def fields(self) -> list[Field]:
        return plain_fields(self.shape, self.dtype, self.classes, [0] * len(self.classes), self.mean, self.std)

    def notes(self) -> tuple[str, ...]:
        """What a person should know before the run, a line each."""
        folders = {tar.folder for tar in self.tars}
        how = "scoreray data pack FOLDER FOLDER, once they are in one,"
        if isinstance(self.source, str) and len(folders) == 1:
            source = f"'{self.source}'" if names_tars(self.source) else self.source
            how = f"scoreray data pack {source} {folders.pop()}"
        does = "indexes them in place"
        if self.settings.image_size is not None:  # an index in place takes pictures as they are
            how, does = f"scoreray data pack TARS URL --image-size {self.settings.image_size}", "makes new tars of them"
        promise = (
            f"data.url: {len(self.tars):,} tars without a manifest: a worker takes whole tars, and a resume "
            f"reads those that were open again, so that not every sample is seen exactly once an epoch; {how} {does}, "
            "for exactly once and resumes that change nothing"
        )
        if not self.classes or not self.num_unlabelled:
            return (promise,)
        return promise, (
            f"data.num_classes: {self.num_unlabelled} of the first {self.num_looked_at} samples have no class; they "
            "are trained on without one"
        )

    def read(self, sample: TarSample) -> tuple[np.ndarray, int]:
        """(uint8 [H, W, C] or float32 array, its class or -1). Raises DataError, which begins with the byte."""
        member = sample.member()
        name = member.place
        if sample.label >= len(self.classes):
            accepted = f"data.num_classes is {len(self.classes)}" if self.classes else "the first samples have none"
            raise DataError(f"{name}: has class {sample.label}, and {accepted}; set it to the number of classes")
        array = _array(member, self.settings.image_size)
        check_fits(self.shape, self.dtype, member, array, FIT)
        if array.dtype == np.uint8 and array.shape[2] != self.shape[0]:
            if self.shape[0] == 1:
                raise DataError(
                    f"{name}: has colours, and the first samples are grey; scoreray data pack reads all of them before "
                    "it decides"
                )
            array = np.broadcast_to(array, (*array.shape[:2], self.shape[0]))
        return array, sample.label


def open_data(
    url: str | Sequence[str], settings: TarSettings | None = None, *, patient: bool = False
) -> Manifest | BucketedSet | UnpackedTars:
    """The manifest of the data set at `url`, or, where there is none, what the tars that it names show.

    Raises UserError (no data, or what the samples don't show is not set), DataError and StorageError; unless `patient`,
    the last within seconds where the store does not answer.
    """
    settings = settings or TarSettings()
    with key_in_errors("data.url") if names_tars(url) else contextlib.nullcontext():
        found = locate(url, patient=patient)
    if isinstance(found, Manifest | BucketedSet):
        _check_settings(found, settings)
        return found
    return look_at(url if isinstance(url, str) else tuple(url), found, settings)


def locate(url: str | Sequence[str], *, patient: bool = False) -> Manifest | BucketedSet | list[StoredTar]:
    """The manifest of the data set at `url`, or its buckets, or the tars that it names. Raises as `open_data`."""
    if not isinstance(url, str) or names_tars(url):
        return find_tars(url, patient)
    store = open_store(url)
    if not patient:
        store.check_reachable()
    try:
        return Manifest.load(store)
    except UserError:  # there is none
        if store.exists(BUCKETS):
            return BucketedSet.load(store)
        found = [] if store.list(PACKING) else tars_at(url).shards
        if not found:
            raise
        return [StoredTar(store.url(), key, size) for key, size in found]


@dataclass(frozen=True)
class TarsSummary:
    """What the first samples of tars without a manifest show. labels: the least and the greatest, None without any."""

    url: str
    num_tars: int
    bytes: int
    num_looked_at: int
    shape: list[int]
    dtype: str
    labels: tuple[int, int] | None
    mean: list[float]
    std: list[float]
    sigma_data: float


def summary_of(url: str, tars: Sequence[StoredTar]) -> TarsSummary:
    """Raises UserError, DataError, StorageError."""
    seen = _first_samples(tars, TarSettings())
    labels, num_bytes = [label for label in seen.labels if label >= 0], sum(tar.bytes for tar in tars)
    (shape, mean, std, sigma_data), dtype = _scale(seen.arrays), str(seen.arrays[0].dtype)
    ends = (min(labels), max(labels)) if labels else None
    return TarsSummary(url, len(tars), num_bytes, len(seen.arrays), shape, dtype, ends, mean, std, sigma_data)


def look_at(source: str | tuple[str, ...], tars: Sequence[StoredTar], settings: TarSettings) -> UnpackedTars:
    """What the first samples of some of the tars show. Raises UserError, DataError, StorageError."""
    seen = _first_samples(tars, settings)
    count, labels = len(seen.arrays), [label for label in seen.labels if label >= 0]
    if labels and settings.num_classes is None:
        raise UserError(
            f"data.num_classes: samples have classes (0 to {max(labels)} in the first {count}); tars without a "
            f"manifest don't say how many there are: set it; {NO_CLASSES}"
        )
    if settings.num_classes and not labels:
        raise UserError(
            f"data.num_classes: {settings.num_classes}, and none of the first {count} samples has a class (.cls, or a "
            f"number in .json); {NO_CLASSES}"
        )
    if settings.num_classes and max(labels) >= settings.num_classes:
        raise UserError(
            f"data.num_classes: {settings.num_classes}, and the first {count} samples have classes 0 to {max(labels)}"
        )
    shape, mean, std, sigma_data = _scale(seen.arrays)
    if sigma_data <= 0:
        raise UserError(f"{tars[0].url}: the first samples are all the same, nothing can be learned from them")
    classes = [str(number) for number in range(settings.num_classes or 0)]
    return UnpackedTars(source, settings, tuple(tars), shape, str(seen.arrays[0].dtype), classes, mean, std, sigma_data,
                        seen.num_bytes / count, count, count - len(labels))  # fmt: skip


@dataclass
class _Seen:
    """Samples that were looked at: uint8 [H, W, 1 or 3] or float32 arrays, all of one height and width or shape."""

    arrays: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_bytes: int = 0


def _first_samples(tars: Sequence[StoredTar], settings: TarSettings) -> _Seen:
    """Of some tars spread over the list; one at least. Raises DataError, also where a pickle or a cut tar is met."""
    apart = np.unique(np.linspace(0, len(tars) - 1, min(TARS_LOOKED_AT, len(tars))).astype(int)).tolist()
    seen = _Seen()
    for tar in [tars[number] for number in apart]:
        try:
            with naming(tar.store, tar.key):
                _look_into(tar, LOOKED_AT // len(apart), settings, seen)
        except DataError as error:
            if not settings.skips_bad:
                raise
            seen.problems.append(str(error))
    if not seen.arrays:
        raise DataError(f"{seen.problems[0]}; no sample can be read of the {len(apart)} tars that were looked at")
    return seen


def _look_into(tar: StoredTar, most: int, settings: TarSettings, seen: _Seen) -> None:
    """Adds the first samples of a tar. Raises DataError and UserError, which begin with the byte."""
    tape = tape_of(tar.store, tar.key, tar.bytes, LOOK_BYTES)
    samples = TarSamples(tape, settings.num_classes != 0, NO_CLASSES)
    sample = None
    for sample in itertools.islice(samples, most):
        try:
            member = sample.member()
            array = _array(member, settings.image_size)
            first = seen.arrays[0] if seen.arrays else array
            shape = (3, *first.shape[:2]) if first.dtype == np.uint8 else first.shape
            check_fits(shape, str(first.dtype), member, array, FIT)
        except DataError as error:
            if not settings.skips_bad:
                raise
            seen.problems.append(f"{tar.url}: {error}")
            continue
        if array.dtype != np.uint8 and array.ndim == 3 and layout_of(array.shape) == "NHWC":
            raise UserError(
                f"{member.place}: an array of {' x '.join(map(str, array.shape))} with its channels last, where the "
                "model takes [C, H, W]; write them so"
            )
        seen.arrays.append(array)
        seen.labels.append(sample.label)
    if sample is None:
        raise DataError("holds no sample")
    seen.num_bytes += tape.position


def _array(member: Member, image_size: int | None) -> np.ndarray:
    """uint8 [H, W, 1 or 3], fitted to `image_size` where that is given, or a float32 array. Raises DataError."""
    if image_size is None or member.name.lower().endswith(".npy"):
        return decoded(member)[0]
    image = open_picture(member.data, member.place)
    fitting = Fitting(image_size, image_size)
    return as_array(image, (1 if is_grey(image) else 3, image_size, image_size), fitting, member.place)


def _scale(arrays: Sequence[np.ndarray]) -> tuple[list[int], list[float], list[float], float]:
    """(shape, mean and standard deviation of each channel, sigma_data). Pictures are grey if all of these are."""
    first = arrays[0]
    is_picture = first.dtype == np.uint8
    channels = max(array.shape[2] for array in arrays) if is_picture else first.shape[0]
    shape = [channels, *first.shape[:2]] if is_picture else list(first.shape)
    moments = ChannelMoments(shape, str(first.dtype))
    for array in arrays:
        moments.add(np.broadcast_to(array, (*array.shape[:2], channels)) if is_picture else array)
    num_values = len(arrays) * math.prod(shape)
    return shape, *statistics(moments.sums, moments.squares, num_values, str(first.dtype))


def _check_settings(manifest: Manifest | BucketedSet, settings: TarSettings) -> None:
    """Raises UserError where settings say something else than the manifest, which says itself what they are for."""
    if settings.num_classes not in (None, len(manifest.classes)):
        raise UserError(
            f"data.num_classes: {settings.num_classes}, and the data set's manifest says {len(manifest.classes)}; "
            "leave it out: it is for tars without a manifest"
        )
    if settings.image_size is not None and manifest.shape[1:] != [settings.image_size] * 2:
        raise UserError(
            f"data.image_size: {settings.image_size}, and the data set's samples are "
            f"{' x '.join(map(str, manifest.shape))}; leave it out: it is for tars without a manifest, and "
            "scoreray data pack --image-size makes a data set of another size"
        )
