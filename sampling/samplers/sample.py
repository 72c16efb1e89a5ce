"""Samplers by name, and the driver that runs one of them against one denoiser.

A sampler is a generator (see `ode.py`): `drive` runs one to its end; the step batcher runs many side by side.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError, UserError, nearest, shortened
from scoreray.data.own_code import is_own, line_of, load, or_own
from scoreray.sampling.samplers.adaptive import rk45
from scoreray.sampling.samplers.dynamics import baoab, cld, hmc, mala
from scoreray.sampling.samplers.few_step import consistency, flow_map
from scoreray.sampling.samplers.langevin import langevin, ncsn, ncsnv2, sgld
from scoreray.sampling.samplers.noise import Noise, SampleNoise, TorchNoise, as_noise
from scoreray.sampling.samplers.ode import DenoiserCall, Steps, dpm2, dpmpp_2m, euler, heun, unipc
from scoreray.sampling.samplers.options import check_options, options_of
from scoreray.sampling.samplers.parallel import Parallel, check_parallel, in_parallel
from scoreray.sampling.samplers.sde import (
    ddim,
    ddpm,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    edm_sde,
    predictor_corrector,
    reverse_sde,
)
from scoreray.sampling.samplers.sigmas import as_grid
from scoreray.trainer.diffusion.condition import (
    LABEL,
    AnyCondition,
    Condition,
    class_name_of,
    encoded,
    tiled,
)
from scoreray.trainer.diffusion.levels import with_target_level

SAMPLERS: dict[str, Callable[..., Steps]] = {
    "langevin": langevin,
    "sgld": sgld,
    "ncsn": ncsn,
    "ncsnv2": ncsnv2,
    "baoab": baoab,
    "cld": cld,
    "mala": mala,
    "hmc": hmc,
    "ddpm": ddpm,
    "ddim": ddim,
    "reverse_sde": reverse_sde,
    "predictor_corrector": predictor_corrector,
    "euler": euler,
    "heun": heun,
    "rk45": rk45,
    "edm_sde": edm_sde,
    "dpm2": dpm2,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "consistency": consistency,
    "flow_map": flow_map,
}
"""Every sampler of ours, by the word that chooses it in a config, on the command line and in a request."""

ODE_SAMPLERS = frozenset({"euler", "heun", "rk45", "dpm2", "dpmpp_2m", "unipc", "ddim"})
"""Samplers that add no noise, ddim without eta: all that is right for a flow whose densities have no known score."""
OF_MAPS = frozenset({"consistency", "flow_map"})
"""Samplers for networks that learned a map along the paths of the ODE: on a plain denoiser wrong or impossible."""
ADAPTIVE = frozenset({"rk45"})
"""Samplers whose number of calls depends on what they sample."""
ADAPTIVE_COUNTED = 1000  # of their calls in a dry run

Denoise = Callable[..., Tensor]


def adds_noise(sampler: str, options: Mapping[str, Any]) -> bool:
    """Whether a sampler of ours adds noise as it goes; of somebody else's it is not known, and taken as not."""
    return sampler in SAMPLERS and (sampler not in ODE_SAMPLERS or bool(options.get("eta")))


@dataclass(frozen=True)
class SamplerState:
    """What a callback sees after each call of the network: calls so far, the state, its noise level, the estimate."""

    nfe: int
    x: Tensor
    sigma: float | Tensor
    denoised: Tensor


def sampler_of(name: str) -> Callable[..., Steps]:
    """The sampler of a name: ours, or somebody else's generator function, `package.module:Name`. Raises UserError."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    if not is_own(name):
        raise UserError(f"unknown sampler '{shortened(str(name))}': {nearest(str(name), SAMPLERS)}{or_own(str(name))}")
    found = load(name, "sampler")
    if not inspect.isgeneratorfunction(found):
        raise UserError(f"sampler '{name}': is no generator function (x, sigmas, noise, *, options)")
    try:
        wrong = [option.name for option in options_of(found).values() if option.is_unbounded]
    except (TypeError, ValueError, NameError) as error:
        raise UserError(f"sampler '{name}': its options can't be read from its signature: {line_of(error)}") from None
    if wrong:
        raise UserError(
            f"sampler '{name}': option '{wrong[0]}' needs a default, and a number a Range: "
            "Annotated[float, Range(low, high)] = 0.5"
        )
    return found  # type: ignore[no-any-return]


def sample(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    sampler: str = "heun",
    generator: Noise | torch.Generator | Tensor | Sequence[int] | None = None,
    condition: AnyCondition = None,
    class_labels: Tensor | None = None,
    callback: Callable[[SamplerState], None] | None = None,
    parallel: Parallel | None = None,
    **options: Any,
) -> Tensor:
    """Draws samples: takes `x` [B, ...] at noise level sigmas[0] down the grid to 0.

    denoiser: `(x [B, ...], sigma [B], condition of B rows or None) -> denoised [B, ...]`, in the dtype of x. Of
        `flow_map`, and `consistency` with `target`, D(x, sigma, rho): rho is `condition.values["target_level"]` [B, 1].
    sigmas: a grid of `scoreray.sampling.samplers.sigmas`: [n + 1], descending, ending in 0.
    sampler: a name of SAMPLERS, or `package.module:Name`; `options` are its keyword-only parameters.
    generator: one integer seed for each row (its samples then don't depend on the batch), a torch.Generator, a Noise,
        or None for torch's global generator.
    condition: a `Condition` of B rows, or class labels int64 [B], -1 for none; class_labels: the latter's other name.
    callback: called with a SamplerState after each call of the network.
    parallel: several steps in each call of the network (`parallel.py`), whose rows a denoiser of rows that each have
        something of their own must know by their condition; None for one step after another.
    Returns samples in the shape, dtype and device of `x`. Raises UserError on a bad argument, and when the samples are
    not finite.
    """
    steps = start(sampler, x, sigmas, generator, parallel=parallel, **options)
    samples, _ = drive(steps, denoiser, condition=class_labels if condition is None else condition, callback=callback)
    good = torch.isfinite(samples)
    if not bool(good.all()):
        rows = torch.nonzero(~good.flatten(1).all(1) if good.ndim > 1 else ~good).flatten().tolist()
        raise UserError(
            f"sampler '{sampler}' ended in values that are not finite in rows {rows[:8]} of {len(samples)}: "
            "take more or smaller steps, less guidance if any, or check the denoiser"
        )
    return samples


def start(
    sampler: str,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    generator: Noise | torch.Generator | Tensor | Sequence[int] | None = None,
    *,
    parallel: Parallel | None = None,
    **options: Any,
) -> Steps:
    """A sampler's generator on checked arguments, for `drive` or a batcher; arguments and errors as in `sample`."""
    function = sampler_of(sampler)
    options = check_options(sampler, function, options)
    levels = as_grid(sigmas).tolist()
    if x.ndim < 1 or x.shape[0] < 1 or not x.is_floating_point():
        raise UserError(f"x of shape {list(x.shape)}, {x.dtype}: must be floating point [B, ...] with at least one row")
    if not bool(torch.isfinite(x).all()):
        raise UserError("x holds values that are not finite: it must be noise of standard deviation sigmas[0]")
    noise = as_noise(generator)
    if isinstance(noise, SampleNoise):
        if len(noise.seeds) != len(x):
            raise UserError(f"{len(noise.seeds)} seeds for {len(x)} rows of x: must be one seed per row")
        noise.expect(len(levels) - 2)  # one for each step but the last, as most samplers draw
    if parallel is not None:
        check_parallel(sampler)
        return in_parallel(lambda x, noise: function(x, levels, noise, **options), x, noise, parallel)
    steps = function(x, levels, noise, **options)
    return _checked(sampler, steps, x) if is_own(sampler) else steps


def _checked(name: str, steps: Steps, x: Tensor) -> Steps:
    """A sampler of somebody else's, whose mistakes are one line that names it: what it raises, yields or returns."""

    def same(value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == x.shape and value.dtype == x.dtype

    wanted, denoised = f"{list(x.shape)} {x.dtype}", None
    while True:
        try:
            state = next(steps) if denoised is None else steps.send(denoised)
        except StopIteration as end:
            if not same(end.value):
                raise UserError(
                    f"sampler '{name}': must return the samples, {wanted}, not {_about(end.value)}"
                ) from None
            return end.value  # type: ignore[no-any-return]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"sampler '{name}' failed: {line_of(error)}") from error
        if not isinstance(state, tuple) or len(state) not in (2, 3) or not same(state[0]):
            raise UserError(f"sampler '{name}': must yield (x {wanted}, sigma), not {_about(state)}")
        denoised = yield state


def _about(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_about, value))})"
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def drive(
    steps: Steps,
    denoiser: Denoise,
    *,
    condition: AnyCondition = None,
    callback: Callable[[SamplerState], None] | None = None,
) -> tuple[Tensor, int]:
    """Runs one sampler to its end. Returns its samples and nfe, the number of calls of the denoiser."""
    nfe = 0
    with torch.no_grad():
        try:
            x, sigma, target, copies = DenoiserCall(*next(steps))
        except StopIteration as end:
            return end.value, nfe
        check_rows(condition, len(x) // copies)
        condition = encoded(denoiser, condition)
        while True:
            levels, given = per_row(sigma, x), tiled(condition, copies)
            if target is not None:
                given = with_target_level(_named(given, denoiser), target, x)
            denoised = denoiser(x, levels) if given is None else denoiser(x, levels, given)
            nfe += 1
            if denoised.shape != x.shape or denoised.dtype != x.dtype:
                raise UserError(
                    f"the denoiser gave {list(denoised.shape)} {denoised.dtype} for {list(x.shape)} {x.dtype}: "
                    "it must keep shape and dtype"
                )
            if callback is not None:
                callback(SamplerState(nfe, x, sigma, denoised))
            try:
                x, sigma, target, copies = DenoiserCall(*steps.send(denoised))
            except StopIteration as end:
                return end.value, nfe


def _named(condition: AnyCondition, denoiser: Denoise) -> Condition | None:
    """Of class labels alone, the condition that they are to this denoiser."""
    if not isinstance(condition, Tensor):
        return condition
    return Condition({class_name_of(getattr(denoiser, "conditions", None) or {}) or LABEL: condition})


def per_row(sigma: float | Tensor, x: Tensor) -> Tensor:
    """A noise level as the denoiser takes it: [B] on the device of x, float64 for float64 x, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(sigma, Tensor):
        return sigma.to(x.device, dtype)
    return torch.full((len(x),), sigma, dtype=dtype, device=x.device)


def num_calls(sampler: str, sigmas: Tensor | Sequence[float], *, most: int | None = None, **options: Any) -> int:
    """nfe of a sampler on a grid, counted on a dry run without a network, which ends at `most` + 1 calls.

    Raises UserError for one in ADAPTIVE, unless there is a `most`: then its steps are estimated, ADAPTIVE_COUNTED + 1
    where it takes more. That dry run denoises numbers of two kinds (`_of_two_kinds`).
    """
    adaptive = sampler in ADAPTIVE
    if adaptive and most is None:
        raise UserError(f"sampler '{sampler}' chooses its steps as it goes: its number of calls is not known before")
    calls, counted = 0, math.inf if most is None else min(most, ADAPTIVE_COUNTED) if adaptive else most
    try:
        with torch.no_grad():
            x = sigmas[0] * SampleNoise([0]).normal((1, 64)) if adaptive else torch.zeros(1, 1)
            steps = start(sampler, x, sigmas, TorchNoise(torch.Generator()), **options)
            x, sigma, *_ = DenoiserCall(*next(steps))
            while (calls := calls + 1) <= counted:
                x, sigma, *_ = DenoiserCall(*steps.send(_of_two_kinds(x, sigma) if adaptive else x))
    except StopIteration:
        pass
    except ScorerayError:  # more steps than it may take, which the draw says
        if most is None:
            raise
    return calls


def calls_each(rows: int, samples: int) -> int | float:
    """Calls of the network for one sample, from the rows of all calls: the mean where samples took unlike numbers."""
    return rows // samples if rows % samples == 0 else round(rows / samples, 2)


def _of_two_kinds(x: Tensor, sigma: float | Tensor) -> Tensor:
    """E[x0 | x] of numbers near 0.5 and near -0.5: for Gaussian ones, unlike for samples, `rk45` takes two steps.

    A small network trained on 8 x 8 digits took 0.4 times as many calls at tolerances of 1e-2 and 1e-3, and 1.1 to 1.4
    times as many from 1e-4 to 1e-6.
    """
    std, level = 0.02, torch.as_tensor(sigma, dtype=x.dtype).view(-1, 1)
    variance = std**2 + level**2
    middle = 0.5 * (0.5 * x / variance).tanh()
    return middle + (x - middle) * (std**2 / variance)


def check_rows(condition: AnyCondition, rows: int) -> None:
    """Raises UserError unless `condition` has so many rows; class labels must be int64 [rows], -1 (none) or more."""
    if not isinstance(condition, Tensor):
        if condition is not None and len(condition) != rows:
            raise UserError(f"a condition of {len(condition)} rows for {rows} rows of x: must be one per row")
        return
    if condition.shape != (rows,) or condition.dtype != torch.int64:
        raise UserError(f"class_labels of shape {list(condition.shape)}, {condition.dtype}: must be int64 [{rows}]")
    bad = condition[condition < -1]
    if len(bad):
        raise UserError(f"class label {int(bad[0])}: must be -1 (no class) or the number of one")
