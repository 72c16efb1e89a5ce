"""Whether a condition is one that a network was built for; one line where it is not."""

from __future__ import annotations

from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import (
    HAS_LENGTH,
    LABEL,
    AnyCondition,
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
