"""The network alone, as its own repository tests it: no scoreray command, no Ray."""

from __future__ import annotations

import torch
from ringnet.data import Rings
from ringnet.network import RingNet

from scoreray.sampling.samplers import sample
from scoreray.sampling.sigmas import karras
from scoreray.trainer.denoiser import Denoiser


def test_a_few_steps_of_training_lower_the_error_and_any_sampler_draws() -> None:
    torch.manual_seed(0)
    rings = Rings(count=64)
    x0 = torch.stack([torch.from_numpy(rings[i]["array"]) for i in range(len(rings))])
    denoiser = Denoiser(RingNet(width=32).build((2,), {}), "edm", 0.5)
    optimizer, errors = torch.optim.Adam(denoiser.parameters(), 3e-3), []
    for _ in range(60):
        sigma = (torch.randn(len(x0)) * 1.2 - 1.2).exp()
        error = (denoiser(x0 + sigma[:, None] * torch.randn_like(x0), sigma) - x0).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert sum(errors[-10:]) < sum(errors[:10])
    drawn = sample(denoiser, torch.randn(8, 2) * 80, karras(8), sampler="heun")
    assert drawn.shape == (8, 2)
