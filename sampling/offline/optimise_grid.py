"""A grid optimised for a model that is loaded: which noise it is fitted to, and what a request may ask of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from scoreray.data.errors import UserError
from scoreray.data.extras import check_installed
from scoreray.sampling.grids.optimise import GridSearch, optimise
from scoreray.sampling.grids.reference import NoiseBatch
from scoreray.sampling.grids.stored import StoredGrid
from scoreray.sampling.guidance.steering import steered
from scoreray.sampling.model.describe import PROCESS_GRID, ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.sampling.offline.generate import Request, SampleConditions, begin_at
from scoreray.sampling.offline.starts import SourceStarts
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import ADAPTIVE, ODE_SAMPLERS, adds_noise
from scoreray.sampling.samplers.sigmas import GRIDS

FEWEST_SAMPLES = 4


def check_grid_request(request: Request, info: ModelInfo) -> Request:
    """The request with all that was left out filled in for a model. Raises UserError where no grid can be optimised
    for it, before any weights are read."""
    check_installed("evaluate", "an optimised grid", "scipy")
    if info.instead_of_denoiser:
        raise UserError(f"{info.url}: {info.instead_of_denoiser}")
    if info.instead_of_mean:
        raise UserError(f"{info.url}: {info.instead_of_mean}, so no exact trajectory is known that a grid could follow")
    request = request.fitted(info)
    assert request.sampler is not None
    assert request.steps is not None
    if request.sampler in ADAPTIVE:
        raise UserError(f"--sampler {request.sampler}: chooses its steps as it goes, so it has no grid to optimise")
    if adds_noise(request.sampler, request.options):
        raise UserError(
            f"--sampler {request.sampler}: adds noise, so its samples end nowhere near an exact trajectory; choose one "
            f"of {', '.join(sorted(ODE_SAMPLERS - ADAPTIVE))} (ddim without eta), or search its levels by samples: "
            "configs/tune/grid.yaml"
        )
    if request.steps < 2:
        raise UserError(f"--steps {request.steps}: one step has no level to choose; give 2 or more")
    if request.count < FEWEST_SAMPLES:
        raise UserError(f"--samples {request.count}: at least {FEWEST_SAMPLES}, half of which are held out")
    return request


def optimise_grid(
    model: LoadedDenoiser, sha256: str, request: Request, budget: int, progress: Callable[[int, int], None]
) -> StoredGrid:
    """The best grid for the sampler and steps of a request that `check_grid_request` gave, on its samples: the first
    half is fitted to, the second decides. sha256: of the model. progress: gets rows of the network's calls, of all."""
    info = model.info
    assert request.sampler is not None
    assert request.steps is not None
    middle, done = request.count // 2, 0
    cuts = [
        [(first, min(first + request.batch_size, end)) for first in range(begin, end, request.batch_size)]
        for begin, end in ((0, middle), (middle, request.count))
    ]
    search = GridSearch(
        request.sampler, request.steps, info.sigma_range, named_grids(info, request.steps), request.options, budget
    )
    total = search.num_rows(*([last - first for first, last in part] for part in cuts))

    def called(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, total)

    device = next(model.parameters()).device
    denoiser, starts = steered(model, request.guided, request.measurement), SourceStarts.of(info, request.source)
    conditions = SampleConditions(request, info)

    def batch(first: int, last: int) -> NoiseBatch:
        seeds = request.sample_seeds(first, last).to(device)
        noise = SampleNoise(seeds).normal((len(seeds), *info.image_shape), torch.float32, device)
        condition = conditions.of(first, last)
        return NoiseBatch(
            denoiser,
            partial(begin_at, noise=noise, seeds=seeds, starts=starts),
            seeds,
            None if condition is None else condition.to(device),
            called,
        )

    found = optimise(search, *([batch(*one) for one in part] for part in cuts))
    progress(total, total)
    return StoredGrid(
        request.sampler, request.steps, found.levels[:-1].tolist(), found.name, found.errors, info.url,
        info.images_seen, info.ema, sha256, request.seed, request.count, dict(request.options),
        {name: value for name, value in asdict(request.guided).items() if value is not None},
        request.class_label, dict(request.conditions),
    )  # fmt: skip


def named_grids(info: ModelInfo, steps: int) -> dict[str, torch.Tensor]:
    """Those of so many steps, by name; without the process's where it has none."""
    found = {name: info.sigmas(steps, name) for name in GRIDS}
    with contextlib.suppress(UserError):
        found[PROCESS_GRID] = info.sigmas(steps, PROCESS_GRID)
    return found
