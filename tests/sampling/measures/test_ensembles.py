"""Ensembles and spectra against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from scoreray.sampling.measures.ensembles import EnsembleScores, crps
from scoreray.sampling.measures.spectra import log_spectral_distance, num_wavenumbers, power_spectrum, wavenumbers
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import Condition


def normal(n: int, *shape: int, seed: int = 0) -> Tensor:
    return noise.normal(seed, torch.arange(n), shape, dtype=torch.float64)


def gaussian_crps(mean: Tensor, std: float, observed: Tensor) -> Tensor:
    """CRPS of N(mean, std^2) against y: std (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mean) / std
    (Gneiting & Raftery 2007, eq. 21)."""
    z = ((observed - mean) / std).numpy()
    return torch.from_numpy(std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi)))


@pytest.mark.parametrize("members", [2, 3, 16])
def test_crps_is_unbiased_at_every_number_of_members(members: int) -> None:
    """Ensembles of N(mu, s^2) reach its closed form in the mean over many, at 2 members as at 16."""
    n, std = 40_000, 0.7
    mean, observed = 0.5 * normal(1, 1), normal(1, 1, seed=1) - 0.3
    found = crps(mean + std * normal(n, members, 1, seed=2), observed.expand(n, 1))
    error = float(found.std()) / math.sqrt(n)
    assert float(found.mean()) == pytest.approx(float(gaussian_crps(mean, std, observed)), abs=4 * error)


def test_crps_by_ranks_is_the_sum_over_pairs() -> None:
    members, observed = normal(5, 6, 2, 3), normal(5, 2, 3, seed=1)
    apart = (members[:, :, None] - members[:, None]).abs().sum((1, 2)) / (6 * 5)
    pairs = (members - observed[:, None]).abs().mean(1) - apart / 2
    torch.testing.assert_close(crps(members, observed), pairs)


def test_a_calibrated_gaussian_ensemble_reaches_the_optimum_and_others_do_not() -> None:
    """x | c ~ N(A c, s^2): the optimum of the mean CRPS is s / sqrt(pi), spread-skill is 1, RMSE s sqrt(1 + 1 / M)."""
    n, m, std = 3000, 8, torch.tensor([0.4, 3.0], dtype=torch.float64)
    centre = normal(n, 2) @ torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    observed = centre + std * normal(n, 2, seed=1)
    calibrated = EnsembleScores.of(centre[:, None] + std * normal(n, m, 2, seed=2), observed)
    (mean, channels), (ratio, ratios), (error, errors) = (
        calibrated.mean_crps(), calibrated.spread_skill(), calibrated.rmse()
    )  # fmt: skip
    assert channels == pytest.approx((std / math.sqrt(math.pi)).tolist(), rel=0.05)
    assert mean.std_error is not None
    assert abs(mean.value - float(std.mean()) / math.sqrt(math.pi)) < 4 * mean.std_error
    assert ratio.std_error is not None
    assert abs(ratio.value - 1) < 4 * ratio.std_error < 0.1
    assert ratios == pytest.approx([1, 1], abs=0.06)
    assert errors == pytest.approx((std * math.sqrt(1 + 1 / m)).tolist(), rel=0.05)
    assert error.value == pytest.approx(sum(errors) / 2)

    for factor in (0.3, 2.5):  # too sure, and too unsure
        scores = EnsembleScores.of(centre[:, None] + factor * std * normal(n, m, 2, seed=2), observed)
        assert scores.mean_crps()[0].value > 1.1 * mean.value
        assert (scores.spread_skill()[0].value < 0.5) == (factor < 1)


def test_scores_of_fields_are_means_over_the_grid_by_channel() -> None:
    members, observed = normal(3, 4, 2, 5, 6), normal(3, 2, 5, 6, seed=1)
    scores = EnsembleScores.of(members, observed)
    by_value = EnsembleScores.of(members.reshape(3, 4, 60), observed.reshape(3, 60))
    for name in ("crps", "variance", "squared_error"):
        torch.testing.assert_close(getattr(scores, name), getattr(by_value, name).view(3, 2, 30).mean(2))


@pytest.mark.parametrize("grid", [(16,), (12, 16), (8, 9, 10)])
def test_the_power_of_white_noise_is_flat_and_adds_up_to_its_mean_square(grid: tuple[int, ...]) -> None:
    x = 2 * normal(500, 2, *grid)
    found, modes = power_spectrum(x), math.prod(grid)
    assert found.shape == (500, 2, num_wavenumbers(grid))
    assert found.mean((0, 1)).numpy() == pytest.approx(4 / modes, rel=0.2)
    if len(grid) == 1:  # all modes of a line are inside
        counts = torch.bincount(wavenumbers(grid))
        torch.testing.assert_close((found * counts).sum(2), x.square().mean(2))


@pytest.mark.parametrize("grid", [(32,), (32, 48), (16, 16, 24)])
def test_a_plane_wave_has_its_power_at_its_wavenumber(grid: tuple[int, ...]) -> None:
    """k waves along the shortest side (the first), of amplitude a: a^2 / 2 in two modes, and nothing elsewhere."""
    k, amplitude = 5, 3.0
    x = amplitude * torch.cos(2 * math.pi * k * torch.arange(grid[0], dtype=torch.float64) / grid[0])
    found = power_spectrum(x.view(1, 1, -1, *[1] * (len(grid) - 1)).expand(1, 1, *grid))[0, 0]
    modes = int((wavenumbers(grid) == k).sum())
    expected = torch.zeros_like(found)
    expected[k] = amplitude**2 / 2 / modes
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_spectrum_ten_times_as_strong_is_ten_decibels_away() -> None:
    spectrum = power_spectrum(normal(20, 3, 16, 16)).mean(0)
    assert log_spectral_distance(10 * spectrum, spectrum).tolist() == pytest.approx([10, 10, 10])
    assert log_spectral_distance(spectrum, spectrum).tolist() == [0, 0, 0]


def test_a_gaussian_field_scaled_down_by_its_wiener_filter_is_calibrated_and_keeps_its_spectrum() -> None:
    """A random field on a ring, observed blurred and with noise: given these its modes are Gaussian (Wiener 1949), so
    the denoiser is exact. Sampled, ensembles reach the optimal CRPS, s / sqrt(pi), and the field's own spectrum; the
    mean alone, which is the best point forecast, has too little power at small scales."""
    n, m, side, noise_std = 256, 8, 32, 0.3
    k = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64).abs()
    power, blur = 1 / (1 + k**2), torch.exp(-((k / 6) ** 2))

    def filtered(x: Tensor, gain: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x) * gain).real

    field = filtered(normal(n, 1, side), power.sqrt())
    coarse = filtered(field, blur) + noise_std * normal(n, 1, side, seed=1)
    known = blur**2 * power + noise_std**2
    gain, left = blur * power / known, power * noise_std**2 / known  # of the posterior's mean, and its variance a mode

    def denoiser(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        mean = filtered(condition.values["coarse"], gain)
        return mean + filtered(x - mean, left / (left + sigma.view(-1, 1, 1) ** 2))

    rows = torch.arange(n).repeat_interleave(m)
    sigmas = karras(24, 0.002, 20.0)
    start = float(sigmas[0]) * normal(n * m, 1, side, seed=2)
    given = Condition({"coarse": coarse[rows]})
    drawn = sample(denoiser, start, sigmas, generator=range(n * m), condition=given).unflatten(0, (n, m))
    scores, std = EnsembleScores.of(drawn, field), math.sqrt(float(left.mean()))
    (found, _), (ratio, _), (error, _) = scores.mean_crps(), scores.spread_skill(), scores.rmse()
    assert found.value == pytest.approx(std / math.sqrt(math.pi), rel=0.03)
    assert ratio.value == pytest.approx(1, abs=0.04)
    assert error.value == pytest.approx(std * math.sqrt(1 + 1 / m), rel=0.03)
    real = power_spectrum(field).mean(0)
    of_members = log_spectral_distance(power_spectrum(drawn.flatten(0, 1)).mean(0), real)
    of_mean = log_spectral_distance(power_spectrum(filtered(coarse, gain)).mean(0), real)
    assert float(of_members) < 0.6
    assert float(of_mean) > 5
