"""Samplers against their papers' own formulas, written out in the papers' own frames, on the same random numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.options import check_options
from scoreray.sampling.samplers.sample import SAMPLERS, sample
from scoreray.sampling.samplers.sigmas import from_process, geometric, karras
from scoreray.trainer.diffusion.process import DDPM, EDM, VE, VP, Cosine, FlowMatching, SubVP, process_section

SEEDS = [11, 12, 13, 14]


def fresh() -> SampleNoise:
    return SampleNoise(SEEDS, draw=1)


def begin(sigma: float) -> torch.Tensor:
    return sigma * SampleNoise(SEEDS).normal((4, 2), torch.float64)


def score_of(denoiser, x, sigma: float):
    levels = torch.full((len(x),), sigma, dtype=torch.float64)
    return (denoiser(x, levels) - x) / sigma**2


def noise_prediction(denoiser, x_vp, alpha_bar: float):
    """epsilon(x_t) of a DDPM, x_t = sqrt(abar) x0 + sqrt(1 - abar) epsilon."""
    sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
    return -sigma * score_of(denoiser, x_vp / math.sqrt(alpha_bar), sigma)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_algorithm_2_of_ho_2020_in_the_vp_frame(variance, mixture):
    betas = torch.linspace(1e-4, 0.2, 40, dtype=torch.float64)
    alpha_bars = torch.cumprod(1 - betas, 0)
    sigmas = torch.cat([((1 - alpha_bars) / alpha_bars).sqrt().flip(0), torch.zeros(1, dtype=torch.float64)])
    noise, start = fresh(), begin(sigmas[0].item())
    x = start * alpha_bars[-1].sqrt()
    for t in range(39, -1, -1):
        abar, beta = alpha_bars[t].item(), betas[t].item()
        abar_before = alpha_bars[t - 1].item() if t > 0 else 1.0
        epsilon = noise_prediction(mixture, x, abar)
        x = (x - beta / math.sqrt(1 - abar) * epsilon) / math.sqrt(1 - beta)
        if t > 0:
            spread = beta if variance == "large" else beta * (1 - abar_before) / (1 - abar)
            x = x + math.sqrt(spread) * noise.like(x)
    ours = sample(mixture, start, sigmas, sampler="ddpm", generator=fresh(), variance=variance)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_equation_12_of_song_2020_in_the_vp_frame(eta, mixture):
    sigmas = from_process(DDPM(), 25)
    alpha_bars = (1 / (1 + sigmas**2)).tolist()  # ends in 1
    noise, start = fresh(), begin(sigmas[0].item())
    x = start * math.sqrt(alpha_bars[0])
    for now, then in pairwise(alpha_bars):
        epsilon = noise_prediction(mixture, x, now)
        spread = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        x0 = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        x = math.sqrt(then) * x0 + math.sqrt(max(1 - then - spread**2, 0)) * epsilon
        if spread > 0 and then < 1:
            x = x + spread * noise.like(x)
    ours = sample(mixture, start, sigmas, sampler="ddim", generator=fresh(), eta=eta)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "process", [VP(), SubVP(), VE(), FlowMatching(), Cosine(), EDM(0.002, 10.0), DDPM()], ids=lambda p: p.kind
)
def test_reverse_sde_is_euler_maruyama_in_the_processs_own_frame_and_time(process, mixture):
    sigmas = from_process(process, 60)
    times = torch.linspace(process.t_max, process.sampling_t_min, 60, dtype=torch.float64)
    noise, start = fresh(), begin(sigmas[0].item())
    x = start * process.alpha(times[0])
    for t, then in pairwise(times):
        dt = t - then
        drift, diffusion = process.reverse_sde(x, t, process.score(x, t, mixture))
        x = x - drift * dt + diffusion * dt.sqrt() * noise.like(x)
    last = process.alpha(times[-1:])
    end = mixture(x / last, sigmas[-2:-1].expand(4))  # Tweedie, in place of the paper's last step
    ours = sample(mixture, start, sigmas, sampler="reverse_sde", generator=fresh(), process=process)
    torch.testing.assert_close(ours, end, rtol=1e-6, atol=1e-6)


def test_reverse_sde_without_a_process_is_song_2021s_ve_step(mixture):
    sigmas = geometric(30, 0.01, 50.0)
    noise, start = fresh(), begin(50.0)
    x = start
    for now, then in pairwise(sigmas.tolist()):
        x = x + (now**2 - then**2) * score_of(mixture, x, now)
        if then > 0:
            x = x + math.sqrt(now**2 - then**2) * noise.like(x)
    torch.testing.assert_close(sample(mixture, start, sigmas, sampler="reverse_sde", generator=fresh()), x)


def test_reverse_sde_refuses_levels_that_its_process_does_not_have(mixture):
    with pytest.raises(UserError, match="leaves the noise levels"):
        sample(mixture, begin(80.0), karras(10), sampler="reverse_sde", process=VE())
    with pytest.raises(UserError, match=r"process = 'vq': accepted: cosine.* as \{kind: vp, beta_max: 10\}"):
        sample(mixture, begin(80.0), karras(10), sampler="reverse_sde", process="vq")
    with pytest.raises(UserError, match=r"process\.beta_mx: unknown key; did you mean 'beta_max'"):
        sample(mixture, begin(80.0), karras(10), sampler="reverse_sde", process={"kind": "vp", "beta_mx": 30})
    with pytest.raises(UserError, match="take a process that has the grid's levels"):
        sample(mixture, begin(80.0), karras(10), sampler="reverse_sde", process={"kind": "vp", "beta_max": 10})


def test_a_process_is_given_by_its_kind_or_its_section_too(mixture):
    sigmas = from_process(VP(beta_max=10.0), 20)
    draws = [
        sample(mixture, begin(sigmas[0].item()), sigmas, sampler="reverse_sde", generator=fresh(), process=process)
        for process in (VP(beta_max=10.0), {"kind": "vp", "beta_max": 10}, process_section(VP(beta_max=10.0)))
    ]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    wide = check_options("reverse_sde", SAMPLERS["reverse_sde"], {"process": "vp"})
    assert wide == {"process": VP()}


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("norms", ["expected", "row"])
def test_vps_predictor_corrector_is_algorithm_3_and_5_of_song_2021_in_its_own_frame(predictor, norms, mixture):
    betas = [0.002 + 0.01 * i for i in range(25)]
    alpha_bars = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0).tolist()
    process = DDPM(betas=tuple(betas), num_steps=25)
    sigmas = from_process(process, 25)
    noise, start = SampleNoise([5], draw=1), sigmas[0] * SampleNoise([5]).normal((1, 2), torch.float64)
    x = start * math.sqrt(alpha_bars[-1])

    def score(x, level):
        return -noise_prediction(mixture, x, alpha_bars[level]) / math.sqrt(1 - alpha_bars[level])

    for i in range(24, 0, -1):
        beta, s = betas[i], score(x, i)
        if predictor == "ancestral":
            x = (x + beta * s) / math.sqrt(1 - beta) + math.sqrt(beta) * noise.like(x)
        else:
            x = (2 - math.sqrt(1 - beta)) * x + beta * s + math.sqrt(beta) * noise.like(x)
        for _ in range(2):
            s, z = score(x, i - 1), noise.like(x)
            ratio = z.norm() / s.norm() if norms == "row" else math.sqrt(1 - alpha_bars[i - 1])
            epsilon = torch.as_tensor(2 * (1 - betas[i - 1]) * (0.16 * ratio) ** 2)
            x = x + epsilon * s + (2 * epsilon).sqrt() * z
    last = math.sqrt(alpha_bars[0])
    end = mixture(x / last, sigmas[-2:-1])
    ours = sample(
        mixture, start, sigmas, sampler="predictor_corrector", generator=SampleNoise([5], draw=1),
        process=process, predictor=predictor, norms=norms, corrector_steps=2,
    )  # fmt: skip
    torch.testing.assert_close(ours, end, rtol=1e-8, atol=1e-8)


def test_sub_vps_predictor_corrector_is_song_2021s_in_its_own_frame(mixture):
    """Euler-Maruyama, as the paper's code discretises a process without its own rule, and VP's corrector."""
    process, n = SubVP(), 40
    sigmas = from_process(process, n)
    times = torch.linspace(process.t_max, process.sampling_t_min, n, dtype=torch.float64)
    noise, start = fresh(), begin(sigmas[0].item())
    x = start * process.alpha(times[0])
    for i, (t, then) in enumerate(pairwise(times)):
        drift, diffusion = process.reverse_sde(x, t, process.score(x, t, mixture))
        x = x - drift * (t - then) + diffusion * (t - then).sqrt() * noise.like(x)
        below = process.alpha(times[i + 2]) if i + 2 < n else 1.0
        step = (process.alpha(then) / below) ** 2  # 1 - beta
        epsilon = 2 * step * (0.16 * process.sigma(then)) ** 2
        x = x + epsilon * process.score(x, then, mixture) + (2 * epsilon).sqrt() * noise.like(x)
    end = mixture(x / process.alpha(times[-1:]), sigmas[-2:-1].expand(4))
    ours = sample(mixture, start, sigmas, sampler="predictor_corrector", generator=fresh(), process=process)
    torch.testing.assert_close(ours, end, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="predictor = 'ancestral': is VE's and VP's"):
        sample(mixture, start, sigmas, sampler="predictor_corrector", process=process, predictor="ancestral")


@pytest.mark.parametrize("process", [VE(), EDM()], ids=lambda p: p.kind)
def test_without_a_factor_of_the_data_a_process_changes_nothing_of_the_predictor_corrector(process, mixture):
    sigmas = from_process(process, 12)
    plain, given = (
        sample(mixture, begin(sigmas[0].item()), sigmas, sampler="predictor_corrector", generator=fresh(), **options)
        for options in ({}, {"process": process})
    )
    assert torch.equal(plain, given)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("norms", ["expected", "row"])
def test_predictor_corrector_is_algorithm_2_and_4_of_song_2021_for_a_batch_of_one(predictor, norms, mixture):
    sigmas = geometric(20, 0.01, 50.0)
    noise, x = SampleNoise([5], draw=1), 50 * SampleNoise([5]).normal((1, 2), torch.float64)
    start = x
    for now, then in pairwise(sigmas.tolist()):
        x = x + (now**2 - then**2) * score_of(mixture, x, now)
        if then == 0:
            break
        spread = math.sqrt(now**2 - then**2) * (then / now if predictor == "ancestral" else 1)
        x = x + spread * noise.like(x)
        for _ in range(2):
            score, z = score_of(mixture, x, then), noise.like(x)
            size = z.norm() / score.norm() if norms == "row" else torch.tensor(then)
            epsilon = 2 * (0.16 * size) ** 2
            x = x + epsilon * score + (2 * epsilon).sqrt() * z
    ours = sample(
        mixture, start, sigmas, sampler="predictor_corrector", generator=SampleNoise([5], draw=1),
        predictor=predictor, norms=norms, corrector_steps=2,
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)


def test_edm_sde_is_algorithm_2_of_karras_2022(mixture):
    sigmas, settings = karras(24), {"s_churn": 20.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
    noise, start = fresh(), begin(80.0)
    x = start

    def slope(x, sigma):
        return -sigma * score_of(mixture, x, sigma)

    for now, then in pairwise(sigmas.tolist()):
        gamma = min(20.0 / 24, math.sqrt(2) - 1) if 0.05 <= now <= 50 else 0.0
        hat = now + gamma * now
        if gamma > 0:
            x = x + math.sqrt(hat**2 - now**2) * 1.003 * noise.like(x)
        d = slope(x, hat)
        ahead = x + (then - hat) * d
        if then > 0:
            ahead = x + (then - hat) * (0.5 * d + 0.5 * slope(ahead, then))
        x = ahead
    ours = sample(mixture, start, sigmas, sampler="edm_sde", generator=fresh(), **settings)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_dpm_solver_2_is_algorithm_1_of_lu_2022_in_the_vp_frame(mixture):
    # x_t = alpha x0 + s epsilon, lambda = ln(alpha / s), VP; the midpoint is that of lambda.
    sigmas = from_process(VP(), 30)
    start = begin(sigmas[0].item())

    def frame(sigma: float) -> tuple[float, float]:
        alpha = 1 / math.sqrt(1 + sigma**2)
        return alpha, alpha * sigma

    def epsilon(x, sigma):
        return -sigma * score_of(mixture, x / frame(sigma)[0], sigma)

    x = start * frame(sigmas[0].item())[0]
    for now, then in pairwise(sigmas[:-1].tolist()):
        h = math.log(now / then)
        middle = now * math.exp(-h / 2)
        (alpha, _), (alpha_mid, s_mid), (alpha_then, s_then) = frame(now), frame(middle), frame(then)
        u = alpha_mid / alpha * x - s_mid * math.expm1(h / 2) * epsilon(x, now)
        x = alpha_then / alpha * x - s_then * math.expm1(h) * epsilon(u, middle)
    end = mixture(x / frame(sigmas[-2].item())[0], sigmas[-2:-1].expand(4))
    torch.testing.assert_close(sample(mixture, start, sigmas, sampler="dpm2"), end, rtol=1e-8, atol=1e-8)


def test_dpm_solver_pp_2m_is_algorithm_2_of_lu_2022_in_the_vp_frame(mixture):
    sigmas = from_process(VP(), 30)
    start = begin(sigmas[0].item())
    x, before, h_before = start / (1 + sigmas[0] ** 2).sqrt(), None, 0.0
    for now, then in pairwise(sigmas[:-1].tolist()):
        alpha, alpha_then = 1 / math.sqrt(1 + now**2), 1 / math.sqrt(1 + then**2)
        h = math.log(now / then)
        data = mixture(x / alpha, torch.full((4,), now, dtype=torch.float64))
        r = h_before / h
        extrapolated = data if before is None else (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = (alpha_then * then) / (alpha * now) * x - alpha_then * math.expm1(-h) * extrapolated
        before, h_before = data, h
    end = mixture(x * (1 + sigmas[-2] ** 2).sqrt(), sigmas[-2:-1].expand(4))
    torch.testing.assert_close(sample(mixture, start, sigmas, sampler="dpmpp_2m"), end, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpmpp_3m_sde_is_k_diffusions_of_that_name(eta, mixture):
    """sample_dpmpp_3m_sde of k-diffusion 0.1.1 on our random numbers, its names kept."""
    sigmas, noise, start = karras(16), fresh(), begin(80.0)
    x, s_noise, h_1, h_2, denoised_1, denoised_2 = start, 1.01, None, None, None, None
    for now, then in pairwise(sigmas.tolist()):
        denoised = x + now**2 * score_of(mixture, x, now)
        if then == 0:
            x = denoised
            break
        h = math.log(now / then)
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - phi_3 * d2
        elif h_1 is not None:
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        if eta:
            x = x + noise.like(x) * then * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        denoised_1, denoised_2, h_1, h_2 = denoised, denoised_1, h, h_1
    settings = {"sampler": "dpmpp_3m_sde", "eta": eta, "s_noise": s_noise}
    torch.testing.assert_close(sample(mixture, start, sigmas, generator=fresh(), **settings), x, rtol=1e-9, atol=1e-9)
    exact = sample(mixture, start, sigmas, generator=fresh(), curvature="exact", **settings)
    assert (exact - x).abs().max() > 1e-3


def test_ncsn_is_algorithm_1_of_song_and_ermon_2019(mixture):
    sigmas = geometric(10, 0.01, 1.0)
    noise, start = fresh(), begin(1.0)
    x = start
    for sigma in sigmas[:-1].tolist():
        step = 2e-5 * sigma**2 / 0.01**2
        for _ in range(7):
            x = x + step / 2 * score_of(mixture, x, sigma) + math.sqrt(step) * noise.like(x)
    ours = sample(mixture, start, sigmas, sampler="ncsn", generator=fresh(), num_steps=7)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_ncsnv2_is_algorithm_1_of_song_and_ermon_2020(mixture):
    sigmas = geometric(40, 0.01, 50.0)
    noise, start = fresh(), begin(50.0)
    x = start
    for sigma in sigmas[:-1].tolist():
        step = 6.2e-6 * sigma**2 / 0.01**2
        for _ in range(5):
            x = x + step * score_of(mixture, x, sigma) + math.sqrt(2 * step) * noise.like(x)
    x = x + 0.01**2 * score_of(mixture, x, 0.01)
    ours = sample(mixture, start, sigmas, sampler="ncsnv2", generator=fresh(), epsilon=6.2e-6)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_sgld_is_equation_4_of_welling_and_teh_2011(mixture):
    noise, start = fresh(), begin(1.0)
    x = start
    for k in range(12):
        step = 0.3 * (1 + k / 4) ** -0.6
        x = x + step / 2 * score_of(mixture, x, 0.5) + math.sqrt(step) * noise.like(x)
    options = {"step_size": 0.3, "offset": 4.0, "decay": 0.6, "num_steps": 12}
    ours = sample(mixture, start, [1.0, 0.5, 0.0], sampler="sgld", generator=fresh(), **options)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
