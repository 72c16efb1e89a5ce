"""The gallery's pictures, each a function of nothing but what it shows; see docs/gallery."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scoreray.sampling.compare import Result

INK, MUTED = "#1f2430", "#8a909c"
COLORS = ("#2563a8", "#d1495b", "#2e8b57", "#e08e1b", "#7b4fa3", "#0f8b8d", "#a05a2c", "#5c6770")
DETERMINISTIC = ("euler", "heun", "dpm2", "dpmpp_2m", "unipc", "rk45")
STOCHASTIC = (
    "ddpm", "reverse_sde", "predictor_corrector", "edm_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "ncsn", "ncsnv2",
)  # fmt: skip


def draw_error_against_nfe(results: Sequence[Result], floor: float) -> Figure:
    """Two panels: rms distance to the ODE's exact ends, and the samples' distance to the data, over network calls."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    by_name = {name: [r for r in results if r.sampler == name] for name in dict.fromkeys(r.sampler for r in results)}
    for i, name in enumerate(DETERMINISTIC):
        runs = by_name.get(name, [])
        left.loglog([r.nfe for r in runs], [r.ode_error for r in runs], "o-", ms=3, lw=1.4, color=COLORS[i], label=name)
    _label(left, "Probability-flow ODE: error of its solvers", "network calls (nfe)", "rms distance to the exact end")
    for i, name in enumerate(STOCHASTIC):
        runs = by_name.get(name, [])
        right.loglog([r.nfe for r in runs], [r.distance for r in runs], "o-", ms=3, lw=1.4, color=COLORS[i], label=name)
    best = by_name.get("dpmpp_2m", [])
    right.loglog(
        [r.nfe for r in best], [r.distance for r in best], "--", lw=1.2, color=MUTED, label="dpmpp_2m (for scale)"
    )
    right.axhline(floor, color=INK, lw=0.8, ls=":")
    right.annotate(
        "two exact sample sets", (8, floor), xytext=(0, -9), textcoords="offset points", fontsize=7, color=INK
    )
    _label(right, "Stochastic samplers: distance to the data", "network calls (nfe)", "sliced Wasserstein distance")
    return figure


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2, which="both", lw=0.4)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
