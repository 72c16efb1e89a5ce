"""Stochastic samplers: ancestral sampling, solvers of the reverse SDE, and EDM's churn.

The shape of a sampler is described in `ode.py`. Papers that work in another frame, x_t = alpha x0 + s z, are
transcribed by dividing by alpha (sigma = s / alpha); tests hold each against its paper's own formula in its own frame.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.ode import Levels, Steps, _log_steps
from scoreray.sampling.samplers.options import Range
from scoreray.trainer.diffusion.process import GaussianProcess

S_NOISE = Range(0, 100, open_low=True)


def ddpm(x: Tensor, sigmas: Levels, noise: Noise, *, variance: Literal["small", "large"] = "small") -> Steps:
    """Ancestral sampling of the discrete chain, n calls (Ho 2020, Alg. 2).

    `variance` small is the posterior's own, beta-tilde; large is beta, with 1 + sigma^2 = 1 / alpha-bar. With "small"
    the chain is that of every process with these noise levels, VE's too (Song 2021, appendix F).
    """
    for sigma, after in pairwise(sigmas):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        kept = (after / sigma) ** 2
        if variance == "small":
            spread = after * math.sqrt(1 - kept)
        else:
            spread = math.sqrt((1 + after**2) * (sigma**2 - after**2) / (1 + sigma**2))
        x = torch.lerp(denoised, x, kept).add_(noise.like(x), alpha=spread)
    return x


def ddim(x: Tensor, sigmas: Levels, noise: Noise, *, eta: Annotated[float, Range(0, 1)] = 0.0) -> Steps:
    """DDIM: `eta` 0 is deterministic (and is Euler on the ODE), `eta` 1 is DDPM with the small variance; n calls.

    Song 2020, "Denoising diffusion implicit models", eqs. 12 and 16.
    """
    for sigma, after in pairwise(sigmas):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        spread = eta * after * math.sqrt(1 - (after / sigma) ** 2)
        x = torch.lerp(denoised, x, math.sqrt(after**2 - spread**2) / sigma)
        if spread > 0:
            x.add_(noise.like(x), alpha=spread)
    return x


def reverse_sde(x: Tensor, sigmas: Levels, noise: Noise, *, process: GaussianProcess | None = None) -> Steps:
    """Euler-Maruyama on the reverse SDE dx = [f - g^2 score] dt + g dw; strong order 1/2, n calls.

    Anderson 1982; Song 2021, eq. 6. With a `process` the steps are those of its own SDE in its own frame and time;
    without one they are VE's in the variable sigma^2. The last step, to 0, is Tweedie's mean, without noise.
    """
    keep, spread = _euler_maruyama(sigmas, process)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        stay, toward = keep[i]
        x = torch.mul(x, stay).add_(denoised, alpha=toward).add_(noise.like(x), alpha=spread[i])
    return x


def _euler_maruyama(sigmas: Levels, process: GaussianProcess | None) -> tuple[list[tuple[float, float]], list[float]]:
    """For each step the weights of x and of the denoised batch, and the standard deviation of the noise."""
    if process is None:
        variances = [(sigma**2 - after**2, sigma**2) for sigma, after in pairwise(sigmas)]
        return [(1 - v / s2, v / s2) for v, s2 in variances], [math.sqrt(v) for v, _ in variances]
    levels = torch.tensor(sigmas[:-1], dtype=torch.float64)
    low, high = process.sigma_range()
    if levels[0] > high * (1 + 1e-9) or levels[-1] < low * (1 - 1e-9):
        raise UserError(
            f"a grid from {levels[0]:g} to {levels[-1]:g} leaves the noise levels of {process}, {low:g} to {high:g}: "
            "take a process that has the grid's levels, or in Python a grid by from_process"
        )
    times = process.time(levels)
    alpha = process.alpha(times)
    rate = process.drift(torch.ones_like(times), times)  # alpha' / alpha
    diffusion = process.diffusion(times)
    keep, spread = [], []
    for i in range(len(times) - 1):
        dt = float(times[i] - times[i + 1])
        pull = float(diffusion[i]) ** 2 * dt / float(alpha[i]) ** 2  # g^2 dt in the VE frame
        growth = float(alpha[i] / alpha[i + 1])
        stay = growth * (1 - float(rate[i]) * dt - pull / sigmas[i] ** 2)
        keep.append((stay, growth * pull / sigmas[i] ** 2))
        spread.append(growth * math.sqrt(pull))
    return [*keep, (0.0, 1.0)], [*spread, 0.0]


def predictor_corrector(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    process: GaussianProcess | None = None,
    snr: Annotated[float, Range(0, 1, open_low=True)] = 0.16,
    corrector_steps: Annotated[int, Range(0, 1000)] = 1,
    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion",
    norms: Literal["expected", "row"] = "expected",
) -> Steps:
    """A predictor's step, then Langevin steps at the new noise level; n + (n - 1) corrector_steps calls.

    Song 2021, Alg. 2 and 4 (VE), 3 and 5 (VP): a corrector's step size is 2 alpha (snr |z| / |score|)^2 in the frame of
    the `process`, alpha being 1 - beta of the step below it, 1 for VE (and without a process). VP's predictor is the
    paper's, in place of Euler-Maruyama, which is that of sub-VP and others. The paper takes the norms as means over the
    batch, which ties rows together; here they are their expected values, sqrt(d) and sqrt(d) / sigma, or, with `norms`
    row, each row's own (alike in many dimensions; in few, rows at a score near 0 would leap).
    """
    predict, alphas = _predictor(sigmas, process, predictor)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        scale, kept, spread = predict[i]
        x = torch.lerp(denoised, x, kept)
        x = (x if scale == 1 else x.mul_(scale)).add_(noise.like(x), alpha=spread)
        for _ in range(corrector_steps):
            denoised = yield x, after
            z, pull = noise.like(x), denoised - x
            if norms == "expected":
                strength = snr * math.sqrt(alphas[i])
                x = torch.add(x, pull, alpha=2 * strength**2).add_(z, alpha=2 * strength * after)
            else:
                ratio = _row_norm(z) / _row_norm(pull).clamp_min(torch.finfo(x.dtype).tiny)
                size = 2 * alphas[i] * (snr * after**2 * ratio) ** 2
                x = x + size / after**2 * pull + torch.sqrt(2 * size) * z
    return x


def _predictor(
    sigmas: Levels, process: GaussianProcess | None, kind: str
) -> tuple[list[tuple[float, float, float]], list[float]]:
    """Of each step to a positive level: (scale, kept, spread), the step being scale (D + kept (x - D)) + spread z, and
    the corrector's alpha after it. All in the frame of x / alpha, as everywhere."""
    levels = torch.tensor(sigmas[:-1], dtype=torch.float64)
    alpha = torch.ones_like(levels) if process is None else process.alpha(process.time(levels))
    ratios = (alpha[:-1] / alpha[1:]).tolist()  # the root of 1 - beta of each step
    alphas = ((alpha[1:] / torch.cat([alpha[2:], torch.ones(1, dtype=torch.float64)])) ** 2).tolist()
    pairs = list(pairwise(sigmas))
    if process is None or bool((alpha == 1).all()):
        shrink = [after / sigma if kind == "ancestral" else 1.0 for sigma, after in pairs]
        return [
            (1.0, (after / sigma) ** 2, math.sqrt(sigma**2 - after**2) * by)
            for (sigma, after), by in zip(pairs, shrink, strict=True)
        ], alphas
    steps, spreads = _euler_maruyama(sigmas, process)  # raises where the process lacks the levels
    keeps_variance = torch.allclose(alpha**2 * (1 + levels**2), torch.ones_like(alpha), rtol=1e-6)
    if kind == "ancestral" and not keeps_variance:
        raise UserError(
            "predictor = 'ancestral': is VE's and VP's, and this process is neither; take reverse_diffusion"
        )
    if not keeps_variance:
        return [(a + b, a / (a + b), s) for (a, b), s in zip(steps[:-1], spreads, strict=False)], alphas
    found = []
    for i, (root, now) in enumerate(zip(ratios, alpha.tolist(), strict=False)):
        beta, variance = 1 - root**2, (now * sigmas[i]) ** 2
        scale = 1.0 if kind == "ancestral" else root * (2 - root)
        pull = beta / variance * (1.0 if kind == "ancestral" else root)
        found.append((scale, 1 - pull / scale, math.sqrt(beta) / float(alpha[i + 1])))
    return found, alphas


def _row_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def edm_sde(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    s_churn: Annotated[float, Range(0, 1e6)] = 40.0,
    s_min: Annotated[float, Range(0, 1e12)] = 0.05,
    s_max: Annotated[float, Range(0, 1e12)] = 50.0,
    s_noise: Annotated[float, S_NOISE] = 1.003,
) -> Steps:
    """EDM's stochastic sampler: raise the noise a little ("churn"), then a step of Heun; 2 n - 1 calls.

    Karras 2022, Alg. 2; the defaults are its ImageNet-64 settings (table 5). With s_churn 0 it is `heun`.
    """
    gamma_max = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for sigma, after in pairwise(sigmas):
        gamma = gamma_max if s_min <= sigma <= s_max else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x = torch.add(x, noise.like(x), alpha=s_noise * math.sqrt(raised**2 - sigma**2))
        denoised = yield x, raised
        ahead = torch.lerp(denoised, x, after / raised)
        if after == 0:
            return ahead
        denoised_ahead = yield ahead, after
        x = torch.add(x, x - denoised, alpha=(after - raised) / (2 * raised))
        x = x.add_(ahead - denoised_ahead, alpha=(after - raised) / (2 * after))
    return x


def dpmpp_2m_sde(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    eta: Annotated[float, Range(0, 100)] = 1.0,
    s_noise: Annotated[float, S_NOISE] = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
) -> Steps:
    """SDE-DPM-Solver++(2M): the two-step exponential integrator on the reverse SDE; n calls.

    Lu 2022, "DPM-Solver++", section 5 (eta 1); other eta as in k-diffusion's sample_dpmpp_2m_sde. With eta 0 and the
    midpoint solver it is `dpmpp_2m`.
    """
    steps = _log_steps(sigmas)
    before: Tensor | None = None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        h = steps[i] * (1 + eta)
        extrapolated = denoised
        if before is not None:
            r = steps[i - 1] / steps[i]
            slope = 0.5 if solver == "midpoint" else (math.expm1(-h) / h + 1) / -math.expm1(-h)
            extrapolated = torch.lerp(before, denoised, 1 + slope / r)
        x = torch.lerp(extrapolated, x, math.exp(-h))
        x = _add_noise(x, noise, after, eta * steps[i], s_noise)
        before = denoised
    return x


def dpmpp_3m_sde(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    eta: Annotated[float, Range(0, 100)] = 1.0,
    s_noise: Annotated[float, S_NOISE] = 1.0,
    curvature: Literal["published", "exact"] = "published",
) -> Steps:
    """DPM-Solver++(3M) SDE: three-step exponential integrator on the reverse SDE; n calls.

    The third-order multistep of Lu 2022, "DPM-Solver++", appendix B, on the reverse SDE as in k-diffusion's
    sample_dpmpp_3m_sde (Crowson 2023). Both give the divided difference, which is half the second derivative, the
    weight of a second derivative: order 2. With `curvature` exact it has twice that, its own, so that a step is exact
    for a quadratic, of order 3; at the 10 to 20 steps that people take, its error is about twice as large.
    """
    steps = _log_steps(sigmas)
    weight = 2 if curvature == "exact" else 1
    history: list[Tensor] = []  # earlier denoised batches, newest first
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        h = steps[i] * (1 + eta)
        phi_2 = math.expm1(-h) / h + 1
        target = torch.lerp(denoised, x, math.exp(-h))
        if len(history) == 1:
            target.add_(denoised - history[0], alpha=phi_2 * steps[i] / steps[i - 1])
        elif len(history) == 2:
            r0, r1 = steps[i - 1] / steps[i], steps[i - 2] / steps[i]
            first, second = (denoised - history[0]) / r0, (history[0] - history[1]) / r1
            curve = (first - second) / (r0 + r1)
            target.add_(first, alpha=phi_2).add_(curve, alpha=phi_2 * r0 - weight * (phi_2 / h - 0.5))
        x = _add_noise(target, noise, after, eta * steps[i], s_noise)
        history = [denoised, *history][:2]
    return x


def _add_noise(x: Tensor, noise: Noise, sigma: float, eta_h: float, s_noise: float) -> Tensor:
    """Adds, in place, the reverse SDE's noise over a step to `sigma`: variance sigma^2 (1 - exp(-2 eta h))."""
    if eta_h == 0:
        return x
    return x.add_(noise.like(x), alpha=s_noise * sigma * math.sqrt(-math.expm1(-2 * eta_h)))
