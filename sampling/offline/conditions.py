"""Conditions as words of a command line, NAME=VALUE, each for all samples of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from scoreray.data.errors import UserError, shortened
from scoreray.data.yaml_text import parse_value
from scoreray.sampling.guidance.observations import READ_SUFFIXES, read_values
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.config.condition_values import condition_of, described, from_json
from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec, is_unread
from scoreray.trainer.diffusion.condition_shapes import spec_of

WORDS = "a number, numbers with commas between (1.5,-2), or a file: npy, npz or a picture"
FAR_STDS = 10.0  # beyond which less than 1% of any data can be (Chebyshev), and nearly none of real data are
NOT_FINITE = ("nan", "inf", "infinity")  # YAML's own are .nan and .inf: these would be texts


def parse_conditions(pairs: Sequence[str]) -> dict[str, str]:
    """Values by name from words NAME=VALUE. Raises UserError."""
    found = dict[str, str]()
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f'--condition {shortened(pair)}: write NAME=VALUE, such as caption="a red circle"')
        if name in found:
            raise UserError(f"--condition {name}: is given twice; one value of each name conditions all samples")
        found[name] = value
    return found


def read_condition(words: Mapping[str, str], info: ModelInfo) -> Condition | None:
    """One row of what `words` say, in the data's own units; None of no words.

    A text is itself and a class its name or number; numbers are written with commas between, or are in a file (npy,
    npz, a picture), which is read here. Raises UserError in one line that names the condition, DataError, StorageError.
    """
    if words and not info.conditions:
        raise UserError(f"--condition {next(iter(words))}: this model takes no conditions; leave it out")
    try:
        values = {name: _value(name, word, spec_of(name, info.conditions)) for name, word in words.items()}
        return condition_of(values, info.conditions)
    except UserError as error:
        raise UserError(f"--{error}" if str(error).startswith("condition ") else str(error)) from None


def far_from_data(condition: Condition, conditions: Conditions) -> str | None:
    """A line on the first number of a vector that is far from all that the run was trained on, as its normaliser shows:
    beyond the range, or FAR_STDS standard deviations. None where there is none, or nothing is known."""
    for name, value in condition.values.items():
        spec = conditions[name]
        if spec.kind != "vector" or spec.normaliser is None or spec.normaliser.kind == "none" or is_unread(spec, value):
            continue
        most = 1.0 if spec.normaliser.kind == "range" else FAR_STDS
        far = value.abs() > most * (1 + 1e-5)  # float32's rounding of the range's own ends
        if bool(far.any()):
            channel = int(far.nonzero()[0, 1])
            ends = value.new_tensor([[-most], [most]]).expand(2, *spec.shape)
            given, low, high = spec.normaliser.invert(torch.cat([value[:1], ends]).double())[:, channel].tolist()
            return (
                f"condition '{name}': {given:g} is far from the data ("
                + ("their range is" if most == 1 else f"within {most:g} standard deviations they are")
                + f" {low:g} to {high:g}): samples may be arbitrary"
            )
    return None


def sha256_of(condition: Condition | None) -> str:
    """Of the values that are looked at, so that a job knows a file that was changed under its name; "" of none."""
    if condition is None:
        return ""
    found = hashlib.sha256()
    for name in sorted(condition.values):
        value, mask = condition.values[name], condition.mask(name)
        masked = (
            value if value.ndim < mask.ndim + 1 else value * mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim))
        )
        for tensor in (masked, mask):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _value(name: str, word: str, spec: ConditionSpec) -> Any:
    if spec.kind in ("class", "text"):
        return word
    is_file = word.lower().endswith(READ_SUFFIXES)
    if spec.takes_text and not is_file and not word.startswith("["):
        return word
    if is_file:
        return read_values(word, spec.shape[0] if spec.kind == "concat" else None)
    value = parse_value(word if word.startswith("[") else f"[{word}]", f"condition '{name}': {shortened(word)}")
    value = [float(one) if str(one).lower().lstrip("+-") in NOT_FINITE else one for one in value]
    try:
        if value or spec.kind == "sequence":
            return from_json(value)
    except (TypeError, ValueError) as error:  # also of what YAML has and JSON has not: a date
        if word.startswith("["):
            raise UserError(f"condition '{name}': '{shortened(word)}': {error}") from None
    raise UserError(f"condition '{name}': '{shortened(word)}', this model takes {described(spec)}; write {WORDS}")
