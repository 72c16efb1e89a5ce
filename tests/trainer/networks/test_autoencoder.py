"""Autoencoders: the loss in closed form (KL, probabilistic PCA's evidence bound), shapes, somebody else's networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from scoreray.data.errors import UserError
from scoreray.trainer.networks.autoencoder import AutoencoderConfig, check_autoencoder
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective, kl_from_standard_normal
from scoreray.trainer.perceptual import perceptual_distance
from scoreray.trainer.step import AutoencoderModule

TINY = AutoencoderConfig(
    model_channels=8, channel_mult=(1, 2), num_blocks=1, patch_size=2, latent_channels=3, head_channels=8
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_divergence_is_that_of_torchs_distributions() -> None:
    mean, std = numbers(5, 3, 2, 2), numbers(5, 3, 2, 2, seed=1).exp()
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_from_standard_normal(mean, std), expected)


def test_the_loss_is_per_value_and_its_weights_are_what_they_say() -> None:
    x, made, mean, std = numbers(4, 1, 3, 3), numbers(4, 1, 3, 3, seed=1), numbers(4, 2), numbers(4, 2, seed=2).exp()
    kl = kl_from_standard_normal(mean, std) / 9
    for word, error in (("mse", (x - made).square()), ("l1", (x - made).abs())):
        objective = AutoencodingObjective(word, kl_weight=0.3)
        torch.testing.assert_close(objective.error(x, made, mean, std), error.mean((1, 2, 3)) + 0.3 * kl)


class Linear(nn.Module):
    """Probabilistic PCA as an autoencoder: x | z is N(W z, variance I), and z | x its exact posterior or a learned one
    of the same form."""

    def __init__(self, loadings: Tensor, variance: float):
        super().__init__()
        d, k = loadings.shape
        inner = loadings.T @ loadings + variance * torch.eye(k)  # diagonal where the loadings are orthogonal
        self.down, self.up = nn.Linear(d, k, bias=False), nn.Linear(k, d, bias=False)
        self.log_std = nn.Embedding(1, k)
        self.down.weight.data, self.up.weight.data = torch.linalg.solve(inner, loadings.T), loadings
        self.log_std.weight.data[0] = (variance / inner.diagonal()).log() / 2

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.down(x)
        return mean, self.log_std(torch.zeros(len(x), dtype=torch.int64)).exp().expand_as(mean)

    def decode(self, z: Tensor) -> Tensor:
        return self.up(z)


def pca(d: int = 5, k: int = 2, variance: float = 0.3, rows: int = 20_000) -> tuple[Tensor, Tensor, float]:
    """(rows of a Gaussian of covariance W W^T + variance I, W [d, k] with orthogonal columns, -ln p of a row)."""
    loadings = torch.linalg.qr(numbers(d, k))[0] * torch.tensor([1.5, 0.8])
    density = MultivariateNormal(torch.zeros(d).double(), loadings @ loadings.T + variance * torch.eye(d))
    torch.manual_seed(0)
    return density.sample((rows,)), loadings, float(density.entropy())


def bound(loss: Tensor, d: int, variance: float) -> float:
    """Nats of a row, of the loss with kl_weight 2 variance: the negative evidence bound of the Gaussian decoder."""
    return float(loss.double().mean()) * d / (2 * variance) + d / 2 * math.log(2 * math.pi * variance)


def test_at_probabilistic_pcas_optimum_the_loss_is_the_likelihood() -> None:
    """The posterior is exact, so the bound is tight (Tipping & Bishop 1999; Lucas 2019); another decoder's is above."""
    x, loadings, entropy = pca()
    objective, positions = AutoencodingObjective("mse", kl_weight=2 * 0.3), torch.arange(len(x))

    def nats(network: nn.Module) -> float:
        module = AutoencoderModule(network, objective, seed=0).double()
        with torch.no_grad():
            return bound(module(x, None, positions)[0], 5, 0.3)

    assert nats(Linear(loadings, 0.3)) == pytest.approx(entropy, abs=0.03)  # of 20,000 rows
    assert nats(Linear(1.3 * loadings, 0.3)) > entropy + 0.05


def test_training_finds_probabilistic_pca() -> None:
    """From random weights to the likelihood of the data, which no decoder of this variance exceeds."""
    x, _, entropy = pca(rows=1000)
    network = Linear(0.3 * numbers(5, 2, seed=3), 0.3)
    module = AutoencoderModule(network, AutoencodingObjective("mse", kl_weight=0.6), seed=0).double()
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for step in range(100):
        optimizer.zero_grad()
        loss, _ = module(x, None, torch.arange(len(x)) + step * len(x))
        loss.mean().backward()
        optimizer.step()
    assert bound(loss.detach(), 5, 0.3) == pytest.approx(entropy, abs=0.1)


@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 8), (2, 4, 8, 4)])
def test_latents_are_as_small_as_the_config_says(shape: tuple[int, ...]) -> None:
    network = TINY.build(shape)
    x = torch.randn(2, *shape)
    mean, std = network.encode(x)
    assert TINY.factor == 4
    assert mean.shape == std.shape == (2, 3, *(length // 4 for length in shape[1:]))
    assert bool((std > 0).all())
    assert network.decode(mean).shape == x.shape
    torch.testing.assert_close(network(x, torch.ones(2)), network.decode(mean + std))


def test_any_grid_of_whole_latents_is_taken_and_others_are_refused() -> None:
    network = TINY.build((3, 8, 12))
    assert network.encode(torch.zeros(1, 3, 16, 4))[0].shape == (1, 3, 4, 1)
    with pytest.raises(UserError, match=r"a grid of \[8, 10\] is no multiple of 4"):
        TINY.build((3, 8, 10))
    with pytest.raises(UserError, match=r"samples of shape \(1, 8, 12\): this network was built for \(3, H, W\)"):
        network.encode(torch.zeros(1, 1, 8, 12))


def test_bf16_weights_encode_and_decode_in_float32_at_the_ends() -> None:
    network = TINY.build((3, 8, 8)).bfloat16()
    mean, std = network.encode(torch.randn(2, 3, 8, 8))
    assert (mean.dtype, std.dtype, network.decode(mean).dtype) == (torch.float32,) * 3


def test_a_samples_loss_depends_on_its_position_alone() -> None:
    torch.manual_seed(0)
    module = AutoencoderModule(TINY.build((3, 8, 8)), AutoencodingObjective(), seed=3).double()
    images, positions = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(10, 14)
    whole, sigma = module(images, None, positions)
    assert not sigma.any()
    parts = [module(images[i : i + 1], None, positions[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(module(images, None, positions + 1)[0], whole)


def test_somebody_elses_network_is_looked_at_before_it_is_trained() -> None:
    with torch.device("meta"):
        made = Linear(torch.zeros(4, 2), 1.0)
    with pytest.raises(
        UserError, match=r"trains a network that has encode and decode, and network.kind 'unet' has not"
    ):
        check_autoencoder(nn.Linear(1, 1), "unet", (1,))
    made.decode = lambda z: z  # type: ignore[method-assign]
    made.encode = lambda x: (x[:, :2], x[:, :2])  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"kind 'a:B': of x \[2, 4\] encode gave \[2, 2\] and \[2, 2\], decode \[2, 2\]"
    ):
        check_autoencoder(made, "a:B", (4,))


FEATURES = """
import torch

def flat(x):
    return [x.flatten(1), x]

def wrong(x):
    return x.mean()
"""


def test_a_perceptual_term_is_a_distance_of_directions(own_package: Callable[..., Any], tmp_path: Any) -> None:
    own_package("percept", features=FEATURES)
    distance = perceptual_distance(AutoencodingObjective(perceptual="percept.features:flat"), (3, 2, 2))
    assert distance is not None
    x = numbers(2, 3, 2, 2)
    torch.testing.assert_close(distance(x, 5 * x), torch.zeros(2).double())
    torch.testing.assert_close(distance(x, -x), torch.full((2,), 8.0).double())  # |a + a|^2 = 4 of each of two maps
    made = torch.zeros_like(x).requires_grad_()
    distance(x, made).sum().backward()
    assert made.grad is not None
    assert bool(made.grad.isfinite().all())
    with pytest.raises(UserError, match=r"objective.perceptual: percept.features:wrong gave \[\] for samples"):
        perceptual_distance(AutoencodingObjective(perceptual="percept.features:wrong"), (3, 2, 2))
    scripted = tmp_path / "features.pt"
    torch.jit.save(torch.jit.script(nn.Flatten()), scripted)
    found = perceptual_distance(AutoencodingObjective(perceptual=str(scripted)), (3, 2, 2))
    assert found is not None
    torch.testing.assert_close(found(x, -x), torch.full((2,), 4.0).double())
    for name, message in (("missing.pt", "there is no such file"), ("a.onnx", "no file that ends in .pt or .ts")):
        with pytest.raises(UserError, match=message):
            perceptual_distance(AutoencodingObjective(perceptual=name), (3, 2, 2))
