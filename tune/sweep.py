"""A sweep: what is searched, by which metric, how, and on how much; and what follows from it for a trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.own_code import is_own, or_own
from scoreray.data.units import Count
from scoreray.trainer.config import Config, Section, check_run_name, load_config
from scoreray.tune.space import LEVEL, OPTION, SAMPLE, Dimension, DimensionSection, Space, Values, flat, with_values

METRICS = ("denoising", "bpd", "nats", "fid", "kid", "sw", "nfe")
MAXIMISED = ("nats",)
POPULATIONS = ("pbt", "pb2")  # schedulers under which trials exchange weights, and change values while they train
OF_SAMPLES = ("fid", "kid", "sw")
OF_HELD_OUT = ("denoising", "bpd", "nats")  # measured on images that training must not have seen


def _metric_name(name: str) -> str:
    if name not in METRICS and not is_own(name):
        raise ValueError(f"unknown metric '{shortened(name)}'; {nearest(name, METRICS)}{or_own(name)}")
    return name


def of_samples(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are measured of samples, as an evaluation measures them."""
    return tuple(name for name in names if name in OF_SAMPLES or is_own(name))


class StudySection(Section):
    """Where the study lives: everything it writes goes under `<storage>/<name>`. `seed`: of the search."""

    name: Annotated[str, AfterValidator(check_run_name)]
    storage: str
    seed: int = Field(0, ge=0, lt=2**31)


class MetricSection(Section):
    """What trials are compared by, the same whatever they search. Several names: no single best, a Pareto front.

    `names`: denoising (error of the denoised image at fixed noise levels, EDM-weighted by the data's own spread), bpd,
    nats, fid, kid, sw (sliced Wasserstein), nfe (calls of the network for a sample), or package.module:Name, a metric
    as `evaluate --metrics` takes it, whose first number is minimised.
    `reference`: a packed data set that is not trained on. `count`: of its images, evenly over it; their noise is fixed.
    `likelihood_count`: of its images, for bpd and nats; `rtol`: of their solver, cheaper than an evaluation's 1e-5.
    `sigma_min`, `sigma_max`, `levels`: the fixed noise levels, even in ln sigma; the likelihood goes from end to end.
    `samples`, `sampler`, `steps`, `grid`, `batch_size`: the sampler's fixed budget, for what is measured of samples.
    """

    names: tuple[Annotated[str, AfterValidator(_metric_name)], ...] = ("denoising",)
    reference: str
    count: int = Field(1024, ge=16)
    sigma_min: float = Field(0.01, gt=0)
    sigma_max: float = Field(50.0, gt=0)
    levels: int = Field(16, ge=2, le=256)
    likelihood_count: int = Field(128, ge=2)
    rtol: float = Field(1e-4, ge=1e-14, lt=1)
    samples: int = Field(2000, ge=32)
    sampler: str | None = None
    steps: int | None = Field(None, ge=1)
    grid: str | tuple[float, ...] | None = None
    batch_size: int = Field(256, ge=1)
    ema: str | None = None
    extractor: str = "auto"


class SearchSection(Section):
    """How values are chosen: random, grid (`points` of each range), or by a searcher after `startup` random trials.

    `kind`: tpe or optuna (Optuna's samplers, TPE by default), another of Ray Tune's searchers (hyperopt, ...) or
    module:Name, a Searcher class. `options`: of its constructor; of Optuna's sampler, which `options.sampler` names.
    `default_first`: the first trial is the base config itself, where the space contains it.
    """

    kind: str = "tpe"
    startup: int = Field(8, ge=1)
    points: int = Field(3, ge=1, le=100)
    default_first: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)


class SchedulerSection(Section):
    """Which trials go on, by Ray Tune's schedulers. none: all, to the end.

    asha: at grace_images times powers of `reduction` only the best 1/reduction of those seen there (Li 2018).
    hyperband (Li 2016), median (stopping below the median; Golovin 2017): looked at every `every_images`.
    pbt: every `every_images` the worst `quantile` of the population take the weights of the best and values near theirs
    (Jaderberg 2017); pb2: values by a Gaussian process (Parker-Holder 2020). The population is all trials.
    module:Name: a TrialScheduler class. `options`: of its constructor.
    """

    kind: str = "none"
    grace_images: Count | None = None
    reduction: int = Field(3, ge=2, le=16)
    every_images: Count | None = None
    quantile: float = Field(0.25, gt=0, le=0.5)
    options: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)


class ResourcesSection(Section):
    """What one worker of a trial takes; fractions let several trials share a core or a GPU.

    `concurrent`: trials at once; as many as fit by default. `max_failures`: how often a trial's process may die.
    """

    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    concurrent: int | None = Field(None, ge=1)
    max_failures: int = Field(3, ge=0)


class Sweep(Section):
    """A whole sweep.

    `base`: the run's config, a path beside this file or the mapping itself. Or `checkpoint`: a trained model, for a
    space of `sample.` keys alone. `callbacks`: Ray Tune's loggers by name (mlflow, wandb, tensorboard, ...) or
    module:Name, each with its constructor's options.
    """

    study: StudySection
    base: dict[str, Any] | None = None
    checkpoint: str | None = None
    space: dict[str, DimensionSection]
    metric: MetricSection
    search: SearchSection = SearchSection()
    scheduler: SchedulerSection = SchedulerSection()
    callbacks: dict[str, dict[str, Any] | None] = {}  # noqa: RUF012 (pydantic copies it)
    trials: int = Field(20, ge=1, le=100_000)
    resources: ResourcesSection = ResourcesSection()

    def dump(self) -> dict[str, Any]:
        """Plain values, as they are written in YAML."""
        return self.model_dump(mode="json", by_alias=True)


def goals(sweep: Sweep) -> tuple[Any, Any]:
    """Ray Tune's `metric` and `mode`: of one metric two words, of several two lists."""
    modes = ["max" if name in MAXIMISED else "min" for name in sweep.metric.names]
    return (sweep.metric.names[0], modes[0]) if len(modes) == 1 else (list(sweep.metric.names), modes)


def misshapen(raw: Mapping[str, Any]) -> list[str]:
    """What is a value where the sweep's file has a section, a range or a list."""
    sections = {name for name in Sweep.model_fields if name not in ("base", "checkpoint", "trials")}
    found = [
        f"{key}: {_shown(value)} is not a section; write {key}: {{KEY: VALUE, ...}}"
        for key, value in raw.items()
        if not isinstance(value, dict) and (key in sections or (key == "base" and value is not None))
    ]
    space = raw.get("space")
    for key, given in space.items() if isinstance(space, dict) else ():
        if not isinstance(given, dict):
            found.append(
                f"space.{key}: {_shown(given)} is not a dimension; write {{uniform: [LOW, HIGH]}}, "
                "{log: [LOW, HIGH]}, {int: [LOW, HIGH]} or {choice: [VALUE, ...]}"
            )
            continue
        for kind, value in given.items():
            if value is None:
                continue  # as a dumped sweep writes what is not given
            if kind in ("uniform", "int", "log") and not (kind == "log" and isinstance(value, bool)):
                if not (isinstance(value, list | tuple) and len(value) == 2):
                    found.append(f"space.{key}.{kind}: {_shown(value)} is not a range; write [LOW, HIGH]")
            elif kind == "choice" and not isinstance(value, list | tuple):
                found.append(f"space.{key}.choice: {_shown(value)} is not a list; write [VALUE, ...]")
            elif kind == "when" and not isinstance(value, dict):
                found.append(
                    f"space.{key}.when: {_shown(value)} is not a condition; write {{KEY: VALUE or [VALUE, ...]}}"
                )
    return found


def _shown(value: Any) -> str:
    return shortened(repr(value))


@dataclass(frozen=True)
class StudyPlan:
    """A checked sweep: its space, and the run's config as a dict that values are put into."""

    sweep: Sweep
    space: Space
    raw: dict[str, Any]

    @property
    def base(self) -> dict[str, Any]:
        """Dotted keys of the base config."""
        return flat(self.raw)

    @property
    def total(self) -> int:
        """Images of a trial that is not stopped; 0 where nothing is trained."""
        return 0 if self.sweep.checkpoint else int(self.raw["duration"]["images"])

    def corners(self) -> Iterator[tuple[Dimension | None, Any, Values]]:
        """The base config as it is (None, None, {}), then every corner of the space."""
        yield None, None, {}
        yield from self.space.corners(self.base)

    def config(self, values: Mapping[str, Any]) -> Config:
        """The run's config at these values."""
        return load_config(with_values(self.raw, values))

    def default(self) -> Values | None:
        """The base config's own values, None where the space does not contain them."""
        base, values = self.base, Values()
        for one in self.space.dimensions:
            if self.space.active(one, values, base):
                there = base.get(one.key, _SAMPLE_DEFAULTS.get(one.key))
                written = [value for value in (there, *one.choices) if self._is(one, value, there)]
                if not written:
                    return None
                values[one.key] = written[0]
        return values

    def _is(self, one: Dimension, value: Any, there: Any) -> bool:
        """Whether a value of a dimension is the base config's `there`, however it is written ('64k', 64000)."""
        if value == there or one.key not in self.base:
            return value == there and one.contains(value)
        with contextlib.suppress(UserError):
            return bool(flat(self.config({one.key: value}).model_dump(mode="json")).get(one.key) == there)
        return False


_SAMPLE_DEFAULTS: dict[str, Any] = {
    "sample.sampler": "heun",
    "sample.steps": 18,
    "sample.grid": "karras",
    "sample.guidance": 1.0,
}


def need_of(plan: StudyPlan, config: Config | None) -> dict[str, float]:
    """What one trial takes of the cluster."""
    workers = config.scaling.range[1] if config else 1
    resources = plan.sweep.resources
    cpus = resources.cpus if workers == 1 or config is None else config.scaling.cpus_per_worker
    gpus = resources.gpus if workers == 1 or config is None else float(config.scaling.use_gpu)
    return {"CPU": workers * cpus, "GPU": workers * gpus}


def draw_settings(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """How a trial's samples are drawn: the metric's fixed budget, and what the trial searches of it."""
    metric = sweep.metric
    settings: dict[str, Any] = {"sampler": metric.sampler, "steps": metric.steps, "grid": metric.grid, "guidance": 1.0,
                                "ema": metric.ema, "options": {}}  # fmt: skip
    levels = list[float]()
    for key, value in values.items():
        if key.startswith(OPTION):
            settings["options"][key[len(OPTION) :]] = value
        elif key.startswith(LEVEL):
            levels.append(float(value))
        elif key.startswith(SAMPLE):
            settings[key[len(SAMPLE) :]] = value
    if levels:  # sorted, so that any values of the dimensions are a grid
        settings |= {"grid": sorted(levels, reverse=True), "steps": None}
    return settings
