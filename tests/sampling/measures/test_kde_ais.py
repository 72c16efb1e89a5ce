"""Kernel density estimates against closed forms, AIS against normalisers that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from scoreray.data.errors import UserError
from scoreray.sampling.measures import kde
from scoreray.sampling.measures.ais import GaussianPath, GaussianRBMPath, RBMPath, ais
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_kernel_density_estimate_is_scipys():
    data, x = normal(200, 1), normal(50, 1, seed=1)
    theirs = gaussian_kde(data.T.numpy(), bw_method=0.4 / data.std().item()).logpdf(x.T.numpy())
    np.testing.assert_allclose(kde.log_density(x, data, 0.4).numpy(), theirs, rtol=1e-9)


def test_one_point_is_a_gaussian_and_images_are_flattened():
    x = normal(4, 2, 3)
    expected = -0.5 * (x.square() / 0.25 + math.log(2 * math.pi * 0.25)).flatten(1).sum(1)
    torch.testing.assert_close(kde.log_density(x, torch.zeros(1, 2, 3), 0.5), expected)


def test_the_result_does_not_depend_on_chunks(monkeypatch):
    data, x = normal(100, 2), normal(37, 2, seed=1)
    whole, own = kde.log_density(x, data, 0.3), kde.leave_one_out(data, 0.3)
    monkeypatch.setattr(kde, "CHUNK", 700)
    torch.testing.assert_close(kde.log_density(x, data, 0.3), whole)
    assert kde.leave_one_out(data, 0.3) == pytest.approx(own)


def test_the_expected_estimate_of_normal_data_is_the_normal_widened_by_the_bandwidth():
    data, at = normal(20_000, 1), torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    widened = -0.5 * (at[:, 0] ** 2 / 1.25 + math.log(2 * math.pi * 1.25))
    torch.testing.assert_close(kde.log_density(at, data, 0.5), widened, atol=0.04, rtol=0)


def test_leave_one_out_is_the_estimate_without_each_point():
    data = normal(12, 2)
    others = [kde.log_density(data[i : i + 1], torch.cat([data[:i], data[i + 1 :]]), 0.5).item() for i in range(12)]
    assert kde.leave_one_out(data, 0.5) == pytest.approx(sum(others) / 12)


def test_the_chosen_bandwidth_is_near_the_best_one_for_normal_data_and_finds_narrow_modes():
    data = normal(1000, 1)
    assert 0.5 < kde.choose_bandwidth(data) / kde.scott(data) < 2
    modes = torch.cat([normal(300, 1) * 0.02, normal(300, 1, seed=1) * 0.02 + 5])
    assert kde.choose_bandwidth(modes) < 0.2 * kde.scott(modes)


@pytest.mark.parametrize("kernel", kde.KERNELS)
@pytest.mark.parametrize("dims", [1, 3])
def test_every_kernel_is_scikit_learns_and_integrates_to_one(kernel, dims):
    from sklearn.neighbors import KernelDensity

    data, x = normal(60, dims), 1.2 * normal(40, dims, seed=1)
    theirs = KernelDensity(bandwidth=0.9, kernel=kernel).fit(data.numpy()).score_samples(x.numpy())
    np.testing.assert_allclose(kde.log_density(x, data, 0.9, kernel).numpy(), theirs, rtol=1e-6)
    # By shells about one point: the density of a shell's radius times the surface of a sphere.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 2e-4
    line = torch.nn.functional.pad(u[:, None], (0, dims - 1))
    surface = 2 * math.pi ** (dims / 2) / math.gamma(dims / 2) * u ** (dims - 1)
    density = kde.log_density(line, torch.zeros(1, dims, dtype=torch.float64), 0.9, kernel).exp() * surface
    assert float(density.sum()) * 2e-4 == pytest.approx(1, abs=1e-3)
    second = float((density * u**2).sum()) * 2e-4 / dims
    assert kde.KERNELS[kernel].std(dims) * 0.9 == pytest.approx(second**0.5, rel=1e-3)


def test_a_bandwidth_of_each_dimension_divides_by_each():
    data, x, h = normal(30, 2), normal(20, 2, seed=1), torch.tensor([0.3, 2.0], dtype=torch.float64)
    product = torch.distributions.Normal(data, h).log_prob(x[:, None]).sum(2).logsumexp(1) - math.log(30)
    torch.testing.assert_close(kde.log_density(x, data, h), product)
    one = torch.full((2,), 0.5, dtype=torch.float64)
    for kernel in kde.KERNELS:
        torch.testing.assert_close(kde.log_density(x, data, one, kernel), kde.log_density(x, data, 0.5, kernel))
        axis = torch.linspace(-18, 18, 300, dtype=torch.float64)
        density = kde.log_density(torch.cartesian_prod(axis, axis), data[:8], h.clamp_min(0.5), kernel).exp()
        assert float(density.sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=5e-3), kernel
    with pytest.raises(UserError, match=r"bandwidth of shape \[3\]: must be one number, or \[2\]"):
        kde.log_density(x, data, torch.ones(3))
    with pytest.raises(UserError, match="must be positive numbers"):
        kde.log_density(x, data, torch.tensor([1.0, 0.0]))


def test_bandwidths_of_dimensions_follow_their_scales_and_raise_the_likelihood():
    data = normal(400, 2) * torch.tensor([1.0, 50.0])
    chosen = kde.choose_bandwidths(data)
    assert 25 < float(chosen[1] / chosen[0]) < 100
    assert kde.leave_one_out(data, chosen) > kde.leave_one_out(data, kde.choose_bandwidth(data)) + 0.5
    narrow = torch.cat(
        [normal(400, 2) * 0.02 + torch.tensor([0.0, 0.0]), normal(400, 2, seed=1) * 0.02 + torch.tensor([4.0, 0])]
    )
    narrow[:, 1] = normal(800, 1, seed=2)[:, 0]  # one dimension has two narrow modes, the other is normal
    found = kde.choose_bandwidths(narrow)
    assert float(found[0]) < 0.05 < float(found[1])


def test_rules_are_scipys_and_other_kernels_get_the_same_spread():
    data = normal(200, 2) * torch.tensor([1.0, 3.0])
    theirs = gaussian_kde(data.T.numpy())
    stds = data.std(0)
    for rule, factor in (("scott", theirs.scotts_factor()), ("silverman", theirs.silverman_factor())):
        torch.testing.assert_close(kde.by_rule(data, rule, per_dimension=True), factor * stds)
    tophat, gaussian = kde.by_rule(data, "scott", "tophat"), kde.by_rule(data, "scott")
    assert tophat == pytest.approx(gaussian * 2)  # sqrt(d + 2) standard deviations


def test_kernels_that_end_have_points_without_density_and_say_so():
    data = torch.cat([normal(50, 1), torch.tensor([[1e6]], dtype=torch.float64)])
    assert kde.log_density(data[-1:] / 2, data, 1.0, "tophat").item() == -math.inf
    with pytest.raises(UserError, match=r"kernel 'tophat': some point has no other within .*take kernel gaussian"):
        kde.choose_bandwidth(data, [0.1, 1.0], "tophat")
    with pytest.raises(UserError, match="dimension 1 of the data has no spread"):
        kde.choose_bandwidths(torch.nn.functional.pad(data, (0, 1)))
    with pytest.raises(UserError, match="unknown kernel 'tophatt'; did you mean 'tophat'"):
        kde.log_density(data, data, 1.0, "tophatt")


def test_bad_points_and_bandwidths_are_refused():
    with pytest.raises(UserError, match="bandwidth = 0"):
        kde.log_density(normal(2, 2), normal(2, 2), 0.0)
    with pytest.raises(UserError, match="x of 3 dimensions"):
        kde.log_density(normal(2, 3), normal(2, 2), 1.0)
    with pytest.raises(UserError, match="must be finite"):
        kde.log_density(torch.full((2, 2), math.nan), normal(2, 2), 1.0)
    with pytest.raises(UserError, match="no spread"):
        kde.scott(torch.ones(5, 2))
    with pytest.raises(UserError, match="at least two"):
        kde.leave_one_out(normal(1, 2), 1.0)


def double_well(x: torch.Tensor) -> torch.Tensor:
    return (2 * (x**2 - 1) ** 2).sum(1)


def test_ais_finds_the_normaliser_of_a_gaussian():
    # E = |x - m|^2 / (2 s^2): ln Z = d ln(s sqrt(2 pi)).
    std, dims = 0.3, 4
    path = GaussianPath(lambda x: (x - 0.5).square().sum(1) / (2 * std**2), dims, step_size=0.05, num_steps=3)
    found = ais(path, torch.linspace(0, 1, 201), range(500))
    assert found.log_z == pytest.approx(dims * math.log(std * math.sqrt(2 * math.pi)), abs=5 * found.std_error)
    assert found.std_error < 0.05
    assert found.effective_samples > 200


def test_ais_finds_the_normaliser_of_a_double_well_and_weighs_its_ends():
    axis = torch.linspace(-4, 4, 20_001, dtype=torch.float64)[:, None]
    exact = 2 * math.log(torch.trapezoid((-double_well(axis)).exp(), axis[:, 0]).item())
    found = ais(GaussianPath(double_well, 2, step_size=0.05, num_steps=2), torch.linspace(0, 1, 101), range(800))
    assert found.log_z == pytest.approx(exact, abs=5 * found.std_error)
    assert found.std_error < 0.05


def test_without_steps_between_ais_is_importance_sampling_and_more_betas_do_better():
    path = GaussianPath(lambda x: (x - 1.0).square().sum(1) / (2 * 0.2**2), 3, step_size=0.02, num_steps=3)
    exact = 3 * math.log(0.2 * math.sqrt(2 * math.pi))
    once, often = (ais(path, torch.linspace(0, 1, n), range(400)) for n in (2, 150))
    assert often.effective_samples > 20 * once.effective_samples
    assert often.log_z == pytest.approx(exact, abs=5 * often.std_error)


def test_mala_leaves_its_density_invariant_at_any_step_size():
    path = GaussianPath(lambda x: x.square().sum(1) / 2, 1, step_size=0.9)
    x = normal(40_000, 1)
    for number in range(10):
        x = path.step(x, 1.0, torch.arange(40_000), number)
    assert x.var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / 40_000))


def test_a_chain_depends_on_its_seed_alone():
    path = GaussianPath(double_well, 2)
    together = ais(path, torch.linspace(0, 1, 20), [5, 6, 7])
    alone = ais(path, torch.linspace(0, 1, 20), [6])
    assert torch.equal(together.x[1], alone.x[0])
    assert together.log_weights[1] == alone.log_weights[0]


@pytest.mark.parametrize("betas", [[0.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0]])
def test_betas_that_do_not_ascend_from_0_to_1_are_refused(betas):
    with pytest.raises(UserError, match="ascend strictly from 0 to 1"):
        ais(GaussianPath(double_well, 2), betas, [0])
    with pytest.raises(UserError, match="step_size = 0"):
        GaussianPath(double_well, 2, step_size=0.0)


def with_weights(machine, scale: float):
    generator = torch.Generator().manual_seed(0)
    for parameter in (machine.weight, machine.visible_bias, machine.hidden_bias):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return machine.double()


@pytest.mark.parametrize("base", ["own bias", "uniform"])
def test_ais_finds_the_partition_function_of_an_enumerated_rbm(base):
    rbm = with_weights(RBM(12, 8), 1.0)
    path = RBMPath(rbm, None if base == "own bias" else torch.zeros(12, dtype=torch.float64))
    found = ais(path, torch.linspace(0, 1, 301), range(500))
    assert found.log_z == pytest.approx(rbm.log_partition().item(), abs=5 * found.std_error)
    assert found.std_error < 0.05


@pytest.mark.parametrize("stds", ["shared", "each"])
def test_ais_finds_the_partition_function_of_an_enumerated_gaussian_bernoulli_rbm(stds):
    rbm = with_weights(GaussianBernoulliRBM(6, 7, std=0.8, stds=stds), 0.7)
    rbm.log_std.data += 0.3 * torch.linspace(-1, 1, len(rbm.log_std)) if stds == "each" else 0
    found = ais(GaussianRBMPath(rbm), torch.linspace(0, 1, 301), range(500))
    assert found.log_z == pytest.approx(rbm.log_partition().item(), abs=5 * found.std_error)
    assert found.std_error < 0.1


@pytest.mark.parametrize(
    "path",
    [
        RBMPath(with_weights(RBM(5, 4), 1.0)),
        GaussianRBMPath(with_weights(GaussianBernoulliRBM(5, 4, stds="each"), 1.0)),
    ],
    ids=["binary", "gaussian"],
)
def test_a_path_to_an_rbm_ends_in_its_free_energy(path):
    v = path.draw(torch.arange(6))
    torch.testing.assert_close(path.log_density(v, 1.0), -path.rbm.free_energy(v))
