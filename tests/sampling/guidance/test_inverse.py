"""Inverse problems: exact posteriors for Gaussian data, measurements that are met, operators that are what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.inverse import LinearInverse, inpaint
from scoreray.sampling.guidance.operators import average_pool, gray, mask, matrix, restoration_task
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.samplers.sigmas import karras

GRID = karras(60, 0.002, 40.0)


def run(denoiser, shape, count=4000, sampler="heun", **options):
    noise = SampleNoise(range(count))
    x = 40 * noise.normal((count, *shape), torch.float64)
    return sample(denoiser, x, GRID, sampler=sampler, generator=noise, **options)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (mask(torch.tensor([[True, False], [False, True]])), (3, 2, 2)),
        (average_pool(2), (3, 4, 6)),
        (gray(), (3, 4, 4)),
        (matrix(torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)), (8,)),
    ],
    ids=["mask", "average_pool", "gray", "matrix"],
)
def test_an_operators_transpose_and_solve_are_those_of_its_map(operator, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    y = operator.apply(torch.randn(2, *shape, generator=generator, dtype=torch.float64))
    torch.testing.assert_close((operator.apply(x) * y).sum(), (x * operator.transpose(y)).sum())
    prior, noise = torch.tensor([0.3, 2.0], dtype=torch.float64), 0.7
    z = operator.solve(y, prior, noise)
    back = prior.view(-1, *[1] * (y.ndim - 1)) * operator.apply(operator.transpose(z)) + noise * z
    torch.testing.assert_close(back, y)


def test_gray_is_the_brightness_that_pillow_gives_a_colour_picture():
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    brightness = gray().apply(torch.from_numpy(colours).permute(2, 0, 1)[None].double())[0, 0]
    assert (brightness - torch.from_numpy(np.array(Image.fromarray(colours).convert("L")))).abs().max() <= 0.51


A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([1.2, -0.4], dtype=torch.float64)


@pytest.mark.parametrize("method", ["projection", "jacobian"])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize(("sampler", "options"), [("heun", {}), ("dpmpp_2m_sde", {})])
def test_samples_given_a_measurement_are_those_of_the_exact_posterior_of_gaussian_data(
    method, noise_std, sampler, options, make_gaussian
):
    prior_mean, std = 0.4, 0.5
    samples = run(
        LinearInverse(make_gaussian(prior_mean, std), matrix(A), Y, noise_std, std, method), (3,), sampler=sampler
    )
    gain = std**2 * A.T @ torch.linalg.inv(std**2 * A @ A.T + noise_std**2 * torch.eye(2, dtype=torch.float64))
    mean = prior_mean + gain @ (Y - A.sum(1) * prior_mean)
    covariance = std**2 * (torch.eye(3, dtype=torch.float64) - gain @ A)
    # The prior at sigma 40 is taken as N(0, 40^2): it moves the mean by (0.5 / 40)^2. Five errors of a mean of N.
    assert (samples.mean(0) - mean).abs().max() < 5 * std / math.sqrt(len(samples)) + 2e-3
    assert (torch.cov(samples.T) - covariance).abs().max() < (5 * math.sqrt(2 / len(samples)) + 0.02) * std**2
    if noise_std == 0:
        assert (samples @ A.T - Y).abs().max() < 1e-6


def test_inpainting_keeps_the_known_and_draws_the_unknown_from_its_conditional(mixture):
    # Given x = 1 the mixture's modes are those at y = 1.2 (0.3) and -1 (0.2); the one at x = -1.5 is 8 sd away.
    picture = torch.tensor([1.0, 0.0], dtype=torch.float64)
    known = torch.tensor([True, False])
    shares = {}
    for method in ("jacobian", "projection"):
        samples = run(inpaint(mixture, picture, known, data_std=1.0, method=method), (2,), sampler="ddpm")
        assert (samples[:, 0] - 1).abs().max() < 1e-4
        upper = samples[:, 1] > 0.1
        assert samples[upper, 1].mean().item() == pytest.approx(1.2, abs=0.05)
        assert samples[~upper, 1].mean().item() == pytest.approx(-1.0, abs=0.05)
        shares[method] = upper.double().mean().item()
    # Both take x0 | x for one Gaussian, which it is not between the modes: that is the error left of the share, 0.6.
    assert shares["jacobian"] == pytest.approx(0.6, abs=0.05)
    assert abs(shares["jacobian"] - 0.6) < abs(shares["projection"] - 0.6) < 0.15


def test_super_resolution_meets_its_measurement(make_gaussian):
    low = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = run(LinearInverse(make_gaussian(0.0, 0.5), average_pool(4), low), (3, 8, 8), count=3)
    torch.testing.assert_close(average_pool(4).apply(samples), low.expand(3, -1, -1, -1), atol=1e-6, rtol=0)
    assert samples.std(0).mean() > 0.2


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"noise_std": -1.0}, "noise_std = -1.0"),
        ({"data_std": 0.0}, "data_std = 0.0"),
        ({"method": "dps"}, "method = 'dps'"),
    ],
)
def test_bad_settings_are_refused(settings, what, gaussian):
    with pytest.raises(UserError, match=what):
        LinearInverse(gaussian, gray(), torch.zeros(1), **settings)


def test_bad_measurements_masks_and_matrices_are_refused(gaussian):
    with pytest.raises(UserError, match="not finite"):
        LinearInverse(gaussian, gray(), torch.tensor([math.nan]))
    with pytest.raises(UserError, match="must be bool"):
        mask(torch.ones(2))
    with pytest.raises(UserError, match="depend on each other"):
        matrix(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("task", "shape", "message"),
    [
        (
            "superresolution=3",
            (3, 8, 8),
            "--restoration superresolution=3: the factor must be 2 or more and divide 8 x 8",
        ),
        ("superresolution", (3, 8, 8), "accepted: .*superresolution=FACTOR"),
        ("gray", (1, 8, 8), "--restoration gray: of images with red, green and blue"),
        ("gray=1", (3, 8, 8), "accepted: "),
        ("matrix=a.npy", (3, 8, 8), "accepted: inpaint; superresolution"),
        ("blur", (3, 8, 8), "--restoration blur: accepted: "),
    ],
)
def test_a_restoration_is_one_of_the_operators_of_images(task: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        restoration_task(task, shape)
    known = restoration_task("inpaint", shape).apply(torch.ones(1, *shape))
    assert known.sum() == shape[0] * (64 - 16)  # all but the middle half each way
