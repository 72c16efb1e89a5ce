"""Deterministic samplers with fixed steps: solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

Every sampler of this package has one shape: `sampler(x, sigmas, noise, *, options)` is a generator over a state x
[B, ...] that starts at noise level sigmas[0] and ends at 0. It yields `(x, sigma)` where it needs the network and is
sent the denoised batch; it returns the samples. A third element is the level that a flow map is to reach
(`DenoiserCall`). All work in the variance-exploding frame x = x0 + sigma z, in the dtype of x; coefficients that depend
on the grid only are Python floats, and a tensor that was yielded is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.options import Range


class DenoiserCall(NamedTuple):
    """What a sampler waits for: D(x [B, ...], sigma), of a flow map D(x, sigma, target). Levels are numbers, or [B].

    The target becomes the condition `target_level` of the call, which a network without that input refuses.
    copies: states of each sample that x holds, one state of all samples after another (`parallel.py`).
    """

    x: Tensor
    sigma: float | Tensor
    target: float | Tensor | None = None
    copies: int = 1


Yielded = tuple[Tensor, float | Tensor] | DenoiserCall
Steps = Generator[Yielded, Tensor, Tensor]
Levels = Sequence[float]


def euler(x: Tensor, sigmas: Levels, noise: Noise) -> Steps:
    """Euler's method on the probability-flow ODE; order 1, n calls.

    The same steps as DDIM with eta 0 (Song 2020, "Denoising diffusion implicit models", eq. 12; Karras 2022, eq. 4).
    """
    ratios = [after / sigma for sigma, after in pairwise(sigmas)]
    for sigma, ratio in zip(sigmas, ratios, strict=False):
        denoised = yield x, sigma
        x = torch.lerp(denoised, x, ratio)
    return x


def heun(x: Tensor, sigmas: Levels, noise: Noise) -> Steps:
    """Heun's method, Euler for the last step; order 2, 2 n - 1 calls (Karras 2022, Alg. 1)."""
    for sigma, after in pairwise(sigmas):
        denoised = yield x, sigma
        ahead = torch.lerp(denoised, x, after / sigma)
        if after == 0:
            return ahead
        denoised_ahead = yield ahead, after
        x = torch.add(x, x - denoised, alpha=(after - sigma) / (2 * sigma))
        x = x.add_(ahead - denoised_ahead, alpha=(after - sigma) / (2 * after))
    return x


def dpm2(x: Tensor, sigmas: Levels, noise: Noise) -> Steps:
    """DPM-Solver-2: the midpoint method in log sigma, Euler for the last step; order 2, 2 n - 1 calls.

    Lu 2022, "DPM-Solver", Alg. 1 with r_1 = 1/2 (Karras 2022, Alg. 3 with its midpoint at sqrt(sigma_i sigma_i+1)).
    """
    for sigma, after in pairwise(sigmas):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        middle = math.sqrt(sigma * after)
        halfway = torch.lerp(denoised, x, middle / sigma)
        denoised = yield halfway, middle
        x = torch.add(x, halfway - denoised, alpha=(after - sigma) / middle)
    return x


def dpmpp_2m(x: Tensor, sigmas: Levels, noise: Noise) -> Steps:
    """DPM-Solver++(2M): two-step exponential integrator in the denoised image; order 2, n calls.

    Lu 2022, "DPM-Solver++", Alg. 2. The first step and the one to sigma 0 are of first order.
    """
    steps = _log_steps(sigmas)
    before: Tensor | None = None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        if before is None:
            extrapolated = denoised
        else:
            extrapolated = torch.lerp(before, denoised, 1 + steps[i] / (2 * steps[i - 1]))
        x = torch.lerp(extrapolated, x, after / sigma)
        before = denoised
    return x


def unipc(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    order: Annotated[int, Range(1, 3)] = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
) -> Steps:
    """UniPC: a multistep predictor whose next call also corrects the step before; order p + 1 for `order` p, n calls.

    Zhao 2023, "UniPC", Alg. 1 and 2 in the data-prediction form, B(h) = h (bh1) or e^h - 1 (bh2). The order is lowered
    at both ends; the step to sigma 0 is of first order.
    """
    logs = [-math.log(sigma) for sigma in sigmas[:-1]]
    last = len(logs) - 1
    history: list[Tensor] = []  # denoised batches, newest first
    start, corrector = x, np.zeros(0)
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = yield x, sigma
        if i == last:
            return denoised
        if i > 0:
            x = _combine(sigmas[i] / sigmas[i - 1], start, corrector, [denoised, *history])
        history = [denoised, *history][:order]
        used = min(order, i + 1, last + 1 - i)
        nodes = [logs[i - k] for k in range(used)]
        predictor = _unipc_weights(nodes, logs[i + 1], variant, corrects=False)
        corrector = _unipc_weights(nodes, logs[i + 1], variant, corrects=True)
        start, x = x, _combine(sigmas[i + 1] / sigma, x, predictor, history)
    return x


def _log_steps(sigmas: Levels) -> list[float]:
    """ln(sigma_i / sigma_i+1), the step in log signal-to-noise ratio; infinite for the step to 0."""
    return [math.log(sigma / after) if after > 0 else math.inf for sigma, after in pairwise(sigmas)]


def _combine(ratio: float, x: Tensor, weights: np.ndarray, denoised: list[Tensor]) -> Tensor:
    """ratio x + sum of weights denoised, where the weights sum to 1 - ratio."""
    x = x * ratio
    for weight, batch in zip(weights.tolist(), denoised, strict=False):
        x.add_(batch, alpha=weight)
    return x


def _unipc_weights(nodes: list[float], target: float, variant: str, *, corrects: bool) -> np.ndarray:
    """What UniP or UniC gives to each denoised batch over one step to log-SNR `target` (Zhao 2023, eqs. 3 to 9).

    `nodes` are the log-SNRs of the batches that the predictor uses, newest first. The weights stand in the order of the
    batches; a corrector's first weight belongs to the batch at `target` itself.
    """
    h = target - nodes[0]
    places = [(node - nodes[0]) / h for node in nodes[1:]] + ([1.0] if corrects else [])
    scale = -h if variant == "bh1" else math.expm1(-h)
    moments, phi, factorial = [], math.expm1(-h) / -h - 1, 1.0
    for k in range(1, len(places) + 1):
        moments.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    if len(places) == 1:
        rho = np.array(
            [0.5]
        )  # exact to the order for every B(h) (Zhao 2023, appendix F); the variants differ here only
    else:
        rho = np.linalg.solve(np.vander(places, increasing=True).T, moments) if places else np.zeros(0)
    others = -scale * rho / np.array(places)
    newest = -math.expm1(-h) - others.sum()
    older = others[:-1] if corrects else others
    return np.concatenate([others[-1:] if corrects else [], [newest], older])
