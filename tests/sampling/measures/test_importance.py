"""Importance sampling against models whose likelihood is known: linear-Gaussian ones and enumerated RBMs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreray.sampling.measures.importance import (
    autoencoder_log_weights,
    effective_samples,
    log_gaussian,
    log_laplace,
    log_mean_weight,
    machine_log_weights,
)
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM

F64 = torch.float64
STD = 0.5


class LinearGaussian:
    """x = W z + noise of STD (probabilistic PCA; Tipping & Bishop 1999). widen: of the proposal, 1 for its posterior's
    own standard deviations, which are exact where the columns of W are orthogonal."""

    def __init__(self, weight: Tensor, widen: float = 1.0):
        self.weight, self.widen = weight, widen
        self.precision = torch.eye(weight.shape[1], dtype=F64) + weight.T @ weight / STD**2

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x @ self.weight @ self.precision.inverse() / STD**2
        return mean, self.widen * self.precision.diagonal().rsqrt().expand_as(mean)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T

    def log_likelihood(self, x: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + STD**2 * torch.eye(len(self.weight), dtype=F64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(self.weight), dtype=F64), covariance)
        return normal.log_prob(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def weights_of(model: LinearGaussian, x: Tensor, count: int, **options: str) -> Tensor:
    likelihood = lambda x, decoded: log_gaussian(x, decoded, STD)  # noqa: E731
    return autoencoder_log_weights(model, x, torch.arange(len(x)), count, likelihood, **options)  # type: ignore[arg-type]


def test_a_proposal_that_is_the_posterior_is_exact_at_one_sample() -> None:
    orthogonal = torch.linalg.qr(normal(5, 2))[0] * torch.tensor([1.0, 0.4], dtype=F64)
    model, x = LinearGaussian(orthogonal), normal(20, 5, seed=1)
    weights = weights_of(model, x, 3)
    torch.testing.assert_close(weights, model.log_likelihood(x)[:, None].expand(-1, 3))
    torch.testing.assert_close(effective_samples(weights), torch.full((20,), 3.0, dtype=F64))


def test_the_bound_of_a_linear_gaussian_model_tightens_to_its_likelihood() -> None:
    model = LinearGaussian(normal(5, 2), widen=1.5)
    x = normal(200, 2, seed=1) @ model.weight.T + STD * normal(200, 5, seed=2)
    exact, weights = model.log_likelihood(x).mean(), weights_of(model, x, 1000)
    bounds = [float(log_mean_weight(weights.unflatten(1, (-1, k))).mean()) for k in (1, 4, 20, 1000)]
    assert bounds == sorted(bounds)
    mean, std = model.encode(x)  # at one sample the evidence lower bound, in closed form
    error = (x - model.decode(mean)).square().sum(1) + (std.square() @ model.weight.square().T).sum(1)
    kl = (mean.square() + std.square() - 1 - 2 * std.log()).sum(1) / 2
    elbo = (-error / (2 * STD**2) - 2.5 * math.log(2 * math.pi * STD**2) - kl).mean()
    assert bounds[0] == pytest.approx(float(elbo), abs=0.01)
    assert bounds[-1] == pytest.approx(float(exact), abs=0.01)
    assert float(exact) - bounds[0] > 0.3
    wide = weights_of(model, x, 1000, proposal="prior")
    assert effective_samples(wide).mean() < effective_samples(weights).mean() / 3
    wide = weights_of(model, x, 10_000, proposal="prior")
    assert float(log_mean_weight(wide).mean()) == pytest.approx(float(exact), abs=0.1)


@pytest.mark.parametrize(
    "machine", [RBM(6, 4), GaussianBernoulliRBM(3, 4, 0.7), GaussianBernoulliRBM(3, 4, 0.7, "each")]
)
def test_an_rbms_weights_are_its_free_energy(machine: RBM | GaussianBernoulliRBM) -> None:
    machine = machine.double()
    for seed, parameter in enumerate((machine.weight, machine.visible_bias, machine.hidden_bias)):
        parameter.data = 0.5 * normal(*parameter.shape, seed=seed)
    units = machine.num_visible
    v = (normal(10, units, seed=4) > 0).double() if isinstance(machine, RBM) else normal(10, units, seed=4)
    expected = -machine.free_energy(v).detach()
    torch.testing.assert_close(machine_log_weights(machine, v, torch.arange(10), 2), expected[:, None].expand(-1, 2))
    wide = machine_log_weights(machine, v, torch.arange(10), 4000, "prior")
    assert (log_mean_weight(wide) - expected).abs().max() < 0.15
    assert effective_samples(wide).min() < 3500


def test_laplace_and_gaussian_densities_are_torchs() -> None:
    x, mean = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    torch.testing.assert_close(
        log_laplace(x, mean, 0.3), torch.distributions.Laplace(mean, 0.3).log_prob(x).sum((1, 2))
    )
    torch.testing.assert_close(
        log_gaussian(x, mean, 0.3), torch.distributions.Normal(mean, 0.3).log_prob(x).sum((1, 2))
    )
