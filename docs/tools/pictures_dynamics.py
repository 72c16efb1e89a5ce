"""The gallery's picture of samplers with velocities or acceptance: their paths over an exact density."""

from __future__ import annotations

from typing import Any

import torch
from pictures import COLORS, Figure, _bare, _density, plt

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import SamplerState, drive, start
from scoreray.trainer.diffusion.targets import Mixture

SIGMA = 0.25
STEPS, SHOWN = 120, 72


def dynamics() -> Figure:
    """One path of each over the density at noise level 0.25, and the end states of 1,000 chains behind it."""
    corners = torch.tensor([[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]], dtype=torch.float64)
    target = Mixture(corners, 0.1, torch.tensor([0.4, 0.1, 0.2, 0.3]))
    runs: dict[str, dict[str, Any]] = {
        "langevin": {"step_size": 0.3 * SIGMA**2},
        "baoab": {"time_step": 0.8, "friction": 0.5},
        "cld": {"time_step": 0.8},
        "mala": {"step_size": 1.2 * SIGMA**2},
        "hmc": {"time_step": 1.2, "num_leapfrogs": 6},
    }
    figure, axes = plt.subplots(1, len(runs), figsize=(15, 3.5), layout="constrained")
    for ax, (name, options) in zip(axes, runs.items(), strict=True):
        noise, seen = SampleNoise(range(1000)), list[SamplerState]()
        begin = corners[:1] + SIGMA * noise.normal((1000, 2), torch.float64)
        num_steps = STEPS // 6 if name == "hmc" else STEPS
        steps = start(name, begin, [1.0, SIGMA, 0.0], noise, num_steps=num_steps, **options)
        ends, _ = drive(steps, target, callback=seen.append)
        _density(ax, target, SIGMA)
        ax.scatter(*ends.T, s=1.5, color=COLORS[0], alpha=0.5, lw=0)
        path = torch.stack([state.x[0] for state in seen[:SHOWN]])
        ax.plot(*path.T, lw=0.7, color=COLORS[1], alpha=0.9)
        ax.plot(*path[0], "o", ms=4, color=COLORS[1])
        counted = noise.acceptance
        rate = f", {counted.accepted / counted.proposed:.0%} accepted" if counted.proposed else ""
        low = (ends.sum(1) < 0).double().mean().item()
        _bare(ax, f"{name}: {len(seen)} calls{rate}\n{low:.0%} below the diagonal")
    return figure
