"""NCSNv2's techniques give the ladder that its paper prints, and ladder networks know rungs only."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
import torch
from pydantic import Field, TypeAdapter

from scoreray.data.distances import largest_distance
from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import VE
from scoreray.trainer.networks.flops import flops
from scoreray.trainer.networks.ladder import (
    OnLadder,
    ladder_ratio,
    levels_needed,
    overlap,
    step_size,
    suggest_ladder,
    variance_ratio,
)
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.network import LadderNetworkConfig, NetworkConfig

CIFAR_RATIO = 5000 ** (1 / 231)


def test_technique_1_is_the_largest_pairwise_distance():
    data = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = max(float((a - b).norm()) for a in data for b in data)
    assert largest_distance(data, chunk=7) == pytest.approx(expected, rel=1e-5)


def test_technique_2_solves_its_equation_and_is_near_cifar_s_printed_ladder():
    assert overlap(ladder_ratio(3072), 3072) == pytest.approx(0.5, abs=1e-9)
    # The paper prints L = 232 for CIFAR-10, at which the overlap is 0.567; 0.5 itself needs 220.
    assert levels_needed(50, 0.01, 3072) == 220
    assert overlap(CIFAR_RATIO, 3072) == pytest.approx(0.567, abs=1e-3)
    assert ladder_ratio(784) > ladder_ratio(3072) > 1


def test_technique_2_is_bounded_in_few_dimensions_where_its_equation_has_no_root_or_a_large_one():
    assert overlap(100.0, 4) > 0.5  # however far apart, shells of so few dimensions overlap
    assert [ladder_ratio(d) for d in (1, 2, 4, 5, 84)] == [1.3] * 5
    assert ladder_ratio(85) < 1.3
    assert levels_needed(50, 0.01, 2) == 34


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_the_largest_distance_is_as_exact_far_from_the_origin(scale, offset):
    data = (
        offset + scale * torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).float()
    exact = torch.cdist(data.double(), data.double(), compute_mode="donot_use_mm_for_euclid_dist").max()
    assert largest_distance(data, chunk=70) == pytest.approx(float(exact), rel=1e-6)


def test_technique_4_gives_cifar_s_step_size():
    assert step_size(0.01, CIFAR_RATIO, 5) == pytest.approx(6.2e-6, rel=5e-3)


@pytest.mark.parametrize(("ratio", "steps"), [(CIFAR_RATIO, 5), (1.67, 100), (1.2, 3)])
def test_technique_4_s_variance_is_that_of_the_langevin_chain_and_no_step_does_better(ratio, steps):
    best = step_size(0.01, ratio, steps)
    variance = (0.01 * ratio) ** 2
    for _ in range(steps):  # Langevin on N(0, 0.01^2), exact in the variance
        variance = variance * (1 - best / 0.01**2) ** 2 + 2 * best
    assert variance_ratio(best, 0.01, ratio, steps) == pytest.approx(variance / 0.01**2, rel=1e-9)
    gap = abs(variance_ratio(best, 0.01, ratio, steps) - 1)
    for eps in torch.logspace(-9, math.log10(1.99e-4), 500).tolist():
        assert abs(variance_ratio(eps, 0.01, ratio, steps) - 1) >= gap - 1e-9


def test_a_ladder_is_suggested_from_data():
    data = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ladder = suggest_ladder(data)
    sigmas = ladder.sigmas()
    assert sigmas[0] == pytest.approx(largest_distance(data), rel=1e-6)
    assert sigmas[-1] == pytest.approx(0.02)
    assert overlap(float(sigmas[0] / sigmas[1]), 64) >= 0.5
    torch.testing.assert_close(sigmas, VE(ladder.sigma_min, ladder.sigma_max).ladder(ladder.num_levels))
    with pytest.raises(UserError, match=r"largest distance in the data is 0\.0"):
        suggest_ladder(torch.ones(10, 3))


def on_ladder(conditioning):
    torch.manual_seed(0)
    network = MLPConfig(16, 1).build((2,), 3)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return OnLadder(network, VE(0.01, 1.0).ladder(10), conditioning)


def test_a_ladder_network_sees_the_nearest_rung():
    network, sigmas = on_ladder("learned"), VE(0.01, 1.0).ladder(10).flip(0).float()
    assert network.rung(sigmas.log() / 4).tolist() == list(range(10))
    assert network.rung((sigmas * 1.2).log() / 4).tolist() == list(range(10))
    assert network.rung(torch.tensor([1e-6, 1e6]).log() / 4).tolist() == [0, 9]
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    c_noise = sigmas.log() / 4
    torch.testing.assert_close(network(x, c_noise), network.network(x, c_noise))  # as yet, rungs have their own levels
    assert torch.equal(network(x, (sigmas * 1.2).log() / 4), network(x, c_noise))


def test_a_config_puts_any_network_on_a_ladder():
    union = TypeAdapter(Annotated[NetworkConfig, Field(discriminator="kind")])
    for inner in ({"kind": "mlp", "hidden_size": 8}, {"kind": "unet", "model_channels": 8}):
        config = union.validate_python({"kind": "ladder", "num_levels": 5, "network": inner})
        network = config.build((1, 4, 4), 2)
        assert network.log_sigmas.shape == (5,)
        assert network(torch.ones(3, 1, 4, 4), torch.zeros(3)).shape == (3, 1, 4, 4)
        assert flops(network, (1, 4, 4)) > 0
    with pytest.raises(UserError, match="num_levels is 1"):
        LadderNetworkConfig(num_levels=1)


def test_rungs_stay_where_they_are_when_the_weights_become_bf16():
    sigmas = VE(0.01, 50.0).ladder(232).flip(0).float()
    network = OnLadder(torch.nn.Identity(), sigmas, "none").bfloat16()
    assert network.rung(sigmas.log() / 4).tolist() == list(range(232))


def test_rungs_learn_and_an_unconditional_network_is_ncsnv2_s():
    x, labels = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, -1])
    network = on_ladder("learned")
    sigma = VE(0.01, 1.0).ladder(10)[[0, 3, 3, 9]].float()
    Denoiser(network).denoise(x, sigma, labels).square().sum().backward()
    assert (network.codes.weight.grad != 0).squeeze(1).nonzero().flatten().tolist() == [0, 6, 9]
    blind = Denoiser(on_ladder("none"), "score", sigma_data=1e-9)
    scores = [blind.score(x * s, s, labels) * s for s in (0.1, 1.0)]
    torch.testing.assert_close(scores[0], scores[1])  # s(x; sigma) = f(x / sigma) / sigma


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'learned'"):
        OnLadder(torch.nn.Identity(), torch.ones(3), "learnt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="noise levels above 0"):
        OnLadder(torch.nn.Identity(), torch.zeros(3))
