"""The closed forms that everything else is tested against, themselves tested against autograd and integration."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.targets import TARGETS, Mixture, checkerboard, ring, sample_target

F64 = torch.float64
SIGMAS = [0.01, 0.3, 5.0, 80.0]


def points(count=40, scale=1.0):
    return scale * torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def three() -> Mixture:
    means = torch.tensor([[0.0, 1.0], [-1.0, 0.3], [0.5, -0.8]])
    return Mixture(means, 0.2, torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("label", [-1, 0, 1])
def test_the_score_is_the_gradient_of_the_log_density(sigma, label):
    mixture, x = three(), points(scale=1 + sigma).requires_grad_()
    labels = torch.full((len(x),), label)
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma, labels).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach(), sigma, labels), gradient, rtol=1e-6, atol=1e-7)


def test_the_density_integrates_to_one():
    axis = torch.linspace(-6, 6, 400, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    for sigma, label in ((0.0, -1), (0.5, -1), (0.5, 1)):
        density = three().log_density(grid, sigma, torch.full((len(grid),), label)).exp()
        assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-6)


def test_one_component_is_the_gaussian_of_the_formulas():
    gaussian, x, sigma = Mixture(torch.tensor([[0.3, -0.2]]), 0.7), points(), 0.4
    mean = gaussian.means
    torch.testing.assert_close(gaussian(x, sigma), mean + (x - mean) * 0.49 / (0.49 + 0.16))
    torch.testing.assert_close(gaussian.score(x, sigma), -(x - mean) / (0.49 + 0.16))


def test_a_finite_data_set_has_the_softmax_posterior_mean():
    data = points(7)
    x, sigma = points(5) + 0.1, 0.3
    weight = (-((x[:, None] - data) ** 2).sum(2) / (2 * sigma**2)).softmax(1)
    torch.testing.assert_close(Mixture(data)(x, sigma), weight @ data)
    torch.testing.assert_close(Mixture(data)(data + 1e-4, 0.001), data)  # at little noise: the nearest point
    images = points(6).reshape(3, 1, 2, 2)
    assert Mixture(images)(images, 0.5).shape == images.shape


def test_the_denoiser_is_the_posterior_mean():
    """E[(x_0 - D(x)) h(x)] = 0 for any h: D is a conditional mean."""
    mixture, count, sigma = three(), 100_000, 0.5
    generator = torch.Generator().manual_seed(0)
    x0 = mixture.sample(count, generator)
    x = x0 + sigma * torch.randn(count, 2, dtype=F64, generator=generator)
    for h in (torch.ones_like(x), x, x.sin()):
        product = (x0 - mixture(x, sigma)) * h
        assert (product.mean(0).abs() < 4.5 * product.std(0) / math.sqrt(count)).all()


def test_rows_do_not_depend_on_the_batch_and_dtypes_stay():
    mixture, x = three(), points()
    sigma = torch.linspace(0.01, 3, len(x), dtype=F64)
    torch.testing.assert_close(mixture(x[3:4], sigma[3:4])[0], mixture(x, sigma)[3])
    for dtype in (torch.float32, torch.float64):
        assert mixture(x.to(dtype), 0.5).dtype == mixture.score(x.to(dtype), 0.5).dtype == dtype
        assert mixture.log_density(x.to(dtype), 0.5).dtype == dtype


def test_far_from_the_origin_nothing_cancels():
    x, means = points(5), torch.eye(2, dtype=F64)
    torch.testing.assert_close(Mixture(means + 1e6)(x + 1e6, 1.0) - 1e6, Mixture(means)(x, 1.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_functions_of_the_seed_with_the_scale_that_denoisers_assume(name):
    sample = sample_target(name, 20_000, seed=1)
    assert sample.shape == (20_000, 2)
    assert sample.dtype == torch.float32
    assert torch.equal(sample, sample_target(name, 20_000, seed=1))
    assert not torch.equal(sample, sample_target(name, 20_000, seed=2))
    assert sample.mean(0).abs().max() < 0.02
    assert (sample.std(0) - 0.5).abs().max() < 0.02


def test_the_checkerboard_is_empty_on_half_its_squares():
    squares = ((checkerboard(5000) / math.sqrt(0.75) + 1) * 2).floor().long()
    assert ((squares[:, 0] + squares[:, 1]) % 2 == 0).all()
    assert len(squares.unique(dim=0)) == 8


def test_a_label_of_the_ring_is_one_of_its_modes():
    mixture = ring()
    labels = torch.arange(8)
    torch.testing.assert_close(
        mixture(torch.zeros(8, 2, dtype=F64), 100.0, labels), mixture.means, rtol=1e-4, atol=1e-4
    )


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'spirals'"):
        sample_target("spiral", 3)
    with pytest.raises(UserError, match="std is -1"):
        Mixture(torch.eye(2), -1.0)
    with pytest.raises(UserError, match=r"weights \(3,\) for 2 means"):
        Mixture(torch.eye(2), 0.1, torch.ones(3))
    with pytest.raises(UserError, match=r"x has shape \(4, 3\)"):
        ring()(torch.ones(4, 3), 1.0)
