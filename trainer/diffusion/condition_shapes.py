"""Conditions in the shapes that a network was built for: whether one is, examples, and what one lacks filled up."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import (
    HAS_LENGTH,
    LABEL,
    AnyCondition,
    Condition,
    Conditions,
    ConditionSpec,
    as_condition,
    is_encoded,
)


def check_condition(condition: AnyCondition, conditions: Conditions, rows: int) -> None:
    """Raises UserError where names, shapes or (on the CPU, where looking costs no synchronisation) classes of a
    condition of `rows` samples are not those that a network was built for."""
    if isinstance(condition, Tensor) and (condition.shape != (rows,) or condition.is_floating_point()):
        raise UserError(
            f"class_labels are {condition.dtype} {tuple(condition.shape)}: give one integer for each of the {rows} "
            "samples"
        )
    given = as_condition(condition, conditions)
    if given is None:
        return
    for name, value in given.values.items():
        spec = spec_of(name, conditions)
        check_value(name, spec, value, given.masks.get(name), rows)
        if spec.kind == "class" and value.device.type == "cpu":
            check_labels(name, value, spec.num_classes)


def spec_of(name: str, conditions: Conditions) -> ConditionSpec:
    """What a network takes under this name. Raises UserError where it was not built for it."""
    if name not in conditions:
        known = f"it takes {', '.join(conditions)}" if conditions else "it takes none"
        raise UserError(f"condition '{name}': this network was not built for it; {known}")
    return conditions[name]


def check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Raises UserError where a class label int64 [B] is none of the network's."""
    bad = (labels < -1) | (labels >= num_classes)
    if bool(bad.any()):
        what = "class label" if name == LABEL else f"condition '{name}': class label"
        raise UserError(
            f"{what} {int(labels[bad][0])} is out of range: the network knows 0 to {num_classes - 1}, and -1 for no "
            "class"
        )


def check_value(name: str, spec: ConditionSpec, value: Tensor, mask: Tensor | None, rows: int) -> None:
    """Raises UserError where the value or mask of one name has not the shape that a network was built for. It may be a
    shorter sequence or text. Only shapes are read, so networks call it in a compiled graph."""
    if spec.kind == "class":
        if value.shape != (rows,) or value.is_floating_point():
            raise UserError(
                f"condition '{name}': {value.dtype} {list(value.shape)}; give an integer a sample, [{rows}]"
            )
        return
    shape = list(value.shape)
    if spec.kind in HAS_LENGTH:
        most = [*spec.shape, *shape[2:]] if is_encoded(spec, value) else list(spec.shape)
        fits = len(shape) == 1 + len(most) and shape[1] <= most[0] and shape[2:] == most[1:]
        expected = [rows, f"up to {most[0]}", *most[1:]]
        lead = shape[:2]
    else:
        fits = spec.fits(shape[1:])
        expected, lead = [rows, *spec.shape], shape[:1]
    if not fits or shape[0] != rows:
        raise UserError(f"condition '{name}' of shape {shape}: the network was built for {expected}")
    if (mask is None and spec.kind in HAS_LENGTH) or (mask is not None and list(mask.shape) != lead):
        raise UserError(
            f"condition '{name}': its mask must be bool {lead}, it is {mask if mask is None else list(mask.shape)}"
        )


def example_condition(conditions: Conditions, rows: int, device: torch.device | str = "cpu") -> Condition | None:
    """A value of every name in the shapes that a network was built for, the same at every call, for probes and to warm
    up: classes in turn, normal numbers, levels from 0 to 1, sequences and texts of the greatest length and of shorter
    ones. None of an unconditional network."""
    generator = torch.Generator().manual_seed(0)
    values, masks = dict[str, Tensor](), dict[str, Tensor]()
    for name, spec in conditions.items():
        value, mask = spec.null(rows)
        if spec.kind == "class":
            values[name] = torch.arange(rows) % spec.num_classes
            continue
        if spec.kind == "text":
            value.random_(ord("a"), ord("z"), generator=generator)
        elif spec.kind == "level":
            value.uniform_(generator=generator)
        else:
            value.normal_(generator=generator)
        values[name], masks[name] = value, ~mask
        if spec.kind in HAS_LENGTH:
            length = spec.shape[0]
            masks[name] = torch.arange(length) < (length - torch.arange(rows) % length)[:, None]
    return Condition(values, masks).to(device) if values else None


def _is_complete(condition: Condition, conditions: Conditions) -> bool:
    """Whether `complete` would change nothing; joining it to a null would cost a copy, and fix the batch of a graph."""
    return all(
        name in condition.values
        and (spec.kind == "class" or name in condition.masks)
        and (spec.kind not in HAS_LENGTH or condition.values[name].shape[1] == spec.shape[0])
        for name, spec in conditions.items()
    )


def complete(
    condition: Condition | None, conditions: Conditions, rows: int, device: torch.device | str = "cpu"
) -> Condition:
    """`condition` of `rows` rows (None: the null, on `device`) with every name, sequences and texts padded to their
    greatest length, and a mask for each: kernels and compiled graphs are chosen by shapes, so calls should have one."""
    count, read = rows, set[str]()
    if condition is not None:
        if _is_complete(condition, conditions):
            return condition
        device, count = next(iter(condition.values.values())).device, 1
        read = {name for name, value in condition.values.items() if is_encoded(conditions[name], value)}  # are complete
    nulls = {name: spec.null(count, device) for name, spec in conditions.items() if name not in read}
    null = Condition(
        {name: value for name, (value, _) in nulls.items()},
        {name: mask for name, (_, mask) in nulls.items() if conditions[name].kind != "class"},
    )
    if condition is None:
        return null
    joined = Condition.cat([condition, null], [rows, 1])
    assert joined is not None, "a network that takes conditions"
    return joined[:rows]
