"""RBMs against enumeration: Z, conditionals, what Gibbs leaves invariant, what contrastive divergence learns."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.contrastive import PersistentChains, contrastive_loss, gibbs_divergence
from scoreray.trainer.energies.langevin import langevin_chain
from scoreray.trainer.networks.flops import training_flops
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM, GaussianRBMConfig, _states

F64 = torch.float64


def randomise(model, scale=0.7):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data + scale * torch.randn(parameter.shape, generator=generator)
    return model.double()


def binary(num_visible=5, num_hidden=3) -> RBM:
    return randomise(RBM(num_visible, num_hidden))


def gaussian(num_visible=2, num_hidden=3, stds="shared") -> GaussianBernoulliRBM:
    model = randomise(GaussianBernoulliRBM(num_visible, num_hidden, 0.6, stds))
    model.log_std.data.fill_(math.log(0.6))
    if stds == "each":
        model.log_std.data += torch.linspace(0.1, 0.6, num_visible, dtype=F64)
    return model


STDS = pytest.mark.parametrize("stds", ["shared", "each"])


def test_free_energy_sums_the_hidden_units_out():
    x = torch.randn(20, 2, dtype=F64)
    for model, v in ((binary(), _states(torch.zeros(5, dtype=F64))), (gaussian(), x), (gaussian(stds="each"), x)):
        h = _states(torch.zeros(3, dtype=F64))
        energies = torch.stack([model.energy(v, state.expand(len(v), -1)) for state in h])
        torch.testing.assert_close(model.free_energy(v), -torch.logsumexp(-energies, 0))


def test_the_partition_function_of_a_binary_rbm_is_the_sum_over_all_states_by_either_layer():
    for shape in ((5, 3), (3, 5)):
        model = binary(*shape)
        v = _states(torch.zeros(shape[0], dtype=F64))
        torch.testing.assert_close(model.log_partition(), torch.logsumexp(-model.free_energy(v), 0))


@STDS
def test_the_density_of_a_gaussian_rbm_integrates_to_one(stds):
    model = gaussian(stds=stds)
    axis = torch.linspace(-12, 12, 600, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    density = (-model.free_energy(grid) - model.log_partition()).exp().detach()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-8)


@STDS
def test_the_score_of_a_gaussian_rbm_is_minus_the_gradient_of_its_free_energy(stds):
    model, v = gaussian(stds=stds), torch.randn(20, 2, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.free_energy(v).sum(), v)
    torch.testing.assert_close(model.score(v), -gradient)


def test_block_gibbs_on_a_binary_rbm_reaches_its_exact_distribution():
    model, generator = binary(), torch.Generator().manual_seed(1)
    states = _states(torch.zeros(5, dtype=F64))
    exact = (-model.free_energy(states) - model.log_partition()).exp()
    count = 20_000
    v = model.gibbs(torch.zeros(count, 5, dtype=F64), 60, generator)
    place = (v @ (2.0 ** torch.arange(4, -1, -1, dtype=F64))).long()
    seen = torch.bincount(place, minlength=32) / count
    assert ((seen - exact).abs() < 4.5 * (exact * (1 - exact) / count).sqrt() + 1e-12).all()


@STDS
def test_block_gibbs_on_a_gaussian_rbm_reaches_the_moments_of_its_mixture(stds):
    model, generator = gaussian(stds=stds), torch.Generator().manual_seed(1)
    h = _states(torch.zeros(3, dtype=F64))
    shift = h @ model.weight.T
    log_weight = h @ model.hidden_bias + ((shift * model.visible_bias + shift.square() / 2) / model.variance).sum(1)
    weight, means = log_weight.softmax(0), model.visible_bias + shift
    mean = weight @ means
    second = weight @ (means**2 + model.variance)
    count = 20_000
    v = model.gibbs(torch.zeros(count, 2, dtype=F64), 200, generator)
    for values, expected in ((v, mean), (v**2, second)):
        assert ((values.mean(0) - expected).abs() < 4.5 * values.std(0) / math.sqrt(count)).all()


def test_contrastive_divergence_with_exact_samples_has_the_gradient_of_the_likelihood():
    model = binary()
    states = _states(torch.zeros(5, dtype=F64))
    data = states[[3, 3, 17, 9]]
    likelihood = model.free_energy(data).mean() + model.log_partition()
    expected = torch.autograd.grad(likelihood, list(model.parameters()))
    probability = (-model.free_energy(states) - model.log_partition()).exp().detach()
    # every state, as often as the model draws it: the mean over negatives is then exact
    loss = model.free_energy(data).mean() - (probability * model.free_energy(states)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
    many = data.repeat(12_500, 1)
    negatives = model.gibbs(torch.zeros(50_000, 5, dtype=F64), 60, torch.Generator().manual_seed(0))
    sampled = contrastive_loss(model.free_energy, many, negatives).mean()
    for got, want in zip(torch.autograd.grad(sampled, list(model.parameters())), expected, strict=True):
        assert (got - want).abs().max() < 4.5 * 0.5 / math.sqrt(50_000)


@STDS
def test_contrastive_divergence_of_a_gaussian_rbm_has_the_gradient_of_its_enumerated_likelihood(stds):
    """The negatives are a grid of points, as often as the model draws them; ln Z is summed over the hidden layer."""
    model, data = gaussian(stds=stds), torch.randn(30, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    expected = torch.autograd.grad(model.free_energy(data).mean() + model.log_partition(), list(model.parameters()))
    axis = torch.linspace(-10, 10, 400, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    probability = (-model.free_energy(grid) - model.log_partition()).exp().detach() * (axis[1] - axis[0]) ** 2
    loss = model.free_energy(data).mean() - (probability * model.free_energy(grid)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
    assert expected[-1].shape == model.log_std.shape == ((2,) if stds == "each" else (1,))


def test_units_of_equal_stds_are_the_machine_that_shares_one_and_a_fixed_one_is_not_trained():
    shared, each = gaussian(), GaussianBernoulliRBM(2, 3, 0.6, "each").double()
    each.load_state_dict({**shared.state_dict(), "log_std": shared.log_std.detach().expand(2)})
    v, h = torch.randn(9, 2, dtype=F64), torch.ones(9, 3, dtype=F64)
    for name in ("free_energy", "hidden_logits", "score", "quadratic"):
        torch.testing.assert_close(getattr(each, name)(v), getattr(shared, name)(v))
    torch.testing.assert_close(each.energy(v, h), shared.energy(v, h))
    torch.testing.assert_close(each.log_partition(), shared.log_partition())
    assert not GaussianBernoulliRBM(2, 3, 0.6, "fixed").log_std.requires_grad
    before = GaussianRBMConfig(num_hidden=3)  # as a checkpoint's config from before there was a choice
    assert before.build((2,)).state_dict()["log_std"].shape == (1,)
    assert GaussianRBMConfig(num_hidden=3, stds="each").build((1, 2, 2)).log_std.shape == (4,)


@pytest.mark.parametrize("persistent", [False, True], ids=["cd", "pcd"])
def test_contrastive_divergence_learns_an_enumerated_distribution(persistent):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    states = _states(torch.zeros(4))
    teacher = binary(4, 2).float()
    target = (-teacher.free_energy(states) - teacher.log_partition()).exp().detach()
    model = RBM(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    chains = PersistentChains(512, (4,))

    @torch.no_grad()
    def divergence() -> float:
        log_model = -model.free_energy(states) - model.log_partition()
        return float((target * (target.log() - log_model)).sum())

    before = divergence()
    for positions in torch.arange(500 * 512).split(512):
        data = states[torch.multinomial(target, 512, replacement=True, generator=generator)]
        start = chains.take(positions, torch.zeros(512, 4)) if persistent else data
        loss, ends = gibbs_divergence(model, data, start, 2, generator)
        chains.put(positions, ends)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    # A batch of 512 leaves about (15 states) / (2 x 512) = 0.015 nats of noise to a perfect learner's estimate.
    assert before > 0.15
    assert divergence() < 0.02


@pytest.mark.parametrize("persistent", [False, True], ids=["cd", "pcd"])
def test_contrastive_divergence_by_langevin_learns_a_gaussian_as_its_chain_sees_it(persistent):
    """E = a x^2 / 2: chains of step e settle at the variance 1 / (a (1 - e a / 2)), so CD stops at the data's.

    That is a = (1 - sqrt(1 - 2 e / s^2)) / e, with the chains' own bias in it, and not 1 / s^2.
    """
    std, step, count = 0.8, 0.2, 4096
    generator = torch.Generator().manual_seed(0)
    a = torch.tensor(3.0, dtype=F64, requires_grad=True)
    score, energy = (lambda x: -a * x), (lambda x: a * x.square().sum(1) / 2)
    chains = PersistentChains(count, (1,))
    seen = []
    for positions in torch.arange(400 * count).split(count):
        data = std * torch.randn(count, 1, generator=generator, dtype=F64)
        begin = chains.take(positions, torch.zeros_like(data)) if persistent else data
        noises = torch.randn(count, 2, 1, generator=generator, dtype=F64)
        ends = langevin_chain(score, begin, step, noises)
        chains.put(positions, ends)
        (gradient,) = torch.autograd.grad(contrastive_loss(energy, data, ends).mean(), a)
        with torch.no_grad():
            a.sub_(gradient)
        seen.append(a.item())
    expected = (1 - math.sqrt(1 - 2 * step / std**2)) / step
    assert abs(expected - 1 / std**2) > 0.3
    assert sum(seen[200:]) / 200 == pytest.approx(expected, rel=0.02)


def test_persistent_chains_start_fresh_continue_and_restart_at_the_configured_rate():
    chains = PersistentChains(1000, (2,), restart=0.3)
    positions = torch.arange(1000)
    assert (chains.take(positions, torch.ones(1000, 2)) == 1).all()
    chains.put(positions, torch.full((1000, 2), 6.0))
    later = chains.take(positions + 5000, torch.ones(1000, 2))
    restarted = later[:, 0] == 1
    assert (later[~restarted] == 6).all()
    assert abs(restarted.float().mean() - 0.3) < 4.5 * math.sqrt(0.21 / 1000)
    some = torch.tensor([5999, 5003])
    assert torch.equal(chains.take(some, torch.ones(2, 2)), later[some - 5000])


def test_persistent_chains_keep_their_precision_in_a_module_that_is_cast():
    chains = PersistentChains(2, (1,))
    chains.put(torch.arange(2), torch.tensor([[0.1], [1 / 3]]))
    torch.nn.Sequential(chains).bfloat16()
    assert chains.pool.flatten().tolist() == torch.tensor([0.1, 1 / 3]).tolist()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="21 units: 20 at most"):
        RBM(21, 21).log_partition()
    with pytest.raises(UserError, match="std is 0"):
        GaussianBernoulliRBM(2, 2, 0.0)
    with pytest.raises(UserError, match="num_hidden is 0"):
        RBM(2, 0)
    with pytest.raises(UserError, match=r"v is torch.float32 \(2, 5\): this machine takes torch.float32 \[B, 4\]"):
        RBM(4, 3).free_energy(torch.zeros(2, 5))
    with pytest.raises(UserError, match=r"v is torch\.float64"):
        GaussianBernoulliRBM(4, 3).gibbs(torch.zeros(2, 4, dtype=torch.float64), 1)
    with pytest.raises(UserError, match="num_sweeps is -1"):
        RBM(4, 3).gibbs(torch.zeros(2, 4), -1)


def test_a_machine_is_not_called_as_a_network_is_so_its_work_is_not_counted():
    """A run shows FLOPs where it can count them; the call that counts must fail as a call of another signature."""
    assert training_flops(RBM(4, 2), (1, 2, 2)) == 0
    assert RBM(4, 2)(torch.zeros(3, 4)).shape == (3,)
