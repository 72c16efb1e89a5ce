"""Continuous normalizing flows: the log-density of data along the probability-flow ODE, and gradients through it.

The ODE dx/dsigma = (x - D) / sigma is integrated in y = x / r, r = sqrt(sigma^2 + sigma_data^2), over
u = atan(sigma / sigma_data): dy/du = (sigma_data^2 y - r D) / (sigma sigma_data), which of an `edm` denoiser is -F,
the network's own output, and of Gaussian data 0. So the flow is the neural ODE of Chen 2018 and Grathwohl 2019 (FFJORD)
whose velocity is the network, and starts near the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.extras import check_installed

FixedSolver = Literal["euler", "midpoint", "rk4"]
AdaptiveSolver = Literal["bosh3", "dopri5", "dopri8"]
Solver = Literal["euler", "midpoint", "rk4", "bosh3", "dopri5", "dopri8"]


@dataclass(frozen=True)
class Integration:
    """How the ODE is solved, by torchdiffeq. steps: of solvers with fixed steps; rtol, atol: of the others."""

    solver: Solver
    steps: int
    rtol: float
    atol: float
    adjoint: bool


def log_density(
    denoise: Callable[[Tensor, Tensor], Tensor],
    divergence: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma_range: tuple[float, float],
    sigma_data: float,
    how: Integration,
    parameters: Sequence[Tensor],
) -> Tensor:
    """ln p(x; sigma_min) [B] in nats of x [B, ...], differentiable in `parameters`, those of `denoise`.

    denoise: of x and sigma [B].  divergence: of (outputs, inputs) [B, ...], the trace of their Jacobian [B] (`jacobian`
    with create_graph).  The end at sigma_max is taken for normal of variance sigma_max^2 + sigma_data^2, as by
    `sampling.measures.likelihood`. The gradient is that of the solver's own steps, or with `how.adjoint` that of the
    adjoint equation, solved backwards at the same accuracy: in the memory of one step, at twice the time.
    """
    start, end = (math.atan(sigma / sigma_data) for sigma in sigma_range)
    scale = math.hypot(sigma_range[0], sigma_data)

    def flow(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():  # the divergence is a derivative, also where the solver wants none
            y = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            sigma = sigma_data * torch.tan(u)
            r = sigma_data / torch.cos(u)
            denoised = denoise(r.to(y.dtype) * y, sigma.expand(len(y)))
            velocity = (sigma_data * y - (r / sigma_data).to(y.dtype) * denoised) / sigma.to(y.dtype)
            return velocity, divergence(velocity, y)

    times = torch.linspace(start, end, how.steps + 1, dtype=torch.float64, device=x.device)
    solve, options = _solver(how, parameters)
    if how.solver in get_args(AdaptiveSolver):
        times = times[[0, -1]]  # where it also must stop: beyond, where it would interpolate from, tan u has its pole
        options["options"] = {"step_t": times}
    y = x / scale
    try:
        latent, integral = solve(flow, (y, y.new_zeros(len(y))), times, **options)
    except AssertionError as error:  # torchdiffeq's "underflow in dt"
        raise UserError(
            f"objective.solver: '{how.solver}' found no step that is exact to rtol {how.rtol:g} and atol {how.atol:g}: "
            f"the flow is not finite or too stiff ({error}); lower optimizer.learning_rate, or take solver rk4"
        ) from error
    normal = -(latent[-1].flatten(1).square().sum(1) + y[0].numel() * math.log(2 * math.pi)) / 2
    return normal + integral[-1] - y[0].numel() * math.log(scale)


def _solver(how: Integration, parameters: Sequence[Tensor]) -> tuple[Callable[..., Any], dict[str, Any]]:
    torchdiffeq = package()
    options: dict[str, Any] = {"method": how.solver, "rtol": how.rtol, "atol": how.atol}
    if not how.adjoint:
        return torchdiffeq.odeint, options
    return torchdiffeq.odeint_adjoint, {**options, "adjoint_params": tuple(p for p in parameters if p.requires_grad)}


def package() -> Any:
    """torchdiffeq. Raises UserError where it is not installed."""
    check_installed("flows", "objective.kind 'maximum_likelihood'", "torchdiffeq")
    import torchdiffeq

    return torchdiffeq
