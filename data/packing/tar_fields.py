"""Which members of a tar's samples are which fields: its own image or array, its class, and what `--field` names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np

from scoreray.data.classes import NO_CLASS
from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.fields.field import Field, plain_fields
from scoreray.data.fields.field_kinds import FIELD_DTYPES, FieldDtype
from scoreray.data.packing.tar_members import (
    Picture,
    asked_value,
    decoded,
    format_of,
    member_of,
    named_member,
    own_array,
    own_value,
    raw_of,
)
from scoreray.data.packing.tar_samples import PICTURES, TarSample, TarSamples
from scoreray.data.reading.allowlist import JSON, json_value
from scoreray.data.reading.tars import WINDOW_BYTES, Member, Tape
from scoreray.data.sources.field_options import FieldOption, FieldOptions
from scoreray.data.sources.field_source import FieldValue
from scoreray.data.sources.layout import Layout, has_channels_first, order_of
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.store import NotFound, Store
from scoreray.data.tables.kinds import Column, alike, field_of

LOOKED_AT = 8  # samples by which kinds and shapes are found
OWN_CLASS = Field("label", "class", [], "int64", "cls")


@dataclass(frozen=True)
class TarField:
    """asked: None for what a sample has without --field, its own image, array or class."""

    field: Field
    asked: FieldOption | None = None


@dataclass(frozen=True)
class TarFields:
    """The fields of a tar's samples, in the order of the manifest."""

    each: tuple[TarField, ...]

    @property
    def fields(self) -> list[Field]:
        return [one.field for one in self.each]

    @property
    def own(self) -> Field | None:
        """The sample's own image or array."""
        return next((one.field for one in self.each if one.asked is None and one.field.kind != "class"), None)

    def samples(self, tape: Tape) -> TarSamples:
        labelled = any(one.asked is None and one.field.kind == "class" for one in self.each)
        asked = [one.asked for one in self.each if one.asked]
        return TarSamples(tape, labelled, wanted=wanted_of(asked), takes_image=self.own is not None)

    def values(self, sample: TarSample, picture: Picture) -> dict[str, FieldValue]:
        """Those of a sample, by the fields' names. Raises DataError, which begins with the byte."""
        if sample.problem:
            raise DataError(sample.problem)
        found: dict[str, FieldValue] = {}
        for one in self.each:
            field = one.field
            if one.asked is not None:
                found[field.name] = asked_value(field, one.asked, sample, picture)
            elif field.kind == "class":
                found[field.name] = sample.label
            else:
                member = sample.member()
                found[field.name] = picture(field, member) if field.kind == "image" else own_array(field, member)
        return found

    def stored(self, sample: TarSample) -> dict[str, tuple[Member, int]]:
        """The members that the index points to and their formats, by their extensions."""
        found = {}
        for one in self.each:
            if not one.field.is_inline:
                member = sample.member() if one.asked is None else sample.members[one.asked.where]
                found[one.field.member] = member, format_of(one.field, member)
        return found


def images_of_shape(shape: tuple[int, int, int], labelled: bool, reads: TarFields | None = None) -> TarFields:
    """`reads`, or images and their class alone, with the samples' own images in a shape that they are brought to."""
    if reads is None:
        image = plain_fields(shape, "uint8", [], [], [], [])[0]
        return TarFields((TarField(image), *([TarField(OWN_CLASS)] if labelled else [])))
    own = reads.own
    each = (
        replace(one, field=replace(one.field, shape=list(shape))) if one.field is own else one for one in reads.each
    )
    return TarFields(tuple(each))


def wanted_of(asked: Sequence[FieldOption]) -> dict[str, frozenset[str]]:
    """As TarSamples takes it: extensions, and the keys at the top of JSON that are read, none for all."""
    whole = {one.where for one in asked if not one.path}
    return {
        one.where: frozenset()
        if one.where in whole
        else frozenset(other.path.split(".")[0] for other in asked if other.where == one.where)
        for one in asked
    }


def find_tar_fields(
    store: Store, shards: Sequence[tuple[str, int]], asked: FieldOptions, options: SourceOptions, skips_bad: bool
) -> TarFields:
    """The fields of the tars, by their first samples that can be read: those of --field, after the samples' own image
    or array if no other is named, and their class if no other is. Images have three channels: whether all are grey is
    known when all are read.

    Raises UserError for a field that is not there or of no kind that is packed, DataError when no sample can be read,
    or, without `skips_bad`, the first.
    """
    for key, size in shards:
        with naming(store, key):
            first = TarSamples(tape_of(store, key, size), options.labelled, wanted=wanted_of(asked.fields))
            samples = _first_complete(first, asked, options, skips_bad)
            if samples:
                found = _fields_of(samples, asked, options)
                asked.check_names([one.field.name for one in found.each], store.url(key))
                return found
    raise DataError(f"{store.url(shards[0][0])}: holds no sample" + " that can be read" * skips_bad)


def _first_complete(first: TarSamples, asked: FieldOptions, options: SourceOptions, skips_bad: bool) -> list[TarSample]:
    """The first that have every member that is asked for. Raises, unless `skips_bad`, UserError for a member that none
    of those that are looked at has, DataError for one that some lack."""
    samples, lacking = list[TarSample](), list[DataError]()
    never = {option.where: option for option in asked.fields}
    for sample in first:
        never = {where: option for where, option in never.items() if where not in sample.members}
        try:
            _check_complete(sample, asked)
            if sample.image is not None:
                own_field(sample.image, options.layout)
            samples.append(sample)
        except DataError as error:
            lacking.append(error)
        most = LOOKED_AT if asked.fields else 1
        if len(samples) == most or (lacking and not skips_bad and len(samples) + len(lacking) >= most):
            break
    if lacking and not skips_bad:
        mistaken = [error for error in lacking if any(str(option) in str(error) for option in never.values())]
        raise UserError(str(mistaken[0])) if mistaken else lacking[0]
    return samples


def _check_complete(sample: TarSample, asked: FieldOptions) -> None:
    if sample.problem and (not asked.fields or (sample.image is None and not sample.members)):
        raise DataError(sample.problem)
    for option in asked.fields:
        member_of(option, sample)


def _fields_of(samples: Sequence[TarSample], asked: FieldOptions, options: SourceOptions) -> TarFields:
    found = [TarField(_asked_field(option, samples, options), option) for option in asked.fields]
    own, label = list[TarField](), list[TarField]()
    if samples[0].image is not None and not any(one.field.kind in ("image", "array") for one in found):
        own = [TarField(own_field(samples[0].image, options.layout))]
    is_labelled = not asked.fields or any(sample.label != NO_CLASS for sample in samples)
    if options.labelled and is_labelled and not any(one.field.kind == "class" for one in found):
        label = [TarField(OWN_CLASS)]
    normalisations = dict(asked.normalisations)
    each = [*own, *found, *label]
    names = [one.field.name for one in each]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        option = next(one.asked for one in found if one.field.name == twice)
        raise UserError(f"{option}: '{twice}' is the name of the samples' own image, array or class; give another name")
    return TarFields(
        tuple(
            one if one.asked else replace(one, field=replace(one.field, normalisation=normalisations[one.field.name]))
            if one.field.name in normalisations else one
            for one in each
        )
    )  # fmt: skip


def own_field(member: Member, layout: Layout | None) -> Field:
    """The field of a sample's own image, with three channels, or array. Raises DataError, UserError naming it."""
    array = own_value(member)
    extension = member.name.rpartition(".")[2].lower()
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (1, 3):
        return replace(plain_fields((3, *array.shape[:2]), "uint8", [], [], [], [])[0], member=extension)
    _check_order(f"'{member.name}'", array.shape, layout)
    if str(array.dtype) not in FIELD_DTYPES or not array.ndim:
        raise DataError(f"{member.place}: is {array.dtype} {array.shape}; accepted: {', '.join(FIELD_DTYPES)}")
    return Field("array", "array", list(array.shape), cast(FieldDtype, str(array.dtype)), extension)


def _check_order(name: str, shape: Sequence[int], layout: Layout | None) -> None:
    """Raises UserError for an array whose channels are not its first axis."""
    found = order_of(name, shape, layout)
    if found is not None and not has_channels_first(found):
        how = "with its channels last" if found.endswith("C") else "without channels"
        raise UserError(
            f"{name}: an array of {' x '.join(map(str, shape))} {how}, where the model takes [C, H, W] "
            "and tars are indexed as they are; write them so, or if they are, say --layout NCHW"
        )


def _asked_field(option: FieldOption, samples: Sequence[TarSample], options: SourceOptions) -> Field:
    """The field that an option asks for. Raises UserError where its members make none of a kind that is packed."""
    last = option.where.rpartition(".")[2]
    if option.path and last != JSON:
        raise UserError(f"{option}: a path is within JSON; .{option.where} is none")
    members = [member_of(option, sample) for sample in samples]
    normalisation = option.normalisation or "none"
    is_picture = last in PICTURES and option.kind is None and not option.decoder
    if is_picture or option.kind == "image":
        pictures, broken = _readable(decoded, members)
        if not pictures:
            raise broken[0]
        height, width, _ = pictures[0][0].shape
        shape = [3, fitting.height, fitting.width] if (fitting := options.fitting) else [3, height, width]
        return Field(option.name, "image", shape, "uint8", option.where, normalisation=normalisation)
    raws = _raws_of(option, members)
    rank = max(np.ndim(raw) if isinstance(raw, np.ndarray) else 0 for raw in raws)
    about = Column(kind="array" if rank > 2 else None)
    found = field_of(option, about, raws, options, str(option), _no_files)
    if isinstance(raws[0], np.ndarray):
        _check_array(option, found, raws[0], options.layout)
    if found.kind == "json" and option.path:
        raise UserError(f"{option}: holds {type(raws[0]).__name__}s; name what is in them: {option}.KEY")
    if found.normalisation != normalisation and found.kind in ("text", "json", "class"):
        raise UserError(f"--normalise {option.name}={normalisation}: a {found.kind} has no numbers to normalise")
    where = f"{option.where}.npy" if option.decoder else option.where
    return replace(found, member=where, path=option.path, normalisation=normalisation)


def _raws_of(option: FieldOption, members: Sequence[Member]) -> list[Any]:
    """What the members that can be read say: `alike` of them; what others lack is said when they are packed. Raises
    UserError for a path that none of them has, DataError where none can be read."""
    raws, lacking = _readable(partial(raw_of, option), members)
    if raws:
        return alike(raws)
    if option.path:
        named_member(members[0], json_value, members[0].data, "")  # of bytes that are no JSON the path is not to blame
        raise UserError(str(lacking[0])) from lacking[0]
    raise lacking[0]


def _readable(read: Callable[[Member], Any], members: Sequence[Member]) -> tuple[list[Any], list[DataError]]:
    found, problems = list[Any](), list[DataError]()
    for member in members:
        try:
            found.append(read(member))
        except DataError as error:
            problems.append(error)
    return found, problems


def _check_array(option: FieldOption, field: Field, first: np.ndarray, layout: Layout | None) -> None:
    """Raises UserError for an array that can't be read as it is stored."""
    if field.is_inline:
        return
    if str(first.dtype) != field.dtype:
        raise UserError(f"{option}: values are {first.dtype}; accepted: {', '.join(FIELD_DTYPES)}, little-endian")
    if field.kind == "sequence" and first.ndim != 2:
        raise UserError(f"{option}: arrays of {first.ndim} axes and several lengths; a sequence is [length, width]")
    if field.kind == "array":
        _check_order(str(option), first.shape, layout)


def _no_files(path: str) -> bytes:
    raise DataError(f"'{shortened(path)}' is no picture")


def marks_of(fields: Sequence[Field]) -> str:
    """What of the fields determines a shard, as text: all but what only the manifest says."""
    return json.dumps([replace(field, normalisation="none").as_dict() for field in fields])


@contextlib.contextmanager
def naming_sample(sample: TarSample) -> Iterator[None]:
    """Puts the sample's place and key before what an error in it says."""
    try:
        yield
    except DataError as error:
        raise DataError(f"byte {sample.offset}: sample '{sample.key}': {error}") from error


def tape_of(store: Store, key: str, size: int, window_bytes: int = WINDOW_BYTES) -> Tape:
    return Tape(partial(store.get, key), size, window_bytes=window_bytes)


@contextlib.contextmanager
def naming(store: Store, key: str) -> Iterator[None]:
    """Puts the shard's URL before what an error in it says."""
    try:
        yield
    except NotFound as error:
        raise DataError(f"{error}; it was there when the tars were listed") from error
    except (DataError, UserError) as error:
        raise type(error)(f"{store.url(key)}: {error}") from error
