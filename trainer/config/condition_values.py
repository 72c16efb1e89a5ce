"""Conditions from plain values in the data's units, as command lines, requests and stored samples have them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.classes import class_number
from scoreray.data.errors import UserError, key_in_errors, shortened
from scoreray.data.reading.decode import npy_array
from scoreray.data.reading.field_values import FieldTensors
from scoreray.trainer.diffusion.condition import HAS_LENGTH, Condition, Conditions, ConditionSpec, is_unread
from scoreray.trainer.diffusion.condition_shapes import spec_of
from scoreray.trainer.networks.conditioning import resized

LARGEST = float(np.finfo(np.float32).max)
UNEQUAL = "lists of unequal lengths; give lists of one length"
MOST_BYTES = 1 << 17  # of a text that an encoder reads, whose tokenizer cuts it
DEEPEST = 8  # lists in lists: more than any network's samples have dimensions
VALUE_WORDS = (
    "a text, a number, a class by name or number, a list of numbers, lists of lists, "
    '{"npy": BASE64} of an .npy file, or null for none'
)
VALUE_SCHEMA: dict[str, Any] = {
    "description": VALUE_WORDS,
    "anyOf": [
        *({"type": kind} for kind in ("string", "number", "array", "null")),
        {
            "type": "object",
            "properties": {"npy": {"type": "string", "contentEncoding": "base64"}},
            "required": ["npy"],
            "additionalProperties": False,
        },
    ],
}
ConditionValue = str | int | float | bytes | np.ndarray | None
"""What a JSON value means; bytes are those of an .npy."""


def condition_of(values: Mapping[str, Any], conditions: Conditions) -> Condition | None:
    """One row, as a network built for `conditions` takes it, from values in the data's own units.

    A class is its name or number (`data.classes`), a text a str; a vector is a number or numbers [D], a grid
    [C, ...] (of one channel also [...]), a sequence [L, D]: nested lists, a numpy array, a tensor or the bytes of an
    .npy; of a vector or sequence that an encoder made of texts also a str, which `read_texts` reads. None, a text
    without a byte and a sequence without a token ([0, D] or an empty list) are the null, as is a name that is left out.
    None where nothing is given. Raises UserError in one line that names the condition.
    """
    found: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, value in values.items():
        spec = spec_of(name, conditions)
        if value is None:
            continue
        with key_in_errors(f"condition '{name}'"):
            row = _row(value, spec)[None]
        if spec.kind in HAS_LENGTH or is_unread(spec, row):
            masks[name] = torch.full((1, max(1, row.shape[1])), row.shape[1] > 0)
            row = row if row.shape[1] else row.new_zeros((1, 1, *row.shape[2:]))
        found[name] = row
    condition = normalised(Condition(found, masks), conditions) if found else None
    for name, row in condition.values.items() if condition else ():
        if not bool(row.isfinite().all()):  # divided by a small scale, a number may leave float32
            raise UserError(f"condition '{name}': numbers too large for float32 once normalised; give smaller ones")
    return condition


def condition_of_fields(found: FieldTensors, sources: Mapping[str, str], conditions: Conditions) -> Condition | None:
    """What conditions samples, in the data's own units, from the fields that `sources` names; None of no names."""
    values = {name: found.fields[source] for name, source in sources.items()}
    masks = {name: found.masks[source] for name, source in sources.items() if source in found.masks}
    for name, value in values.items():
        if conditions[name].kind == "sequence" and name not in masks:  # an array of tokens, all of them there
            masks[name] = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    return Condition(values, masks) if values else None


def normalised(condition: Condition, conditions: Conditions) -> Condition:
    """A condition in the data's own units, as the network takes it: its normalisers applied, grids of the size that it
    was trained with, numbers in float32."""
    values = dict(condition.values)
    for name, value in values.items():
        spec = conditions[name]
        if spec.kind in ("class", "text") or is_unread(spec, value):
            continue
        if spec.normaliser is not None:
            last = -1 if spec.kind == "sequence" else 1  # the axis of its channels
            value = spec.normaliser.apply(value.movedim(last, 1)).movedim(1, last)
        if spec.kind == "concat":  # a network sees the sizes that it was trained with, and calls are of one shape
            value = resized(value, spec.shape[1:])
        values[name] = value.float()
    return Condition(values, condition.masks)


def _row(value: Any, spec: ConditionSpec) -> Tensor:
    """The value of one sample: int64 [], uint8 [n] or float [...], of a shape that fits."""
    if spec.kind == "class":
        if isinstance(value, bytes) or (isinstance(value, np.ndarray | Tensor) and value.ndim):
            raise UserError(f"{_shown(value)}, this model takes {described(spec)}")
        return torch.tensor(class_number(value, spec.classes))
    if spec.kind == "text":
        return _text(value, spec.shape[0])
    if spec.takes_text and isinstance(value, str):
        return _text(value, MOST_BYTES)
    array = _numbers(value, spec)
    if spec.kind == "vector" and not array.ndim:
        array = array[None]
    if spec.kind == "sequence" and array.shape == (0,):  # an empty list does not say what its tokens would be
        array = array.reshape(0, *spec.shape[1:])
    if spec.kind == "concat" and spec.shape[0] == 1 and array.ndim == len(spec.shape) - 1:
        array = array[None]
    if not spec.fits(array.shape):
        raise UserError(f"numbers of shape {list(array.shape)}, this model takes {described(spec)}")
    if spec.kind == "sequence" and len(array) > spec.shape[0]:
        raise UserError(f"{len(array):,} tokens, this model takes at most {spec.shape[0]:,}; cut it")
    held = np.abs(array) <= LARGEST  # False for NaN too
    if not held.all():
        where = [int(axis) for axis in np.argwhere(~held)[0]]
        raise UserError(f"{array[tuple(where)]} at index {where}; give finite numbers that float32 holds")
    return torch.from_numpy(array)


def _text(value: Any, most: int) -> Tensor:
    if not isinstance(value, str):
        raise UserError(f"{_shown(value)}, this model takes a text")
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise UserError(f"text {ascii(value)[:80]} is not Unicode that UTF-8 can hold") from None
    if len(data) > most:
        raise UserError(f"a text of {len(data):,} bytes (UTF-8), this model takes at most {most:,}; shorten it")
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _numbers(value: Any, spec: ConditionSpec) -> np.ndarray:
    """Real numbers, float32 or, of Python's numbers and wide types, float64. Raises UserError."""
    if isinstance(value, str):
        raise UserError(f"text '{shortened(value, 40)}', this model takes {described(spec)}")
    try:
        if isinstance(value, bytes):
            array = npy_array(value)
        elif isinstance(value, Tensor):
            value = value.detach().cpu()
            array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        else:
            array = np.asarray(value)
    except Exception as error:  # untrusted bytes, and lists whose rows differ in length
        reason = UNEQUAL if isinstance(value, list | tuple) else " ".join(str(error).split())
        raise UserError(f"{_shown(value)} can't be read as numbers: {shortened(reason)}") from None
    if array.dtype.kind not in "fiu":
        raise UserError(f"{_shown(value)}, this model takes {described(spec)}")
    # A copy: the array may be a view of the caller's bytes, which torch can't have as its own.
    return array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)


def described(spec: ConditionSpec) -> str:
    """What a condition is given as, as messages and summaries say it."""
    if spec.kind == "class":
        return f"one of {spec.num_classes:,} classes"
    if spec.kind == "text":
        return f"a text of up to {spec.shape[0]:,} bytes"
    or_text = "a text, or " if spec.takes_text else ""
    if spec.kind == "vector":
        count = spec.shape[0]
        return or_text + ("a number" if count == 1 else f"{count} numbers")
    if spec.kind == "sequence":
        return f"{or_text}numbers of shape [up to {spec.shape[0]}, {spec.shape[1]}]"
    return f"numbers of shape {list(spec.shape)}, of any size but the first"


def _shown(value: Any) -> str:
    """A value as a message shows it: its type, and itself where it is short."""
    if isinstance(value, np.ndarray | Tensor):
        return f"an array of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 64):
        return f"{value}"
    return f"a value of type {type(value).__name__}"


def from_json(value: Any) -> ConditionValue:
    """A value of JSON, as `VALUE_SCHEMA` has it, as one that `condition_of` takes. Raises ValueError."""
    if value is None or isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, list):
        _check_numbers(value, DEEPEST)
        try:
            return np.asarray(value, np.float64)
        except ValueError:
            raise ValueError(UNEQUAL) from None
        except OverflowError:  # an integer of 400 digits
            raise ValueError("an integer in the list is too large for a float; give a smaller one") from None
    if isinstance(value, dict) and value.keys() == {"npy"} and isinstance(value["npy"], str):
        try:
            return base64.b64decode(value["npy"], validate=True)
        except (binascii.Error, ValueError):
            raise ValueError('{"npy": ...} is not base64, as RFC 4648 has it in section 4') from None
    raise ValueError(f"{_json_shown(value)}: must be {VALUE_WORDS}")


def _check_numbers(value: list[Any], deepest: int) -> None:
    """Raises ValueError unless all are numbers, or all lists of such. (numpy would read "1", true and null as numbers,
    and make 240 KB of each number beside one text of 60,000 characters.)"""
    kinds = set(map(type, value))
    if kinds == {list}:
        if not deepest:
            raise ValueError(f"lists in lists, more than {DEEPEST} deep")
        for inner in value:
            _check_numbers(inner, deepest - 1)
    elif not kinds <= {int, float}:
        odd = next(one for one in value if type(one) not in (int, float))
        raise ValueError(f"{_json_shown(odd)} in a list: must be numbers, or lists of one length")


def _json_shown(value: Any) -> str:
    """A value of JSON in a message; of lists and objects, which may be deeper than can be written, what they are."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return shortened(json.dumps(value))
