"""Energies read out of the image networks: their gradient is what it says, and trains through second derivatives."""

from __future__ import annotations

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.energy import READOUTS, energy
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.unet import UNetConfig

F64 = torch.float64
SHAPE = (1, 8, 8)
CONFIGS = {
    "unet": UNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,)),
    "unet, checkpointed": UNetConfig(model_channels=8, num_blocks=1, activation_checkpointing=True),
    "dit": DiTConfig(patch_size=4, hidden_size=16, depth=2, num_heads=2),
    "mlp": MLPConfig(16, 2),
}


def trained(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = CONFIGS[name].build(SHAPE, 3).double()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def test_readouts_are_the_formulas():
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    f = lambda x, *_: x.sin()  # noqa: E731
    values = {name: energy(f, name, x, torch.zeros(4), None) for name in READOUTS}
    torch.testing.assert_close(values["dot"], (x * x.sin()).sum((1, 2)))
    torch.testing.assert_close(values["residual"], (x - x.sin()).square().sum((1, 2)) / 2)
    torch.testing.assert_close(values["norm"], x.sin().square().sum((1, 2)) / 2)
    with pytest.raises(UserError, match="did you mean 'norm'"):
        energy(f, "nrm", x, torch.zeros(4), None)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("network", CONFIGS)
def test_over_any_network_the_score_is_a_gradient_that_trains(network, readout):
    denoiser = Denoiser(trained(network), f"energy_{readout}")
    x = torch.randn(2, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(0))
    sigma, labels = torch.tensor([0.3, 2.0], dtype=F64), torch.tensor([2, -1])
    direction = torch.randn(2, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rise = denoiser.energy(x + 1e-6 * direction, sigma, labels) - denoiser.energy(
            x - 1e-6 * direction, sigma, labels
        )
    along = -(denoiser.score(x, sigma, labels) * direction).flatten(1).sum(1)
    torch.testing.assert_close(along.detach(), rise / 2e-6, rtol=1e-6, atol=1e-6)

    parameter = next(p for name, p in denoiser.named_parameters() if "out" in name or "last" in name)
    step = torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    loss = lambda: denoiser.denoise(x, sigma, labels).square().sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(), parameter)
    assert gradient.abs().max() > 0
    values = []
    for sign in (1, -1):
        parameter.data += sign * 1e-6 * step
        values.append(float(loss().detach()))
        parameter.data -= sign * 1e-6 * step
    assert float((gradient * step).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-6)
