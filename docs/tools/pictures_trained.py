"""The gallery's pictures of small networks that it trains first, a minute or so each on one core. See docs/gallery."""

from __future__ import annotations

import functools
from typing import Any

import torch
from pictures import COLORS, INK, _bare, _label, plt

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import OF_MAPS, SAMPLERS, drive, num_calls, start
from scoreray.sampling.samplers.sigmas import geometric, karras
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.noise import normal
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.diffusion.sigma_sampling import LogUniform
from scoreray.trainer.diffusion.targets import ring, sample_target
from scoreray.trainer.diffusion.weighting import WEIGHTINGS
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.step import TrainingModule

BATCH = 512


def train(objective: EDMObjective, data: torch.Tensor, steps: int, hidden_size: int = 128) -> Denoiser:
    """A small MLP trained on points [N, 2] by `objective`, with a learning rate that falls to 0."""
    torch.manual_seed(0)
    network = MLPConfig(hidden_size=hidden_size).build((2,))
    module = TrainingModule(Denoiser(network), objective, EDM(0.002, 80.0), seed=0, global_batch_size=BATCH)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        loss, _ = module(data[positions % len(data)], None, positions)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return module.denoiser.eval().requires_grad_(False)


def weightings(steps: int = 1000) -> plt.Figure:
    """What a weighting does: the denoising error above the optimum, by noise level, after the same training."""
    target = ring()
    data = sample_target("mixture", 100_000)
    x0, levels = sample_target("mixture", 4096, seed=1), geometric(40, 0.005, 20.0)[:-1].float()
    figure, ax = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    names = ("edm", "sigma2", "constant", "min_snr", "learned", "adaptive")
    for color, name in zip(COLORS, names, strict=False):
        sampling = LogUniform(stratified=True)
        denoiser = train(EDMObjective(weighting=WEIGHTINGS[name](), sigma_sampling=sampling), data, steps)
        ax.loglog(levels, [excess(denoiser, target, x0, float(s)) for s in levels], color=color, lw=1.4, label=name)
    _label(ax, "Distance to the exact denoiser by noise level", "noise level sigma", "|D - exact D|^2 / c_out^2", True)
    return figure


def excess(denoiser: Any, target: Any, x0: torch.Tensor, sigma: float) -> float:
    """Mean squared distance of a denoiser to the exact one, over EDM's c_out^2, on fixed noise."""
    x = x0 + sigma * normal(7, torch.arange(len(x0)), (2,))
    error = (denoiser(x, sigma) - target(x, sigma)).square().mean().item()
    return error * (sigma**2 + 0.25) / (0.25 * sigma**2)


@functools.cache
def checkerboard_denoiser(steps: int = 3500) -> Denoiser:
    return train(EDMObjective(), sample_target("checkerboard", 400_000), steps)


def every_sampler() -> plt.Figure:
    """One network trained on the checkerboard, drawn from by every sampler within 64 calls (Langevin's kinds more)."""
    denoiser, count = checkerboard_denoiser(), 3000
    figure, axes = plt.subplots(3, 8, figsize=(16, 6.7), layout="constrained")
    names = [name for name in SAMPLERS if name not in OF_MAPS]
    for ax in axes.flat[1 + len(names) :]:
        ax.axis("off")
    _scatter(axes.flat[0], sample_target("checkerboard", count), "data")
    for ax, name in zip(axes.flat[1:], names, strict=False):
        noise = SampleNoise(range(count))
        sigmas, options = settings(name)
        x = float(sigmas[0]) * noise.normal((count, 2))
        points, nfe = drive(start(name, x, sigmas, noise, **options), denoiser)
        _scatter(ax, points, f"{name}, {nfe}")
    return figure


def settings(name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """A grid and options by which a sampler takes 64 calls or fewer; Langevin's kinds take several hundred."""
    if name in ("langevin", "sgld"):
        return geometric(2, 0.05, 1.0), {"num_steps": 300}
    if name in ("baoab", "cld", "mala", "hmc"):
        return geometric(32, 0.01, 20.0), {"anneal": True, "num_steps": 2 if name == "hmc" else 10}
    if name == "ncsn":
        return geometric(16, 0.01, 20.0), {"num_steps": 20}
    if name == "ncsnv2":
        return geometric(60, 0.01, 20.0), {}
    if name == "rk45":
        return karras(18), {"rtol": 1e-2, "atol": 1e-2}
    count = max(n for n in range(2, 65) if num_calls(name, karras(n)) <= 64)
    return karras(count), {}


def _scatter(ax: plt.Axes, points: torch.Tensor, title: str) -> None:
    ax.scatter(points[:, 0], points[:, 1], s=1.2, color=INK if title == "data" else COLORS[0], alpha=0.4, lw=0)
    _bare(ax, title)
