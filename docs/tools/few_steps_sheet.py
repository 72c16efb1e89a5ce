"""Pictures of models side by side: a row for each model and way to draw it. `benchmarks/few_steps.py` draws it."""

from __future__ import annotations

from pictures import Figure, plt
from torch import Tensor


def sheet(rows: list[tuple[str, Tensor]]) -> Figure:
    """rows: a title and samples [N, C, H, W] in [-1, 1], the i-th of each row from the same seed and class."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.6 * len(rows)), layout="constrained", squeeze=False)
    for (title, samples), ax in zip(rows, axes[:, 0], strict=True):
        strip = samples.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2)  # [H, N W, C]
        ax.imshow(strip[..., 0] if strip.shape[-1] == 1 else (strip + 1) / 2, cmap="gray", vmin=-1, vmax=1)
        ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure
