"""Values of a tar's members as fields, each error naming the member and its byte."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from scoreray.data.classes import NO_CLASS
from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.own_code import line_of, load
from scoreray.data.packing.tar_samples import PICTURES, TarSample
from scoreray.data.reading.allowlist import JSON, LABELS, TEXTS, found_format, json_value
from scoreray.data.reading.decode import decode_as_found, decode_class, npy_array
from scoreray.data.reading.field_values import member_value
from scoreray.data.reading.tars import Member
from scoreray.data.sources.field_options import CLASS_NAMES, FieldOption
from scoreray.data.sources.field_source import FieldValue
from scoreray.data.tables.values import value_text

Picture = Callable[[Field, Member], FieldValue]
"""The value of an image, as it is to be stored. Raises DataError naming the member."""


def member_of(option: FieldOption, sample: TarSample) -> Member:
    if option.where not in sample.members:
        known = nearest(option.where, sample.kinds)
        raise DataError(f"byte {sample.offset}: sample '{sample.key}' has no .{option.where} ({option}); {known}")
    member = sample.members[option.where]
    return _as_npy(option.decoder, member) if option.decoder else member


def _as_npy(decoder: str, member: Member) -> Member:
    """The member as an .npy of what somebody else's function makes of its bytes. Raises DataError naming it."""
    function = load(decoder, "--decoder")
    try:
        array = np.asarray(function(member.data))
    except Exception as error:  # the code is somebody else's
        raise DataError(f"{member.place}: --decoder {decoder}: {line_of(error)}") from error
    if array.dtype.hasobject:
        raise DataError(f"{member.place}: --decoder {decoder}: gave {array.dtype}; an array of numbers is needed")
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return Member(f"{member.name}.npy", member.offset, out.getvalue())


def own_value(member: Member) -> np.ndarray:
    """uint8 [H, W, C] of a picture, or of an array [1 or 3, H, W]; another array as it is."""
    if not member.name.lower().endswith(".npy"):
        return decoded(member)[0]
    array = named_member(member, npy_array, member.data)
    is_image = array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in (1, 3)
    return array.transpose(1, 2, 0) if is_image else array


def own_array(field: Field, member: Member) -> np.ndarray:
    array = own_value(member)
    check_fits(field.shape, field.dtype, member, array, "")
    return array


def picture_in_place(field: Field, member: Member) -> np.ndarray:
    """uint8 [H, W, C], as it is decoded. Raises DataError for one of another size than the field's."""
    array = own_value(member)
    check_fits(field.shape, "uint8", member, array, "--image-size makes new tars of one size")
    return array


def raw_of(option: FieldOption, member: Member) -> Any:
    """What a member, or a path in it, says: an array, number, text, list or dict; of numbers in JSON floats."""
    last, kind = "npy" if option.decoder else option.where.rpartition(".")[2], option.kind
    if last == "npy":
        return named_member(member, npy_array, member.data)
    if last == JSON and kind != "text":
        value = named_member(member, json_value, member.data, option.path)
        if value is None:
            raise DataError(f"{member.place}: '{option.path}' is null ({option})")
        is_class = kind == "class" or (kind is None and option.name in CLASS_NAMES)
        return value if is_class or kind == "json" else named_member(member, _as_floats, value)
    if kind == "class" or (kind is None and option.where in LABELS):
        return named_member(member, decode_class, member.data)
    if kind in ("text", "json", "scalar") or last in TEXTS:
        text = named_member(member, bytes.decode, member.data)
        return named_member(member, float, text) if kind == "scalar" else text
    accepted = (*PICTURES, "npy", JSON, *TEXTS, *LABELS)
    raise UserError(
        f"{option}: .{option.where} is of no kind that is read; {nearest(last, accepted)}; or --kind {option.name}=text"
    )


def _as_floats(value: Any) -> Any:
    """JSON's numbers are doubles, whether or not they are written with a point."""
    if isinstance(value, bool | str | dict):
        return value
    if isinstance(value, int | float):
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        found = np.asarray(value)
        return found.astype(np.float64) if found.dtype.kind in "iuf" else value
    return value


def asked_value(field: Field, option: FieldOption, sample: TarSample, picture: Picture) -> FieldValue:
    member = member_of(option, sample)
    if field.kind == "image":
        return picture(field, member)
    if field.kind in ("class", "scalar"):
        return _number(field, option, member)
    if field.kind == "json":
        named_member(member, json_value, member.data, "")
        return member.data
    code, others = format_of(field, member), "the first samples have"  # there is no manifest yet
    value = named_member(member, member_value, field, member.data, code, others)
    return value.tobytes().decode() if field.kind == "text" else value


def _number(field: Field, option: FieldOption, member: Member) -> FieldValue:
    """A class or a scalar."""
    raw = raw_of(replace(option, kind=field.kind), member)
    if field.kind == "class":
        if isinstance(raw, str) and raw.strip().isdecimal():
            raw = named_member(member, int, raw)
        whole = raw.is_integer() if isinstance(raw, float) else isinstance(raw, int) and not isinstance(raw, bool)
        if not whole or raw < NO_CLASS:
            raise DataError(
                f"{member.place}: {value_text(raw)} is no class ({option}); in tars classes are whole "
                f"numbers from 0; --kind {field.name}=text keeps words"
            )
        return int(raw)
    array = np.asarray(raw)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise DataError(f"{member.place}: {value_text(raw)} is no number ({option})")
    with np.errstate(all="ignore"):
        value = array.reshape(()).astype(field.dtype)
    if array.dtype != value.dtype and not np.array_equal(value, array.reshape(()), equal_nan=True):
        raise DataError(f"{member.place}: {value_text(raw)} is no {field.dtype} ({option})")
    return cast(float, value[()])


def format_of(field: Field, member: Member) -> int:
    if field.kind == "image" or (field.name == field.kind == "array"):
        return found_format(member.name.lower(), member.data)
    last = field.member.rpartition(".")[2]
    return FORMATS[last if last in ("npy", JSON) else JSON if field.kind == "json" else "txt"]


def named_member(member: Member, call: Callable[..., Any], *args: Any) -> Any:
    """call(*args); an error becomes a DataError that names the member."""
    try:
        return call(*args)
    except (DataError, ValueError, OverflowError) as error:
        raise DataError(f"{member.place}: {' '.join(str(error).split())}") from error


def decoded(member: Member) -> tuple[np.ndarray, int]:
    """A sample as it is found, and the format by which it is read again. Raises DataError naming the member."""
    code = found_format(member.name.lower(), member.data)
    return named_member(member, decode_as_found, member.data, code), code


def check_fits(shape: Sequence[int], dtype: str, member: Member, values: np.ndarray, fix: str) -> None:
    """Raises DataError for a sample of another shape or type than the first has, or one that is not finite. Grey
    pictures are among coloured ones. `fix`: what to do about pictures of another size."""
    if values.dtype == dtype == "uint8" and values.shape[:2] != tuple(shape[1:]):
        height, width = values.shape[:2]
        raise DataError(
            f"{member.place}: is {width} x {height} pixels, the first sample has {shape[2]} x {shape[1]}; {fix}"
        )
    if values.dtype != dtype or (dtype != "uint8" and values.shape != tuple(shape)):
        raise DataError(f"{member.place}: is {values.dtype} {values.shape}, the first sample {dtype} {tuple(shape)}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        at = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DataError(f"{member.place}: holds a value that is not finite, {values[tuple(at)]} at {at}")
