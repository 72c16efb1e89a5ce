"""Drawing samples from one model: which ones a request means, batch by batch, and pictures of them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.own_code import is_own
from scoreray.data.packing.inspect import picture_grid
from scoreray.sampling.grids.optimise import OPTIMISED
from scoreray.sampling.guidance.guidance import Denoise, check_negative, guidance_terms
from scoreray.sampling.guidance.steering import Guidance, Measurement, steered, untrained_estimate
from scoreray.sampling.model.describe import PROCESS_GRID, ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser, LoadedMachine, LoadedModel
from scoreray.sampling.model.prompts import prompted
from scoreray.sampling.offline.conditions import far_from_data, read_condition
from scoreray.sampling.offline.ensembles import ConditionsFrom, EnsembleRecords
from scoreray.sampling.offline.few_step import (
    CONSISTENCY,
    TARGET,
    draws_by_map,
    few_step_defaults,
    few_step_mistake,
)
from scoreray.sampling.offline.starts import SourceStarts
from scoreray.sampling.samplers.budget import LARGEST_BUDGET, best_within, most_steps
from scoreray.sampling.samplers.gibbs import GIBBS, NUM_SWEEPS, gibbs
from scoreray.sampling.samplers.noise import Acceptance, SampleNoise
from scoreray.sampling.samplers.options import check_options, options_of
from scoreray.sampling.samplers.parallel import FEW, Parallel, check_parallel
from scoreray.sampling.samplers.sample import (
    ADAPTIVE,
    ODE_SAMPLERS,
    SAMPLERS,
    SamplerState,
    adds_noise,
    num_calls,
    sample,
    sampler_of,
)
from scoreray.sampling.samplers.sigmas import GRIDS, Grid, grid_text, parse_grid
from scoreray.trainer.diffusion.condition import LABEL, AnyCondition, Condition, class_name_of
from scoreray.trainer.diffusion.process import process_section
from scoreray.trainer.networks.ladder import levels_needed
from scoreray.trainer.objectives.energy_based import ContrastiveObjective

MAX_SHEET = 256
LOSSY_QUALITY = 95  # of jpeg and webp, of 100
MOST_STEPS = 10_000_000  # sweeps of Gibbs; as noise levels they are 80 MB
WARM_START = "warm_start"  # the option of samplers that stay at one noise level
SIGMA_DATA = "sigma_data"  # the option of samplers whose steps fit the scale of the data
PROCESS = "process"  # the option of samplers that solve a process's own SDE
ANNEAL = "anneal"  # the option that takes them down all levels instead


class RequestError(UserError):
    """A request that makes no sense, or not for its model; `field` is which of its fields to change."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Request:
    """Which samples: `count` of them, numbered, each with a seed of its own, so sample i is the same in any batch.

    sampler, steps, grid: None takes what fits the model (`fitted`). steps: noise levels, or sweeps of Gibbs. grid: a
    name, or levels in any form that `parse_grid` takes, of which there are then `steps`. grid_checkpoint: which one
    levels were optimised on; `fitted` sets it.
    class_label: None draws classes in turn (0, 1, 2, ...) from a model that has classes, where there are no conditions.
    conditions: by name, as words of a command line (`conditions.py`), the same for all samples; what is left out is
    null. conditions_from: records of a data set that condition samples, whatever `conditions` leaves out. prompt: a
    text for those conditions that take one, or a class (`model.prompts`).
    max_calls: network calls that a sample may take; sampler, steps and grid that are left out are the best that fit.
    size: WIDTHxHEIGHT, of a model of data in buckets; None draws what most of its samples were.
    parallel: several steps in each call of the network (`samplers.parallel`), for FEW samples together whatever
    `batch_size` says: these decide together which steps are taken, so that a sample would depend on it.
    source: a data set whose record i sample i begins at, of a flow from a data set; None takes the run's (`starts.py`).
    guidance: classifier-free, 1 for none; or a `Guidance`. measurement: what each sample must agree with.
    """

    count: int
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    class_label: str | int | None = None
    guidance: float | Guidance = 1.0
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    measurement: Measurement | None = None
    conditions: dict[str, str] = field(default_factory=dict)
    conditions_from: ConditionsFrom | None = None
    prompt: str | None = None
    size: str | None = None
    source: str | None = None
    max_calls: int | None = None
    grid_checkpoint: str | None = None
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or (self.steps is not None and self.steps < 1) or self.batch_size < 1:
            raise UserError("count, steps and batch size must be at least 1")
        if self.count >= 2**32 or not 0 <= self.seed < 2**31:
            raise UserError("count must be below 2^32 and seed in [0, 2^31): together they number the samples")
        for name, value, most in (("steps", self.steps or 1, MOST_STEPS), ("batch_size", self.batch_size, 2**32)):
            if value > most:
                raise RequestError(f"{name} = {shortened(str(value))}: must be at most {most:,}", name)
        if self.max_calls is not None and not 1 <= self.max_calls <= LARGEST_BUDGET:
            message = f"max_calls = {shortened(str(self.max_calls))}: must be 1 to {LARGEST_BUDGET:,} network calls"
            raise RequestError(f"{message} a sample", "max_calls")
        if self.parallel:
            object.__setattr__(self, "batch_size", FEW)
        if self.conditions_from is not None:
            self.conditions_from.check_count(self.count)
        if not isinstance(self.guidance, Guidance):
            Guidance(self.guidance)  # raises on a weight that makes noise of samples
        samplers = (*SAMPLERS, GIBBS)
        if self.sampler is not None and self.sampler not in samplers and not is_own(self.sampler):
            raise RequestError(
                f"unknown sampler '{shortened(self.sampler)}': {nearest(self.sampler, samplers)}", "sampler"
            )
        if self.grid is not None:
            self._parse_grid(self.grid)
        if self.sampler not in (None, GIBBS):
            field = "sampler"
            try:
                sampler, field = sampler_of(self.sampler), "options"
                check_options(self.sampler, sampler, self.options)
            except UserError as error:
                raise RequestError(str(error), field) from None

    def _parse_grid(self, given: Grid) -> None:
        """Sets `grid`, and of levels their number as `steps`. Raises RequestError."""
        try:
            grid, names = parse_grid(given), (*GRIDS, PROCESS_GRID, OPTIMISED)
        except UserError as error:
            raise RequestError(str(error), "grid") from None
        object.__setattr__(self, "grid", grid)
        if isinstance(grid, str):
            if grid not in names:
                known = f"{nearest(grid, names)}, or noise levels as 80,0.8"
                raise RequestError(f"unknown noise grid '{shortened(grid)}': {known}", "grid")
            return
        if self.steps not in (None, len(grid)):
            shown = f"grid {shortened(grid_text(grid))} has {len(grid)} noise levels"
            raise RequestError(f"steps = {self.steps}: {shown}; leave steps out", "steps")
        object.__setattr__(self, "steps", len(grid))

    @property
    def guided(self) -> Guidance:
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(self.guidance)

    def fitted(self, info: ModelInfo) -> Request:
        """The request with all that was left out filled in for a model. Raises RequestError where it does not fit it.

        An RBM is drawn by Gibbs; an energy that contrastive divergence trained by annealed Langevin on NCSNv2's ladder,
        geometric, of as many levels as the run was trained on, or else as its technique 2 takes; a model of few steps
        by its own sampler (`few_step.py`); anything else by Heun on 18 levels of Karras' grid.
        A sampler whose steps fit the data's scale gets the run's sigma_data.
        Samplers that stay at one noise level get a warm start: the walk down to it is theirs too, as a request begins
        from noise at the largest level. With `anneal` they work on the ladder of the annealed ones. Samplers that take
        a process get the run's own. An optimised grid becomes its levels.
        """
        if info.is_autoencoder:
            raise UserError(f"{info.url}: {info.instead_of_denoiser}")
        try:
            info = info.at_size(self.size)
        except UserError as error:
            raise RequestError(f"--{error}", "size") from None
        if info.is_machine:
            return self._for_machine(info)
        if self.grid == OPTIMISED:
            return self._on_optimised(info).fitted(info)
        if self.max_calls is not None:
            return self._within_budget(info)
        request = self.with_prompt(info)
        if self.sampler == GIBBS:
            kind = info.config.network.kind
            raise RequestError(
                f"sampler '{GIBBS}' is for RBMs, and network.kind is '{kind}'; leave --sampler out", "sampler"
            )
        contrastive = isinstance(info.config.objective, ContrastiveObjective)
        own, own_steps, own_grid = few_step_defaults(info)
        sampler = self.sampler or ("ncsnv2" if contrastive else own)
        self._check_parallel(sampler)
        mistake = few_step_mistake(
            info, sampler, self.steps, self.grid, self.options, self.guided, self.measurement is not None
        )
        if mistake is not None:
            raise RequestError(*mistake)
        if adds_noise(sampler, self.options) and getattr(info.config.objective, "only_flow", False):
            what = "a coupling" if info.source is None else "a flow from a data set"
            raise RequestError(
                f"sampler '{sampler}' needs the score, which {what} does not give, only the velocity; choose one of "
                f"{', '.join(sorted(ODE_SAMPLERS))} (ddim without eta)",
                "sampler",
            )
        annealed = replace(self, sampler=sampler).is_annealed
        levels, grid = (own_steps, own_grid) if draws_by_map(info, sampler) else (18, "karras")
        if annealed and self.steps is None:
            low, high = info.sigma_range
            levels = info.rungs or levels_needed(high, low, math.prod(info.image_shape))
        options, known = self.options, options_of(sampler_of(sampler))
        if SIGMA_DATA in known and info.config.denoiser.sigma_data != "auto":
            options = {SIGMA_DATA: info.config.denoiser.sigma_data, **options}
        if PROCESS in known and known[PROCESS].is_process:
            options = {PROCESS: process_section(info.config.process), **options}
        if sampler == CONSISTENCY and info.map == "flow_map":
            options = {TARGET: True, **options}
        if WARM_START in known and not annealed:
            options = {WARM_START: True, **options}
            if self.steps == 1 and options[WARM_START]:
                raise RequestError(f"sampler '{sampler}' walks down to its noise level: give 2 steps or more", "steps")
        return replace(
            request,
            sampler=sampler,
            steps=self.steps or levels,
            grid=self.grid or ("geometric" if annealed else grid),
            options=options,
        )

    def _check_parallel(self, sampler: str) -> None:
        """Raises RequestError where the request can't be drawn in parallel in time as it says."""
        if not self.parallel:
            return
        if self.measurement is not None:
            raise RequestError("--parallel: not with --inpaint and --inverse; leave one of them out")
        try:
            check_parallel(sampler)
        except UserError as error:
            raise RequestError(str(error), "sampler") from None

    def _within_budget(self, info: ModelInfo) -> Request:
        """The request at no more than its `max_calls`, as docs/sampling.md describes. Raises RequestError where what it
        names takes more."""
        assert self.max_calls is not None
        contrastive = isinstance(info.config.objective, ContrastiveObjective)
        ours = self.sampler is None and self.grid != OPTIMISED and not contrastive
        best = best_within(self.max_calls, info.map)
        free = replace(self, max_calls=None)
        if ours:
            free = replace(free, sampler=best.sampler, grid=self.grid or best.grid)
        default = free.fitted(info)
        if default.sampler in ADAPTIVE:
            what = f"sampler '{default.sampler}' chooses its steps as it goes, so its calls are not known before"
            raise RequestError(f"max_calls = {self.max_calls}: {what}; leave one of them out", "sampler")
        levels = default.grid if isinstance(default.grid, tuple) else None
        fixed = levels is not None or self.steps is not None or default.is_annealed or info.map == "progressive"
        if fixed and default.calls(info, most=self.max_calls) <= self.max_calls:
            return self._on_stored(default, info)
        most = best.most_calls if ours else self.max_calls

        def calls_of(steps: int) -> int:
            given = {"steps": steps} if levels is None else {"steps": None, "grid": levels[:steps]}
            return replace(default, **given).calls(info, most=most)

        fitting = most_steps(most, calls_of)
        if fitting and not fixed:
            return self._on_stored(replace(free, steps=fitting).fitted(info), info)
        calls = default.calls(info, most=LARGEST_BUDGET)
        taken = f"{calls:,}" if calls <= LARGEST_BUDGET else f"more than {LARGEST_BUDGET:,}"
        what = f"sampler '{default.sampler}' with {default.steps} steps takes {taken} calls a sample"
        unit = "steps" if levels is None else "noise levels"
        advice = f"give at most {fitting} {unit}" if fitting else "choose another sampler, or fewer of its inner steps"
        if self.sampler is None and self.steps is not None and fitting:
            advice += ", or leave steps out"
        if info.map == "progressive":
            advice = f"the model was distilled to these, so give max_calls = {taken}"
        raise RequestError(f"max_calls = {self.max_calls}: {what}; {advice}", "max_calls")

    def _on_stored(self, fitted: Request, info: ModelInfo) -> Request:
        """`fitted` on the grid that was optimised for its sampler and steps, where there is one and none was named."""
        stored = {(one.sampler, one.steps) for one in info.stored_grids}
        if self.grid is None and (fitted.sampler, fitted.steps) in stored:
            return replace(fitted, grid=OPTIMISED).fitted(info)
        return fitted

    @property
    def is_annealed(self) -> bool:
        """Whether the sampler goes down a ladder of noise levels, whose number its theory says."""
        return self.sampler in ("ncsn", "ncsnv2") or self.options.get(ANNEAL) is True

    def calls(self, info: ModelInfo, most: int | None = None) -> int:
        """Network calls for one sample, of a fitted request; `most` as of `num_calls`. Guidance adds rows to them."""
        assert self.sampler is not None
        assert self.steps is not None
        assert self.grid is not None
        return num_calls(self.sampler, info.sigmas(self.steps, self.grid), most=most, **self.options)

    def _on_optimised(self, info: ModelInfo) -> Request:
        """On the levels that are stored beside the model. Raises RequestError, DataError."""
        try:
            found = info.optimised_grid(self.sampler, self.steps)
        except UserError as error:
            raise RequestError(str(error), "grid") from None
        levels = tuple(found.levels)
        return replace(self, sampler=found.sampler, steps=len(levels), grid=levels, grid_checkpoint=found.checkpoint)

    def with_prompt(self, info: ModelInfo) -> Request:
        """The request with its prompt as the conditions that it means for a model. Raises UserError."""
        if self.prompt is None:
            return self
        words = prompted(self.prompt, info, "--prompt")
        if twice := [name for name in words if name in self.conditions]:
            raise UserError(f"--prompt and --condition {twice[0]}: leave one of them out")
        return replace(self, prompt=None, conditions={**self.conditions, **words})

    def _for_machine(self, info: ModelInfo) -> Request:
        kind = info.config.network.kind
        refused = {
            f"--sampler {self.sampler}": self.sampler not in (None, GIBBS),
            f"--grid {grid_text(self.grid or '')}": self.grid is not None,
            f"--class-label {self.class_label}": self.class_label is not None,
            "--guidance": self.guided != Guidance(),
            "--condition": bool(self.conditions),
            "--prompt": self.prompt is not None,
            "--conditions-from": self.conditions_from is not None,
            "--inpaint and --inverse": self.measurement is not None,
            "--option": bool(self.options),
            "--parallel": self.parallel,
            f"--max-calls {self.max_calls}": self.max_calls is not None,
        }
        wrong = [what for what, given in refused.items() if given]
        if wrong:
            verb = "are" if len(wrong) > 1 else "is"
            raise UserError(
                f"{', '.join(wrong)}: {verb} not for network.kind '{kind}', which is drawn by {GIBBS} alone"
            )
        return replace(self, sampler=GIBBS, steps=self.steps or NUM_SWEEPS)

    def sample_seeds(self, first: int, last: int) -> torch.Tensor:
        """Seeds int64 of samples [first, last); no two samples of any two requests with different seeds share one."""
        source = self.conditions_from
        numbers = torch.arange(first, last, dtype=torch.int64) if source is None else source.numbers(first, last)
        return numbers + (self.seed << 32)

    def labels(self, first: int, last: int, info: ModelInfo) -> torch.Tensor:
        """Classes int64 of samples [first, last), -1 for none. Raises UserError for a class that is not there."""
        in_turn = self.class_label is None and not self.conditions and self.conditions_from is None
        if in_turn and info.classes and not info.is_machine:
            return torch.arange(first, last) % len(info.classes)
        return torch.full((last - first,), info.class_number(self.class_label), dtype=torch.int64)


def generate(
    model: LoadedModel, request: Request, done: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (samples float32 [b, ...] in the model's range, labels int64 [b]) batch by batch; `done(b)` after each."""
    draw, conditions = prepare(model, request), SampleConditions(request, model.info)
    for first in range(0, request.count, request.batch_size):
        last = min(first + request.batch_size, request.count)
        condition = conditions.of(first, last)
        yield draw(request.sample_seeds(first, last), condition), class_labels(condition, last - first)
        done(last - first)


class SampleConditions:
    """What conditions each sample of a request. Raises UserError where it does not fit the model, DataError and
    StorageError where a file can't be read."""

    def __init__(self, request: Request, info: ModelInfo):
        request = request.with_prompt(info)
        self._request, self._info = request, info
        self.fixed = read_condition(request.conditions, info)
        self._class_name = class_name_of(info.conditions)
        if self._class_name in request.conditions and request.class_label is not None:
            raise UserError(f"--class-label and --condition {self._class_name}: leave one of them out")
        several = [name for name, spec in info.conditions.items() if spec.kind == "class"]
        if request.class_label is not None and len(several) > 1:
            raise UserError(
                f"--class-label: this model's classes are {', '.join(several)}; give --condition NAME=CLASS"
            )
        request.labels(0, 1, info)
        given = {*request.conditions, *([] if request.class_label is None else [self._class_name or LABEL])}
        source = request.conditions_from
        self.records = None if source is None else EnsembleRecords(source, info, given)
        far = None if self.fixed is None else far_from_data(self.fixed, info.conditions)
        self.warnings = [far] if far else []  # of what the run was not trained for
        guided = request.guided
        if not guided.does_nothing and not guided.auto and info.conditions:
            row = self.of(0, 1)
            if row is None:
                raise UserError("--guidance: no condition is given; give --condition NAME=VALUE")
            if guided.negative is not None:
                negative = prompted(guided.negative, info, "--negative-prompt")
                check_negative(negative, guidance_terms(guided.weight, row.values, guided.weights))
            untrained = untrained_estimate(info, row.values, guided)
            self.warnings += [untrained] if untrained else []

    def of(self, first: int, last: int) -> Condition | None:
        """Of samples [first, last), on the CPU; None of a model without conditions."""
        fixed = None if self.fixed is None else self.fixed.expand(last - first)
        stored = None if self.records is None else self.records.condition(first, last)
        labels = None
        in_records = self.records is not None and self._request.class_label is None
        if self._class_name is not None and self._class_name not in self._request.conditions and not in_records:
            labels = Condition({self._class_name: self._request.labels(first, last, self._info)})
        found = [part for part in (stored, fixed, labels) if part is not None]  # of one name the last holds
        values = {name: value for part in found for name, value in part.values.items()}
        masks = {name: mask for part in found for name, mask in part.masks.items()}
        return Condition(values, masks) if found else None


def class_labels(condition: Condition | None, rows: int) -> torch.Tensor:
    """int64 [rows] of the one class condition, -1 where there is none."""
    classes = [] if condition is None else [value for value in condition.values.values() if value.dtype == torch.int64]
    return classes[0] if len(classes) == 1 else torch.full((rows,), -1)


Draw = Callable[..., torch.Tensor]
"""`(seeds int64 [b], condition of b rows or None) -> samples float32 [b, ...] in the model's range`; each depends on
its own seed and condition alone. A denoiser's takes standard normal numbers [b, ...] to begin from as a third argument,
where they are not those of the seeds. `acceptance=` counts what Metropolis samplers accept, `callback=` is called after
each call of the network (`SamplerState`)."""


def prepare(model: LoadedModel, request: Request) -> Draw:
    """What draws batches of a request. What it names is read and checked here, once, but for its conditions
    (`SampleConditions`). Raises UserError where it does not fit the model."""
    request = request.fitted(model.info)
    if isinstance(model, LoadedMachine):
        return partial(_draw_by_gibbs, model, request)
    assert isinstance(model, LoadedDenoiser)  # `fitted` refuses what draws nothing
    starts = SourceStarts.of(model.info, request.source)
    return partial(_draw, steered(model, request.guided, request.measurement), model, request, starts)


def _draw(
    denoise: Denoise,
    model: LoadedDenoiser,
    request: Request,
    starts: SourceStarts | None,
    seeds: torch.Tensor,
    condition: AnyCondition,
    noise: torch.Tensor | None = None,
    acceptance: Acceptance | None = None,
    callback: Callable[[SamplerState], None] | None = None,
) -> torch.Tensor:
    assert request.sampler is not None
    assert request.steps is not None
    assert request.grid is not None
    device = next(model.parameters()).device
    sigmas = model.info.sigmas(request.steps, request.grid)
    seeds = seeds.to(device)
    if noise is None:
        noise = SampleNoise(seeds).normal((len(seeds), *model.info.image_shape), torch.float32, device)
    return sample(
        denoise,
        begin_at(float(sigmas[0]), noise.to(device, torch.float32), seeds, starts),
        sigmas,
        sampler=request.sampler,
        generator=SampleNoise(seeds, draw=1, acceptance=acceptance),  # draw 0 is the initial noise
        condition=None if condition is None else condition.to(device),
        callback=callback,
        parallel=Parallel() if request.parallel else None,
        **request.options,
    ).cpu()


def begin_at(level: float, noise: torch.Tensor, seeds: torch.Tensor, starts: SourceStarts | None) -> torch.Tensor:
    """States [b, ...] at a noise level, of standard normal numbers [b, ...]: these alone, or samples of a data set."""
    return noise * level if starts is None else starts.at(seeds, noise, level)


def _draw_by_gibbs(
    model: LoadedMachine,
    request: Request,
    seeds: torch.Tensor,
    condition: AnyCondition,
    acceptance: Acceptance | None = None,
    callback: Callable[[SamplerState], None] | None = None,
) -> torch.Tensor:
    assert request.steps is not None
    v = gibbs(model.machine, seeds, request.steps)
    return model.machine.picture(v).view(-1, *model.info.image_shape).float().cpu()


def picture_file(image: torch.Tensor, format_: str = "png") -> bytes:
    """A uint8 picture [C, H, W] as png, jpeg or webp."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    lossy = {} if format_ == "png" else {"quality": LOSSY_QUALITY}
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format_, **lossy)
    return buffer.getvalue()


def png_of_sheet(images: torch.Tensor | np.ndarray, columns: int | None = None) -> bytes:
    """A sheet of pictures [N, C, H, W] as PNG; arguments as for `picture_grid`."""
    buffer = io.BytesIO()
    picture_grid(images, columns).save(buffer, "PNG")
    return buffer.getvalue()
