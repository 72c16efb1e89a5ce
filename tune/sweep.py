"""A sweep's YAML file: what is searched, by which metric, how, and on how much. Mistakes are told before any trial."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from scoreray.data.errors import ScorerayError, UserError, nearest
from scoreray.data.manifest import Manifest
from scoreray.data.store import open_store
from scoreray.sampling.generate import Request
from scoreray.sampling.load import ModelInfo, without_weights
from scoreray.sampling.plan import describe
from scoreray.sampling.samplers import num_calls
from scoreray.trainer.config import Config, Section, _run_name, explained, load_config, override, read_yaml
from scoreray.trainer.ema import name_of_std
from scoreray.trainer.meta import meta_module
from scoreray.trainer.units import Count
from scoreray.tune.space import (
    OPTION,
    SAMPLE,
    SAMPLE_KEYS,
    DimensionSection,
    Space,
    Values,
    build_space,
    flat,
    with_values,
)

METRICS = ("denoising", "bpd", "nats", "fid", "kid", "sw", "nfe")
MAXIMISED = ("nats",)
OF_SAMPLES = ("fid", "kid", "sw")
OF_HELD_OUT = ("denoising", "bpd", "nats")  # measured on images that training must not have seen
PROBES = 16  # random points of the space whose configs are checked besides its corners
MetricName = Literal["denoising", "bpd", "nats", "fid", "kid", "sw", "nfe"]


class StudySection(Section):
    """Where the study lives: everything it writes goes under `<storage>/<name>`. `seed`: of the search."""

    name: Annotated[str, AfterValidator(_run_name)]
    storage: str
    seed: int = Field(0, ge=0, lt=2**31)


class MetricSection(Section):
    """What trials are compared by, the same whatever they search. Several names: no single best, a Pareto front.

    `names`: denoising (error of the denoised image at fixed noise levels, EDM-weighted by the data's own spread), bpd,
    nats, fid, kid, sw (sliced Wasserstein), nfe (calls of the network for a sample).
    `reference`: a packed data set that is not trained on. `count`: of its images, evenly over it; their noise is fixed.
    `sigma_min`, `sigma_max`, `levels`: the fixed noise levels, even in ln sigma.
    `samples`, `sampler`, `steps`, `grid`, `batch_size`: the sampler's fixed budget, for fid, kid and sw.
    """

    names: tuple[MetricName, ...] = ("denoising",)
    reference: str
    count: int = Field(1024, ge=16)
    sigma_min: float = Field(0.01, gt=0)
    sigma_max: float = Field(50.0, gt=0)
    levels: int = Field(16, ge=2, le=256)
    samples: int = Field(2000, ge=32)
    sampler: str | None = None
    steps: int | None = Field(None, ge=1)
    grid: str | None = None
    batch_size: int = Field(256, ge=1)
    ema: str | None = None
    extractor: str = "auto"


class SearchSection(Section):
    """How values are chosen: at random, on a grid of `points` for each range, or by TPE after `startup` random ones.

    `default_first`: the first trial is the base config itself, where the space contains it.
    """

    kind: Literal["random", "grid", "tpe"] = "tpe"
    startup: int = Field(8, ge=1)
    points: int = Field(3, ge=1, le=100)
    default_first: bool = True


class SchedulerSection(Section):
    """Which trials go on. none: all, to the end. asha: at grace_images times powers of `reduction` only the best
    1/reduction of those seen there (Li 2018). pbt: every `every_images` the worst `quantile` of the population take the
    weights of the best and values near theirs (Jaderberg 2017); the population is all trials.
    """

    kind: Literal["none", "asha", "pbt"] = "none"
    grace_images: Count | None = None
    reduction: int = Field(3, ge=2, le=16)
    every_images: Count | None = None
    quantile: float = Field(0.25, gt=0, le=0.5)


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
    space of `sample.` keys alone.
    """

    study: StudySection
    base: dict[str, Any] | None = None
    checkpoint: str | None = None
    space: dict[str, DimensionSection]
    metric: MetricSection
    search: SearchSection = SearchSection()
    scheduler: SchedulerSection = SchedulerSection()
    trials: int = Field(20, ge=1, le=100_000)
    resources: ResourcesSection = ResourcesSection()

    def dump(self) -> dict[str, Any]:
        """Plain values, as they are written in YAML."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class Plan:
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

    def config(self, values: Mapping[str, Any]) -> Config:
        """The run's config at these values."""
        return load_config(with_values(self.raw, values))

    def default(self) -> Values | None:
        """The base config's own values, None where the space does not contain them."""
        base, values = self.base, Values()
        for one in self.space.dimensions:
            if self.space.active(one, values, base):
                there = base.get(one.key, _SAMPLE_DEFAULTS.get(one.key))
                if not one.contains(there):
                    return None
                values[one.key] = there
        return values


_SAMPLE_DEFAULTS: dict[str, Any] = {
    "sample.sampler": "heun",
    "sample.steps": 18,
    "sample.grid": "karras",
    "sample.guidance": 1.0,
}


def load_sweep(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """The checked sweep of a YAML file. Raises one UserError that lists every mistake, a line each."""
    name = "sweep" if isinstance(source, dict) else str(source)
    raw = read_yaml(source)
    if isinstance(raw.get("base"), str):
        place = Path(raw["base"]) if isinstance(source, dict) else Path(source).parent / raw["base"]
        raw = {**raw, "base": read_yaml(place)}
    try:
        sweep = Sweep.model_validate(override(raw, overrides))
    except ValidationError as error:
        raise explained(error, Sweep, name) from None
    mistakes = _own_mistakes(sweep)
    space, wrong = build_space(sweep.space)
    mistakes += wrong
    if not mistakes:
        assert space is not None
        plan, mistakes = _with_base(sweep, space)
    if mistakes:
        head = f"{name}: {len(mistakes)} mistakes\n  " if len(mistakes) > 1 else f"{name}: "
        raise UserError(head + "\n  ".join(mistakes))
    return plan


def check_sweep(plan: Plan) -> list[str]:
    """What needs the stores: the data are there, fit the metric and every corner's network, the study can be written.

    Returns warnings, a line each. Raises ScorerayErrors.
    """
    sweep = plan.sweep
    reference = open_store(sweep.metric.reference)
    reference.check_reachable()
    manifest = Manifest.load(reference)
    open_store(sweep.study.storage).child(sweep.study.name).check_writable()
    infos = [describe(sweep.checkpoint, None)[0]] if sweep.checkpoint else list(_described(plan, manifest))
    mistakes = _metric_mistakes(sweep, manifest, infos[0]) + _sample_mistakes(plan, infos[0])
    if mistakes:
        raise UserError("\n".join(mistakes))
    return _warnings(sweep, manifest, {info.config.data.url for info in infos})


def _warnings(sweep: Sweep, manifest: Manifest, trained_on: set[str]) -> list[str]:
    """Images that are trained on, where the metric needs such as are not; FID and its like are often of those."""
    held_out = [name for name in sweep.metric.names if name in OF_HELD_OUT]
    if not held_out:
        return []
    for url in sorted(trained_on):
        same = url.rstrip("/") == sweep.metric.reference.rstrip("/")
        with contextlib.suppress(ScorerayError):  # a checkpoint's own data need not be within reach
            same = same or Manifest.load(open_store(url)).shards == manifest.shards
        if same:
            return [
                f"metric.reference: {sweep.metric.reference} holds the images that are trained on ({url}), so "
                f"{' and '.join(held_out)} will favour trials that learn them by heart; give images that training "
                "does not see"
            ]
    return []


def need_of(plan: Plan, config: Config | None) -> dict[str, float]:
    """What one trial takes of the cluster."""
    workers = config.scaling.range[1] if config else 1
    resources = plan.sweep.resources
    cpus = resources.cpus if workers == 1 or config is None else config.scaling.cpus_per_worker
    gpus = resources.gpus if workers == 1 or config is None else float(config.scaling.use_gpu)
    return {"CPU": workers * cpus, "GPU": workers * gpus}


def check_room(plan: Plan, room: Mapping[str, float]) -> None:
    """Raises UserError when a trial would wait for more than the cluster has."""
    for one, value, values in [(None, None, {}), *plan.space.corners(plan.base)]:
        config = None if plan.sweep.checkpoint else plan.config(values)
        for name, amount in need_of(plan, config).items():
            if amount > room.get(name, 0.0) + 1e-9:
                where = f"space.{one.key}: at {value!r} " if one else "resources: "
                raise UserError(
                    f"{where}a trial needs {amount:g} {name}, the cluster has {room.get(name, 0.0):g}; ask for less, "
                    "or connect to a larger cluster with RAY_ADDRESS"
                )


def _own_mistakes(sweep: Sweep) -> list[str]:
    found, metric, scheduler = [], sweep.metric, sweep.scheduler
    if (sweep.base is None) == (sweep.checkpoint is None):
        found.append("base: give either a base config to train, or a checkpoint to draw from")
    if metric.sigma_min >= metric.sigma_max:
        found.append(f"metric.sigma_min: {metric.sigma_min} must be below metric.sigma_max {metric.sigma_max}")
    if not metric.names:
        found.append(f"metric.names: is empty; give one or more of {', '.join(METRICS)}")
    if len(set(metric.names)) != len(metric.names):
        found.append(f"metric.names: {list(metric.names)} names a metric twice")
    if scheduler.kind == "asha" and scheduler.grace_images is None:
        found.append("scheduler.grace_images: missing; asha needs the images after which a trial may be stopped")
    if scheduler.kind == "pbt" and scheduler.every_images is None:
        found.append("scheduler.every_images: missing; pbt needs the images between two exchanges")
    if scheduler.kind == "pbt" and sweep.trials < 4:
        found.append(f"trials: {sweep.trials} are no population; pbt needs at least 4")
    if scheduler.kind != "none" and len(metric.names) > 1:
        found.append(f"scheduler.kind: '{scheduler.kind}' needs one metric, metric.names has {len(metric.names)}")
    if sweep.checkpoint is not None:
        if scheduler.kind != "none":
            found.append(f"scheduler.kind: '{scheduler.kind}' stops training, and nothing is trained from a checkpoint")
        found += [
            f"space.{key}: needs training, and this sweep draws from a checkpoint; give a base config, or keep to "
            f"{SAMPLE}{{{', '.join(SAMPLE_KEYS)}}} and {OPTION}NAME"
            for key in sweep.space
            if not key.startswith(SAMPLE)
        ]
    for key in sweep.space:
        if key.startswith(SAMPLE) and not key.startswith(OPTION) and key[len(SAMPLE) :] not in SAMPLE_KEYS:
            found.append(f"space.{key}: unknown key; {nearest(key[len(SAMPLE) :], (*SAMPLE_KEYS, 'options.NAME'))}")
    return found


def _with_base(sweep: Sweep, space: Space) -> tuple[Plan, list[str]]:
    """The plan, and what a run's config refuses: at the base, at each corner, and at some points between."""
    if sweep.checkpoint is not None:
        return Plan(sweep, space, {}), []
    try:
        raw = load_config(_tracking(sweep)).model_dump(mode="json")
    except UserError as error:
        return Plan(sweep, space, {}), [f"base: {line.removeprefix('config: ')}" for line in str(error).splitlines()]
    plan, found = Plan(sweep, space, raw), []
    names = {one.key for one in space.dimensions} | plan.base.keys()
    found += [
        f"space.{one.key}.when: unknown key '{key}'; {nearest(key, names)}"
        for one in space.dimensions
        for key, _ in one.when
        if key not in names
    ]
    if found:
        return plan, found
    for one, value, values in space.corners(plan.base):
        for line in _refused(plan, values):
            unknown = ": unknown key" in line  # whatever the value
            found.append(f"space.{line}" if unknown else f"space.{one.key}: at {value!r}: {line}")
    if not found:
        rng = random.Random(0)
        for values in (space.draw(rng, plan.base) for _ in range(PROBES)):
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            found += [f"space: at {shown}: {line}" for line in _refused(plan, values)][:1]
    found = list(dict.fromkeys(found)) or _schedule_mistakes(plan)
    return plan, found


def _tracking(sweep: Sweep) -> dict[str, Any]:
    """The base config, which also tracks every EMA length that is searched: one run has them all."""
    raw = dict(sweep.base or {})
    raw.setdefault("run", {})
    raw["run"] = {"name": sweep.study.name, "storage": sweep.study.storage, **raw["run"]}
    lengths = sweep.space.get("sample.ema")
    if lengths is not None and lengths.choice:
        ema = dict(raw.get("ema") or {})
        given = [float(std) for std in ema.get("stds", (0.05, 0.10))]
        names = {name_of_std(std) for std in given}
        wanted = [float(one) for one in lengths.choice if _is_number(one) and name_of_std(float(one)) not in names]
        raw["ema"] = {**ema, "stds": [*given, *wanted]}
    return raw


def _refused(plan: Plan, values: Values) -> list[str]:
    try:
        plan.config(values)
    except UserError as error:
        lines = [line.strip().removeprefix("config: ") for line in str(error).splitlines()]
        return [line for line in lines if not line.endswith("mistakes")]
    return []


def _schedule_mistakes(plan: Plan) -> list[str]:
    sweep, total, batch = plan.sweep, plan.total, plan.config({}).data.global_batch_size
    scheduler = sweep.scheduler
    step = scheduler.grace_images if scheduler.kind == "asha" else scheduler.every_images
    found = []
    if scheduler.kind != "none" and step is not None and not batch <= step < total:
        key = "grace_images" if scheduler.kind == "asha" else "every_images"
        found.append(f"scheduler.{key}: {step} must lie between a batch ({batch}) and duration.images ({total})")
    if scheduler.kind == "pbt":
        fixed = ("network.", "ema.", "data.", "run.", "duration.", "denoiser.", "optimizer.schedule", SAMPLE)
        found += [
            f"space.{one.key}: can't change while a trial goes on, so pbt can't explore it; search it with asha"
            for one in plan.space.dimensions
            if one.key.startswith(fixed)
        ]
        if any(one.key.endswith("weighting.kind") and "learned" in one.choices for one in plan.space.dimensions):
            found.append("space: weighting.kind 'learned' has weights that others lack, so pbt can't exchange them")
    if scheduler.kind != "none":
        for _, _, values in [(None, None, {}), *plan.space.corners(plan.base)]:
            config = plan.config(values)
            if config.scaling.range[1] > 1 and config.optimizer.schedule == "cosine":
                found.append(
                    "optimizer.schedule: a cosine ends with the run, and trials of several workers are stopped by "
                    "ending it; use constant or inverse_sqrt, or scaling.workers=1"
                )
                break
    if any(one.key.startswith(("run.", "duration.")) for one in plan.space.dimensions):
        found.append("space: run and duration are not searched; trials share seed and length so that they compare")
    return found


def _described(plan: Plan, reference: Manifest) -> Any:
    """A model's description at the base and every corner, each of whose networks is built without memory."""
    seen: dict[str, Manifest] = {}
    for _, _, values in itertools.chain([(None, None, {})], plan.space.corners(plan.base)):
        config = plan.config(values)
        if config.data.url not in seen:
            store = open_store(config.data.url)
            store.check_reachable()
            seen[config.data.url] = Manifest.load(store)
        manifest = seen[config.data.url]
        try:
            meta_module(config, manifest)
        except UserError as error:
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            raise UserError(f"space: at {shown}: {error}") from None
        yield ModelInfo("", 0, config.ema.names[0], tuple(manifest.shape), tuple(manifest.classes), config)


def _metric_mistakes(sweep: Sweep, manifest: Manifest, info: ModelInfo) -> list[str]:
    found = []
    if tuple(manifest.shape) != info.image_shape:
        found.append(
            f"metric.reference: samples of shape {list(manifest.shape)}, training has {list(info.image_shape)}"
        )
    if "bpd" in sweep.metric.names and manifest.dtype != "uint8":
        found.append("metric.names: bpd is of 8-bit images; use nats for these data")
    if "nats" in sweep.metric.names and manifest.dtype == "uint8":
        found.append("metric.names: nats is of real-valued data; use bpd for 8-bit images")
    return found


def _sample_mistakes(plan: Plan, info: ModelInfo) -> list[str]:
    """What drawing samples refuses, at each corner of the `sample.` keys."""
    found = []
    for one, value, values in [(None, None, {}), *plan.space.corners(plan.base)]:
        where = "metric: " if one is None else f"space.{one.key}: at {value!r}: "
        if one is not None and not one.key.startswith(SAMPLE):
            continue
        try:
            drawn = draw_settings(plan.sweep, values)
            if "ema" in drawn and drawn["ema"] is not None and drawn["ema"] != "none":
                info.config.ema.choose(str(drawn["ema"]))
            request = Request(count=16, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                              guidance=float(drawn["guidance"]), options=drawn["options"])  # fmt: skip
            model = without_weights(info)
            fitted = request.fitted(model)
            calls_of(fitted, model)
        except (ScorerayError, TypeError) as error:
            found.append(f"{where}{error}")
    return found


def draw_settings(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """How a trial's samples are drawn: the metric's fixed budget, and what the trial searches of it."""
    metric = sweep.metric
    settings: dict[str, Any] = {"sampler": metric.sampler, "steps": metric.steps, "grid": metric.grid, "guidance": 1.0,
                                "ema": metric.ema, "options": {}}  # fmt: skip
    for key, value in values.items():
        if key.startswith(OPTION):
            settings["options"][key[len(OPTION) :]] = value
        elif key.startswith(SAMPLE):
            settings[key[len(SAMPLE) :]] = value
    return settings


def calls_of(request: Request, model: Any) -> int:
    """How often the network is called for one sample."""
    assert request.sampler is not None  # fitted
    return num_calls(request.sampler, model.info.sigmas(request.steps, request.grid), **request.options)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
