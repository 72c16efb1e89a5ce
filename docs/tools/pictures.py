"""The gallery's pictures of exact densities: no network, so what is seen is the method. See docs/gallery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from compare import Result, error_against_nfe
from torch import Tensor

from scoreray.sampling.guidance.guidance import ClassifierFree
from scoreray.sampling.guidance.inverse import inpaint
from scoreray.sampling.measures.likelihood import log_likelihood
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import SamplerState, drive, sample, start
from scoreray.sampling.samplers.sigmas import GRIDS, from_process, geometric, karras
from scoreray.trainer.diffusion.process import PROCESSES, VP
from scoreray.trainer.diffusion.targets import Mixture, ring, sample_target
from scoreray.trainer.flows.couplings import OptimalTransportCoupling

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED = "#1f2430", "#8a909c"
COLORS = ("#2563a8", "#d1495b", "#2e8b57", "#e08e1b", "#7b4fa3", "#0f8b8d", "#a05a2c", "#5c6770")
DETERMINISTIC = ("euler", "heun", "dpm2", "dpmpp_2m", "unipc", "rk45")
STOCHASTIC = (
    "ddpm", "reverse_sde", "predictor_corrector", "edm_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "ncsn", "ncsnv2",
)  # fmt: skip


def processes() -> Figure:
    """alpha(t), sigma(t) and their ratio for every process, and the noise grids that samplers walk down."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for color, (name, kind) in zip(COLORS, PROCESSES.items(), strict=False):
        process = kind()
        u = torch.linspace(0, 1, 300, dtype=torch.float64)
        t = process.t_min + u * (process.t_max - process.t_min)
        line = {"color": color, "lw": 1.6, "ls": "--" if name in ("ddpm", "edm") else "-"}  # on vp's and ve's lines
        axes[0].plot(u, process.alpha(t), label=name, **line)
        axes[1].semilogy(u, process.sigma(t).clamp_min(1e-3), **line)
        axes[2].semilogy(u, process.noise_to_signal(t).clamp_min(1e-3), **line)
    for color, (name, grid) in zip(COLORS, GRIDS.items(), strict=False):
        axes[3].semilogy(grid(18, 0.002, 80.0)[:-1], "o-", ms=3, lw=1, color=color, label=name)
    axes[3].semilogy(from_process(VP(), 18)[:-1], "o-", ms=3, lw=1, color=COLORS[4], label="from_process(VP)")
    _label(axes[0], "signal: alpha(t)", "t, from t_min to t_max", "", legend=True)
    _label(axes[1], "noise: sigma(t)", "t, from t_min to t_max", "")
    _label(axes[2], "noise level: sigma(t) / alpha(t)", "t, from t_min to t_max", "")
    _label(axes[3], "18 steps of each grid", "step", "noise level", legend=True)
    return figure


def score_fields() -> Figure:
    """The smoothed density of three targets and its score, at four noise levels."""
    levels = (1.0, 0.4, 0.15, 0.05)
    figure, axes = plt.subplots(3, len(levels), figsize=(11, 8.4), layout="constrained")
    for row, name in zip(axes, ("mixture", "spirals", "checkerboard"), strict=True):
        target = ring() if name == "mixture" else Mixture(sample_target(name, 1500), std=0.03)
        for ax, sigma in zip(row, levels, strict=True):
            _density(ax, target, sigma)
            points = _mesh(15)
            score = sigma * target.score(points, sigma)
            arrows = score / (1 + score.norm(dim=1, keepdim=True))  # far from the data scores grow without bound
            ax.quiver(*points.T, *arrows.T, color=INK, alpha=0.75, width=0.005, scale=16)
            _bare(ax, f"{name}, sigma {sigma:g}")
    return figure


def sampler_paths() -> Figure:
    """Paths in one dimension from noise (left) to data (right) over the density at each noise level."""
    target = Mixture(torch.tensor([[-0.6], [0.2], [0.8]], dtype=torch.float64), 0.08, torch.tensor([0.4, 0.2, 0.4]))
    runs = {"heun": geometric(48, 0.02, 10.0), "ddpm": geometric(96, 0.02, 10.0), "edm_sde": geometric(48, 0.02, 10.0),
            "ncsn": geometric(48, 0.02, 10.0)}  # fmt: skip
    options: dict[str, dict[str, Any]] = {"edm_sde": {"s_churn": 10.0}, "ncsn": {"num_steps": 3}}
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), layout="constrained", sharey=True)
    levels, place = geometric(240, 0.02, 10.0)[:-1], torch.linspace(-2.6, 2.6, 260, dtype=torch.float64)
    scale = (levels**2 + target.means.var()).sqrt()
    density = torch.stack([target.log_density((place * k)[:, None], s) + k.log() for s, k in zip(levels, scale)])  # noqa: B905
    for ax, (name, sigmas) in zip(axes, runs.items(), strict=True):
        ax.pcolormesh(
            levels, place, density.exp().T, cmap="Blues", vmin=0, vmax=1.3, shading="nearest", rasterized=True
        )
        noise = SampleNoise(range(12))
        seen: list[SamplerState] = []
        x = 10.0 * noise.normal((12, 1), torch.float64)
        steps = start(name, x, sigmas, noise, **options.get(name, {}))
        drive(steps, target, callback=seen.append)
        calls, seen = len(seen), seen[:: 2 if name in ("heun", "edm_sde") else 1]  # not what Heun looks at on its way
        at = torch.tensor([float(progress.sigma) for progress in seen], dtype=torch.float64)
        path = torch.stack([progress.x[:, 0] for progress in seen]) / (at**2 + target.means.var()).sqrt()[:, None]
        ax.plot(at, path, lw=0.8, color=COLORS[1], alpha=0.85)
        ax.set_xscale("log")
        ax.set_xlim(10, 0.02)
        ax.set_ylim(-2.6, 2.6)
        _label(ax, f"{name}, {calls} calls", "noise level sigma", "x / sqrt(sigma^2 + s^2)" if name == "heun" else "")
        ax.grid(False)
    return figure


def langevin_modes() -> Figure:
    """Langevin at one noise level keeps the modes it began in; annealed, it finds their weights."""
    target = Mixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64), 0.2, torch.tensor([0.2, 0.8]))
    count = 1500
    uniform = 4 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    noise = SampleNoise(range(count))
    ladder = geometric(10, 0.1, 6.0)
    drawn = {
        "exact": target.sample(count, torch.Generator().manual_seed(1)),
        "langevin, 1,000 steps": sample(
            target, uniform, [1.0, 0.1, 0.0], sampler="langevin", generator=noise, num_steps=1000
        ),
        "ncsn, 10 levels of 100": sample(
            target, 6.0 * noise.normal((count, 2), torch.float64), ladder, sampler="ncsn", generator=noise
        ),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
    for ax, (name, points) in zip(axes, drawn.items(), strict=True):
        ax.scatter(*points.T, s=2, color=COLORS[0], alpha=0.5)
        _bare(ax, f"{name}: {100 * (points.sum(1) < 0).double().mean():.0f}% in the lower cloud", 2.2)
    return figure


def error_by_calls() -> Figure:
    """`compare.error_against_nfe` on the ring of eight Gaussians."""
    return draw_error_against_nfe(*error_against_nfe(ring()))


def draw_error_against_nfe(results: Sequence[Result], floor: float) -> Figure:
    """Two panels: rms distance to the ODE's exact ends, and the samples' distance to the data, over network calls."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    by_name = {name: [r for r in results if r.sampler == name] for name in dict.fromkeys(r.sampler for r in results)}
    for i, name in enumerate(DETERMINISTIC):
        runs = by_name.get(name, [])
        left.loglog([r.nfe for r in runs], [r.ode_error for r in runs], "o-", ms=3, lw=1.4, color=COLORS[i], label=name)
    _label(
        left,
        "Probability-flow ODE: error of its solvers",
        "network calls",
        "rms distance to the exact end",
        legend=True,
    )
    for i, name in enumerate(STOCHASTIC):
        runs = by_name.get(name, [])
        right.loglog([r.nfe for r in runs], [r.distance for r in runs], "o-", ms=3, lw=1.4, color=COLORS[i], label=name)
    best = by_name.get("dpmpp_2m", [])
    scale = ([r.nfe for r in best], [r.distance for r in best])
    right.loglog(*scale, "--", lw=1.2, color=MUTED, label="dpmpp_2m (for scale)")
    right.axhline(floor, color=INK, lw=0.8, ls=":")
    right.annotate("two exact sets", (8, floor), xytext=(0, -9), textcoords="offset points", fontsize=7, color=INK)
    _label(right, "Stochastic samplers: distance to the data", "network calls", "sliced Wasserstein", legend=True)
    return figure


def guidance() -> Figure:
    """Classifier-free guidance of the ring towards two of its eight classes, by weight."""
    target, count = ring(std=0.12), 1500
    labels = torch.arange(count) % 2
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    for ax, weight in zip(axes, (0.0, 1.0, 2.0, 4.0), strict=True):
        noise = SampleNoise(range(count))
        x = 80.0 * noise.normal((count, 2), torch.float64)
        points = sample(ClassifierFree(target, weight), x, karras(40), class_labels=labels)
        for k in range(2):
            ax.scatter(*points[labels == k].T, s=2, color=COLORS[k], alpha=0.5)
        ax.scatter(*target.means.T, s=14, color=INK, marker="+", lw=0.8)
        _bare(ax, f"weight {weight:g}", 1.3)
    return figure


def inverse() -> Figure:
    """Given the first coordinate, what the second can be: the exact conditional, and two approximations of it."""
    target, count, at = ring(std=0.08), 3000, 0.3
    slice_ = torch.linspace(-1.3, 1.3, 400, dtype=torch.float64)
    exact = target.log_density(torch.stack([torch.full_like(slice_, at), slice_], 1)).exp()
    exact = exact / torch.trapezoid(exact, slice_)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    _density(axes[0], target, 0.03)
    axes[0].axvline(at, color=COLORS[1], lw=1.4)
    _bare(axes[0], "data, and the coordinate that is known")
    picture, known = torch.tensor([at, 0.0], dtype=torch.float64), torch.tensor([True, False])
    for ax, method in zip(axes[1:], ("projection", "jacobian"), strict=True):
        noise = SampleNoise(range(count))
        x = 80.0 * noise.normal((count, 2), torch.float64)
        given = inpaint(target, picture, known, data_std=0.5, method=method)
        points = sample(given, x, karras(60), sampler="ddpm", generator=noise)
        ax.hist(
            points[:, 1].numpy(), bins=60, range=(-1.3, 1.3), density=True, color=COLORS[0], alpha=0.55, label="samples"
        )
        ax.plot(slice_, exact, color=INK, lw=1.2, label="exact")
        ax.set_ylim(0, 1.2 * exact.max())
        _label(ax, f"inpaint, method {method}", "the coordinate that is not known", "density", legend=True)
    return figure


def couplings() -> Figure:
    """Paths of flows whose pairs are independent, optimal, and of two data sets, under their exact velocities."""
    generator, count = torch.Generator().manual_seed(0), 1024
    data, other = ring(std=0.03).sample(count, generator), 1.1 * sample_target("spirals", count, 1).double()
    normal = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    optimal = normal[OptimalTransportCoupling(count).partners(data, normal)]
    shapes = {"independent pairs": normal, "optimal pairs": optimal, "from a data set": other}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    for ax, (name, source) in zip(axes, shapes.items(), strict=True):
        exact, few = flow_paths(data, source, 60), flow_paths(data, source, 2)[-1]
        for path in exact[:, :150].unbind(1):
            ax.plot(*path.T, lw=0.4, color=MUTED, alpha=0.7)
        ax.scatter(*source.T, s=1.5, color=COLORS[1], alpha=0.4)
        ax.scatter(*exact[-1].T, s=2, color=COLORS[0])
        error = (few - exact[-1]).square().sum(1).mean().sqrt()
        _bare(ax, f"{name}: 2 steps of Euler err by {error:.2f}", 2.4)
    return figure


def flow_paths(x0: Tensor, x1: Tensor, num_steps: int, width: float = 0.06) -> Tensor:
    """[num_steps + 1, n, 2]: x1 [n, 2] along Euler's steps on E[x1 - x0 | x_t] of the pairs (x0, x1), each a Gaussian
    of this width: the flow that a network of infinite capacity would learn of them."""
    path = [x1]
    for k in range(num_steps, 0, -1):
        t = k / num_steps
        near = (-torch.cdist(path[-1], (1 - t) * x0 + t * x1).square() / (2 * width**2)).softmax(1)
        path.append(path[-1] - near @ (x1 - x0) / num_steps)
    return torch.stack(path)


def likelihood() -> Figure:
    """Log-likelihood through the ODE, the exact one, and their difference."""
    target, points = ring(std=0.15), _mesh(48)
    found = log_likelihood(target, points, trace="exact", data_std=0.5)
    exact = target.log_density(points)
    shapes = [(found.nats, f"through the ODE, {found.nfe} calls"), (exact, "exact"), ((found.nats - exact).abs(), "")]
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.5), layout="constrained")
    for ax, (values, title) in zip(axes, shapes, strict=True):
        drawn = values.clamp_min(-15) if title else values.clamp_min(1e-6).log10()
        image = ax.pcolormesh(*_grid(48), drawn.view(48, 48), cmap="viridis", shading="nearest", rasterized=True)
        figure.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=7)
        _bare(ax, title + ", nats" if title else f"log10 of the difference; median {values.median():.0e} nats")
    return figure


def _grid(n: int, half: float = 1.3) -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-half, half, n, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    return x, y


def _mesh(n: int) -> Tensor:
    return torch.stack([part.flatten() for part in _grid(n)], dim=1)


def _density(ax: Axes, target: Mixture, sigma: float) -> None:
    values = target.log_density(_mesh(100), sigma).exp().view(100, 100).sqrt()
    ax.pcolormesh(*_grid(100), values, cmap="Blues", shading="nearest", vmax=1.1 * float(values.max()), rasterized=True)


def _bare(ax: Axes, title: str, half: float = 1.3) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_aspect("equal")
    ax.set_xlim(-half, half)
    ax.set_ylim(-half, half)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(MUTED)
        spine.set_linewidth(0.5)


def _label(ax: Axes, title: str, x: str, y: str, legend: bool = False) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=8, color=INK)
    ax.set_ylabel(y, fontsize=8, color=INK)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.2, which="both", lw=0.4)
    if legend:
        ax.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
