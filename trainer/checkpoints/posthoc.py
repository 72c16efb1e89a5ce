"""Post-hoc EMA: an average of a length that was not tracked, made of stored averages of other lengths.

A power-function average at step t weighs the weights of step s by the profile p(s) = (gamma + 1)/t (s/t)^gamma, s <= t.
The mix of stored profiles that is nearest to the wanted one (least squares, inner products in closed form) mixes the
stored averages into the wanted average (Karras 2024, section 3.2 and appendix C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scoreray.data.errors import UserError
from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.checkpoint import FOLDER, SNAPSHOTS, Checkpoint, committed, open_checkpoint
from scoreray.trainer.optim.ema import is_power_length, length_of_key, name_of_std, power_of_std
from scoreray.trainer.optim.fragments import Fragment

Range = tuple[str, int, int]  # parameter, first element, how many
Ranges = list[tuple[Range, torch.Tensor]]

SMALLEST_SINGULAR_VALUE = 1e-9
"""of the largest: what the mix may not use, as it would magnify the rounding of what is stored (measured)"""
POOR_FIT = 0.03


@dataclass(frozen=True)
class Mix:
    """Which stored averages make the wanted one: (checkpoint, {state key: factor}), and how well."""

    parts: list[tuple[Checkpoint, dict[str, float]]]
    residual: float
    """|mixed profile - wanted profile| / |wanted profile|"""


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Integral of p_a p_b over all times, for every pair: [A], [A], [B], [B] -> [A, B]."""
    t_a, gamma_a, t_b, gamma_b = t_a[:, None], gamma_a[:, None], t_b[None], gamma_b[None]
    later_gamma = np.where(t_a < t_b, gamma_b, gamma_a)
    shorter, longer = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * (shorter / longer) ** later_gamma / ((gamma_a + gamma_b + 1) * longer)


def solve(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> tuple[np.ndarray, float]:
    """Factors of the `stored` profiles (step, std) that come nearest to `wanted` (step, std), and the residual.

    The residual is the L2 distance of the profiles over the wanted profile's norm.
    """
    t = np.array([step for step, _ in stored], dtype=np.float64)
    gamma = np.array([power_of_std(std) for _, std in stored])
    t_w, gamma_w = np.array([wanted[0]], dtype=np.float64), np.array([power_of_std(wanted[1])])
    products, right = inner_products(t, gamma, t, gamma), inner_products(t, gamma, t_w, gamma_w)[:, 0]
    scale = 1 / np.sqrt(np.diag(products))  # with unit profiles, small singular values are those that magnify rounding
    factors = (
        scale * np.linalg.lstsq(products * scale[:, None] * scale, right * scale, rcond=SMALLEST_SINGULAR_VALUE)[0]
    )
    norm = float(inner_products(t_w, gamma_w, t_w, gamma_w)[0, 0])
    distance = norm - 2 * factors @ right + factors @ products @ factors
    return factors, float(np.sqrt(max(distance, 0.0) / norm))


def find_mix(checkpoint: Checkpoint, std: float) -> Mix:
    """The mix of a run's stored averages that makes length `std` as of `checkpoint`.

    Takes every committed snapshot and checkpoint of the run up to that one. Raises UserError when they don't make it.
    """
    if not 0.005 <= std <= 0.28:
        raise UserError(f"EMA length {std} is outside [0.005, 0.28], where a power-function profile exists")
    stored = stored_averages(checkpoint)
    keys = [(one, key, float(key.removeprefix("ema_"))) for one in stored for key in _power_keys(one)]
    if not keys:
        raise UserError(f"{checkpoint.url}: no power-function EMA was tracked, so none can be reconstructed")
    factors, residual = solve([(one.num_steps, length) for one, _, length in keys], (checkpoint.num_steps, std))
    if residual > POOR_FIT:
        raise UserError(
            f"EMA length {name_of_std(std)} was not tracked, and the averages that are stored up to "
            f"{checkpoint.images_seen:,} images (in {len(stored)} snapshots and checkpoints) make it with an error of "
            f"{residual:.0%} (accepted: {POOR_FIT:.0%}); a run keeps more of them with checkpoint.snapshot_every_images"
        )
    parts: dict[str, tuple[Checkpoint, dict[str, float]]] = {}
    for (one, key, _), factor in zip(keys, factors, strict=True):
        parts.setdefault(one.url, (one, {}))[1][key] = float(factor)
    return Mix(list(parts.values()), residual)


def stored_averages(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Committed snapshots and checkpoints of the same run up to `checkpoint`, one for each step, oldest first.

    Where a step has both, the checkpoint counts: its averages are fp32.
    """
    run = open_store(checkpoint.url.rpartition(f"/{FOLDER}/")[0])
    by_step: dict[int, Checkpoint] = {}
    for folder in (SNAPSHOTS, FOLDER):
        for name in committed(run, folder):
            one = open_checkpoint(run, name)
            if one.num_steps < checkpoint.num_steps and one.marker.shapes == checkpoint.marker.shapes:
                by_step[one.num_steps] = one
    return [by_step[step] for step in sorted(by_step)] + [checkpoint]


def in_turn(task: Callable[..., Ranges], inputs: Iterable[tuple]) -> Iterable[Ranges]:
    """Calls the task for each of the inputs, in this process."""
    return (task(*one) for one in inputs)


def reconstruct(
    checkpoint: Checkpoint,
    mix: Mix,
    each: Callable[[Callable[..., Ranges], Iterable[tuple]], Iterable[Ranges]] = in_turn,
) -> dict[str, torch.Tensor]:
    """Whole fp32 parameters (and buffers) by name, at the mix's length.

    `each(task, inputs)` calls the task for every range of parameters and may do so elsewhere (Ray); a task reads only
    the files that hold its range. Raises DataError (damaged), StorageError.
    """
    shapes = checkpoint.marker.shapes
    state = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    for ranges in each(mix_ranges, [(mix, wanted) for wanted in ranges_of(checkpoint)]):
        for (name, start, length), values in ranges:
            state[name][start : start + length] = values
    return {name: values.view(shapes[name]) for name, values in state.items()} | checkpoint.buffers()


def ranges_of(checkpoint: Checkpoint) -> list[list[Range]]:
    """The parameters in groups, each what one file of `checkpoint` holds: [(parameter, start, length), ...]."""
    tables = [about.fragments for about in checkpoint.marker.files.values()]
    return [[(name, start, length) for name, start, length in table] for table in tables if table]


def mix_ranges(mix: Mix, ranges: list[Range]) -> Ranges:
    """The mixed averages of some ranges, fp32 (summed in fp64)."""
    sums = [torch.zeros(length, dtype=torch.float64) for _, _, length in ranges]
    frozen = set(mix.parts[-1][0].marker.frozen)
    for stored, factors in mix.parts:
        fragments = [
            Fragment(name, start, length, {key: torch.empty(length) for key in factors})
            for name, start, length in ranges
        ]
        stored.read(fragments)
        for total, fragment in zip(sums, fragments, strict=True):
            for key, factor in factors.items():
                if fragment.name in frozen:  # whatever the factors add up to
                    total.copy_(fragment.tensors[key])
                else:
                    total.add_(fragment.tensors[key], alpha=factor)
    return [(one, total.float()) for one, total in zip(ranges, sums, strict=True)]


def _power_keys(stored: Checkpoint) -> list[str]:
    lengths = {key: length_of_key(key) for key in stored.marker.state_keys}
    return [key for key, length in lengths.items() if length and is_power_length(length)]
