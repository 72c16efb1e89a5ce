"""`scoreray grid`: a noise grid optimised for a model, stored beside it, with a picture of its levels and errors."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from scoreray.cluster.display import counted, say
from scoreray.data.pages import DPI
from scoreray.sampling.grids.optimise import OPTIMISED
from scoreray.sampling.grids.stored import StoredGrid
from scoreray.sampling.model.describe import ModelInfo, describe
from scoreray.sampling.model.load import LoadedDenoiser, load_described
from scoreray.sampling.offline.generate import Request, SampleConditions
from scoreray.sampling.offline.optimise_grid import check_grid_request, named_grids, optimise_grid
from scoreray.trainer.engine.cpu import keep_large_tensors_on_the_heap


@dataclass(frozen=True)
class GridResult:
    """url: the one that was given; out, picture: URLs of what was written."""

    grid: StoredGrid
    url: str
    out: str
    picture: str

    def answer(self) -> dict[str, Any]:
        return {**asdict(self.grid), "out": self.out, "picture": self.picture}

    def text(self) -> str:
        grid = self.grid
        levels = ", ".join(f"{level:.4g}" for level in (*grid.levels, 0))
        errors = sorted(grid.errors.items(), key=lambda item: item[1])
        kept = "" if grid.grid == OPTIMISED else f"\nno better grid was found than {grid.grid}, which is stored"
        return (
            f"{grid.sampler}, {grid.steps} steps, of {grid.checkpoint} (EMA {grid.ema}): {levels}\n"
            f"error at the end, on {grid.samples - grid.samples // 2} samples that were held out: "
            f"{', '.join(f'{name} {error:.4g}' for name, error in errors)}{kept}\n{self.out}, {self.picture}\n"
            f"next: scoreray sample {self.url} --sampler {grid.sampler} --steps {grid.steps} --grid optimised "
            "--out samples"
        )


def optimise_to(url: str, ema: str | None, request: Request, budget: int) -> GridResult:
    """Optimises the grid of a request's sampler and steps on `request.count` samples, and stores it beside the model.

    Raises UserError, DataError, StorageError; a user's mistakes are found before weights are read.
    """
    found = describe(url, ema)
    request = check_grid_request(request, found.info)
    for line in SampleConditions(request, found.info).warnings:
        say(line)
    store = found.stored.source.store
    store.check_writable()
    keep_large_tensors_on_the_heap()
    model = load_described(found)
    assert isinstance(model, LoadedDenoiser)  # the others are refused
    with counted("grid", "rows of the network", "the first samples, by a fine grid") as progress:
        grid = optimise_grid(model, found.sha256, request, budget, progress)
    store.put(grid.key, grid.to_json())
    picture = grid.key.removesuffix(".json") + ".png"
    store.put(picture, grid_picture(grid, found.info))
    return GridResult(grid, url, store.url(grid.key), store.url(picture))


def grid_picture(grid: StoredGrid, info: ModelInfo) -> bytes:
    """PNG: the levels beside those of the named grids, and the error of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = {name: one[:-1].tolist() for name, one in named_grids(info, grid.steps).items()} | {grid.grid: grid.levels}
    names = [name for name in sorted(grid.errors, key=lambda name: -grid.errors[name]) if name in rows]
    colours = ["C0" if name == OPTIMISED else "0.6" for name in names]
    for height, (name, colour) in enumerate(zip(names, colours, strict=True)):
        left.plot(rows[name], [height] * len(rows[name]), "o-", color=colour, lw=0.8, ms=5)
    left.set(xscale="log", xlabel="noise level σ", yticks=range(len(names)), yticklabels=names)
    left.invert_xaxis()
    right.barh(names, [grid.errors[name] for name in names], color=colours)
    right.set(xlabel="error at the end, held-out samples", title=f"{grid.sampler}, {grid.steps} steps", yticklabels=[])
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
