"""The sections of a run's config: frozen and typed, each default once.

A section that configures one component is defined beside it (`network`, `process`, `optimizer`, `ema`, `engine`, ...);
here are the sections of the run as a whole, and `Config`, which holds them all and checks them against each other.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from scoreray.data.errors import shortened
from scoreray.data.fields.normalisation import Normalisation
from scoreray.data.reading.order import default_lanes
from scoreray.data.units import Count, CountOrZero, NumberAsText
from scoreray.trainer.config import validation
from scoreray.trainer.diffusion.augmentation import AugmentationConfig
from scoreray.trainer.diffusion.condition import ConditionKind
from scoreray.trainer.diffusion.denoiser import DenoiserConfig
from scoreray.trainer.diffusion.process import EDM, AnyProcess
from scoreray.trainer.engine import EngineConfig
from scoreray.trainer.networks.lora import LoRAConfig
from scoreray.trainer.networks.network import AnyNetwork
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.base import AlignmentConfig
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.objectives.objective import AnyObjective
from scoreray.trainer.objectives.teacher import MAX_GUIDANCE
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.optimizer import OptimizerConfig
from scoreray.trainer.optim.sgld import AnyOptimizer

MAX_WORKERS = 100_000
MAX_WAIT_S = 1e9  # what a system's timers take
MAX_MINUTES = 1e7  # 19 years


def _workers(value: Any) -> Any:
    ends = [value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    good = all(isinstance(end, int) and not isinstance(end, bool) and 1 <= end <= MAX_WORKERS for end in ends)
    if not good or len(ends) not in (1, 2) or ends[0] > ends[-1]:
        accepted = f"a number from 1 to {MAX_WORKERS:,}, or [fewest, most]"
        raise ValueError(f"{shortened(repr(value))} is not accepted; it should be {accepted}")
    return ends[0] if len(ends) == 1 else tuple(ends)


def _url_of_data(value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    wrong = [part for part in parts if not isinstance(part, str)]
    if wrong:
        shown = "a section" if isinstance(wrong[0], dict) else shortened(repr(wrong[0]))
        raise ValueError(f"{shown} is not accepted; it should be a URL, or a list of URLs of tars, each a text")
    return value


def _numbers(value: Any) -> Any:
    """A number alone as one of all channels."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def check_run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError("a run's name has letters, digits, '.', '_' and '-' only, 100 at most")
    return name


def _mlflow_uri(uri: str | None) -> str | None:
    if uri is None or uri == "databricks":
        return uri
    if not re.match(r"(https?://[^/]|sqlite:///.|databricks://.)", uri):
        raise ValueError(
            f"{shortened(repr(uri))} is not accepted; "
            "it should be https://HOST, http://HOST, sqlite:///FILE or databricks"
        )
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ValueError("a user or password has no place in a config; set MLFLOW_TRACKING_USERNAME and _PASSWORD")
    return uri


def _wandb_project(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"([\w.-]{1,128}/)?[\w. -]{1,128}", name, re.ASCII):
        raise ValueError(f"{shortened(repr(name))} is not accepted; it should be a project, or entity/project")
    return name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RunSection(Section):
    """Where the run lives, and what its randomness is drawn from.

    `name`: of the run; letters, digits, ".", "_" and "-".  `storage`: a URL; everything that the run writes goes under
    `<storage>/<name>`.  `seed`: of initial weights, the order of samples, noise and noise levels.
    """

    name: Annotated[str, AfterValidator(check_run_name)]
    storage: str
    seed: int = Field(0, ge=0, lt=2**63)


class InitSection(Section):
    """Another model that the run begins from: its network's weights, once, before the first step.

    `checkpoint`: a run (its newest checkpoint), one checkpoint's folder, or an exported or imported model. `ema`: a
    length that it holds, or "weights" without averaging; None takes its first length. `strict`: all that it holds must
    fit; else what does not is listed and begins as in any other run. New classes, channels and conditions may be there
    either way.
    """

    checkpoint: str
    ema: NumberAsText | None = None
    strict: bool = True


class ConditionSection(Section):
    """What conditions the network, by one field of the data set.

    `field`: None takes the one of the condition's own name.  `kind`: how it enters (docs/networks.md); None: as the
    field's own kind says (an image or array as `concat`, a scalar as `vector`).
    `max_length`: of a sequence's tokens or a text's bytes.  `too_long`: whether longer ones are cut or refused.
    `dropout`: share of samples whose condition is dropped on its own, beside `objective.label_dropout`, which drops all
    at once.  `normalisation`: None takes the data set's for the field.
    """

    field: str | None = None
    kind: ConditionKind | None = None
    max_length: int | None = Field(None, ge=1, le=1 << 20)
    too_long: Literal["cut", "refuse"] = "refuse"
    dropout: float = Field(0.0, ge=0, le=1)
    normalisation: Normalisation | None = None


class DataSection(Section):
    """The data set (`scoreray data pack`) and how much of it makes one optimizer step.

    `url`: where its manifest is; or tars without one, in brace notation (`s3://bucket/photos-{000000..000099}.tar`), as
    a list of these, or the folder that holds them.
    `num_classes`: of such tars alone; 0 trains without.  `image_size`: of such tars alone; the shorter side of pictures
    is resized to it and the centre cropped.
    `on_error`: a sample that can't be read stops the run, or, with "quarantine", is named, counted and replaced by
    another one, up to `quarantine_budget` samples in the whole run.
    `target`: what is modelled; None: the first image, else array, vector, scalar.  `normalisation`: of the target; None
    takes the data set's.  `conditions`: by name; None: the data set's classes, where it has any, as `label`.
    `global_batch_size`: samples of one optimizer step, over all workers and micro-batches.
    `num_lanes`: parts of an epoch's order, which the numbers of workers must divide, as it must divide the batch; None:
    the largest divisor of the batch up to 128.  `shuffle_block`: samples that a lane shuffles at once; None: up to
    1,000.  `prefetch_batches`: batches that a rank reads ahead of its step.
    `cache_dir`: a folder of each machine that keeps the shards' bytes that its ranks read.  `cache_bytes`: at most so
    many of them.
    """

    url: Annotated[str | tuple[str, ...], BeforeValidator(_url_of_data)]
    num_classes: CountOrZero | None = None
    image_size: Count | None = None
    target: str | None = None
    normalisation: Normalisation | None = None
    conditions: dict[str, ConditionSection] | None = None
    global_batch_size: Count = 256
    num_lanes: Count | None = None
    shuffle_block: Count | None = None
    prefetch_batches: int = Field(4, ge=1, le=1024)
    on_error: Literal["stop", "quarantine"] = "stop"
    quarantine_budget: Count = 1000
    cache_dir: str | None = None
    cache_bytes: CountOrZero = Field(64 << 30, ge=64 << 20)


Scales = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_numbers)]
Shifts = Annotated[tuple[float, ...], BeforeValidator(_numbers)]


class AutoencoderSection(Section):
    """What decodes the latents that are modelled, where that is to be another than the data set's record says.

    `kind`, `path`: where the autoencoder is now; its hash must be the recorded one.  `scale`, `shift`: the network sees
    (z - shift) scale of latents z, each a number or one a channel, as diffusers' scaling_factor and shift_factor, in
    the place of what was measured; a scale alone has the shift 0.
    """

    kind: str | None = None
    path: str | None = None
    scale: Scales | None = None
    shift: Shifts | None = None


class ScalingSection(Section):
    """Workers: a number, or [fewest, most] for a run that shrinks and grows with the cluster. Both must divide the
    batch's lanes; of the numbers between, the run takes those that do.

    `workers`: how many, or [fewest, most].  `use_gpu`: a GPU for each.  `cpus_per_worker`: CPU cores that Ray reserves
    for each.
    `max_failures`: failures of workers without a commit in between, after which the run ends; -1 never ends it.
    `hang_timeout_s`: a worker whose process does not answer for so long is ended, and all start again.
    `resize_every_s`: how often a run that could be larger looks whether the cluster has room.
    `grace_s`: how long a run that is stopped (Ctrl-C, SIGTERM) may take to save.
    `standby_after_s`: on an embedded local Ray, so long after a start one process per worker is pre-warmed (everything
    imported); when a worker dies, all restart in these, in seconds. null: none, which spares their memory.
    """

    workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    use_gpu: bool = False
    cpus_per_worker: float = Field(1, gt=0, le=1024)
    max_failures: int = Field(8, ge=-1)
    hang_timeout_s: float = Field(30, ge=3, le=MAX_WAIT_S)
    resize_every_s: float = Field(30, ge=1, le=MAX_WAIT_S)
    grace_s: float = Field(25, ge=0, le=MAX_WAIT_S)
    standby_after_s: float | None = Field(60, ge=0, le=MAX_WAIT_S)

    @property
    def range(self) -> tuple[int, int]:
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers


class DurationSection(Section):
    """How long the run is: so many images, or so many minutes from its first steps.

    `images`: samples seen, those of earlier starts included, at which it ends.
    `minutes`: the first steps (a sixteenth of the time, 30 s at most) measure the speed, which makes a number of images
    of them; that is decided once, before the first commit, and is what `images` says in the config of each checkpoint.
    A run that goes on ends there too. `optimizer.warmup_images` is then at most an eighth of it.
    """

    images: Count | None = None
    minutes: float | None = Field(None, gt=0, le=MAX_MINUTES)

    @model_validator(mode="after")
    def _one_of_them(self) -> DurationSection:
        if (self.images is None) == (self.minutes is None):
            raise ValueError("give images or minutes, and the other one as null")
        return self


class CheckpointSection(Section):
    """A checkpoint every so many images (and at the end), of which the newest stay.

    `every_images`: images between two checkpoints.  `keep`: how many of the newest stay.
    `keep_every_images`: of the older ones, the first at or after each multiple of this stays too.
    `snapshot_every_images`: with the first checkpoint after each so many images the averages alone are kept too, in
    fp16 and for good (2 bytes per parameter and EMA length each), from which `scoreray export --ema` makes lengths that
    were not tracked; 0 keeps none.
    `ahead_images`: how far training may go on while a checkpoint is being committed, before it waits for that. A kill
    costs at most `every_images` and this; None: until the next checkpoint is due, 0: it waits for every commit.
    """

    every_images: Count = 1_000_000
    keep: int = Field(3, ge=1)
    keep_every_images: Count | None = None
    snapshot_every_images: CountOrZero = 0
    ahead_images: CountOrZero | None = None


class LogSection(Section):
    """A line of metrics every so many images, and where it goes.

    `every_images`: images between two lines.  `tensorboard`: also as files under `<run>/tensorboard`.
    `mlflow`: also to this MLflow, "https://...", "http://...", "sqlite:///FILE" or "databricks".  `wandb`: also to
    this project of Weights & Biases, "project" or "entity/project". Each needs its package.
    """

    every_images: Count = 10_000
    tensorboard: bool = True
    mlflow: Annotated[str | None, AfterValidator(_mlflow_uri)] = None
    wandb: Annotated[str | None, AfterValidator(_wandb_project)] = None


class EvaluationSection(Section):
    """What is measured beside the run at each committed checkpoint, by a process of its own that gives way to training.

    `metrics`: as of `scoreray evaluate`; none measures nothing. `metric_options`: of some, by the metric's name.
    `sheet`: samples in a picture of each checkpoint.
    `every_images`: only the first checkpoint after each so many images; 0 takes every one (the newest, where evaluation
    is slower than training).  `reference`: a packed data set; None takes `data.url`.
    `count`: samples that are drawn.  `reference_count`: at most so many of the reference.  `extractor`: of features: a
    name, a file or a class of yours, as of `scoreray evaluate`; "auto" takes what fits the data.
    `sampler`, `steps`, `grid`: how samples are drawn; None takes what fits the model.  `max_calls`: of the network for
    a sample; the best sampler, steps and grid within it.  `guidance`: weight; 1 is none.
    `batch_size`: samples of one call of the network.
    """

    metrics: tuple[str, ...] = ()
    metric_options: dict[str, dict[str, Any]] = {}
    sheet: int = Field(0, ge=0, le=1024)
    every_images: CountOrZero = 0
    reference: str | None = None
    count: Count = Field(1000, ge=16)
    reference_count: Count = Field(10_000, ge=16)
    extractor: str = "auto"
    sampler: str | None = None
    steps: int | None = Field(None, ge=1)
    grid: str | tuple[float, ...] | None = None
    max_calls: int | None = Field(None, ge=1, le=10_000)
    guidance: float = Field(1.0, ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)
    batch_size: int = Field(64, ge=1)


class Config(Section):
    """A whole run. Keys and defaults: `scoreray train --print-config CONFIG`."""

    run: RunSection
    data: DataSection
    autoencoder: AutoencoderSection | None = None
    init: InitSection | None = None
    lora: LoRAConfig | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    process: AnyProcess = EDM()
    network: AnyNetwork = UNetConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: AnyObjective = EDMObjective()
    optimizer: AnyOptimizer = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    engine: EngineConfig = EngineConfig()
    scaling: ScalingSection = ScalingSection()
    duration: DurationSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _validate_across_sections(self) -> Config:
        found = validation.mistakes(
            self.network, self.process, self.denoiser, self.objective, self.data.global_batch_size, self.engine.compile
        )
        found += self._autoencoder_mistakes() + self._solver_mistakes() + self._lora_mistakes()
        validation.refuse(found + self._batch_mistakes())
        return self

    @model_validator(mode="before")
    @classmethod
    def _no_classes_for_an_autoencoder(cls, raw: Any) -> Any:
        """`data.conditions` left out means the data's classes, of which an autoencoder has no use."""
        match raw:
            case {"objective": {"kind": "autoencoding"}, "data": {**data}} if data.get("conditions") is None:
                return {**raw, "data": {**data, "conditions": {}}}
        return raw

    @property
    def alignment(self) -> AlignmentConfig | None:
        """Of the objectives that may have it."""
        return getattr(self.objective, "alignment", None)

    @property
    def levels(self) -> tuple[str, ...]:
        """Inputs that are no data and that the network is built for as well (`trainer/diffusion/levels.py`)."""
        return getattr(self.objective, "levels", ())

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of workers that the run may have, ascending: of scaling.workers, those that share the batch."""
        low, high = self.scaling.range
        batch, group = self.data.global_batch_size, self.engine.partition_group
        parts = math.lcm(self.engine.micro_batch_size or 1, self._coupled)
        lanes = self.data.num_lanes or default_lanes(batch)
        # Whole lanes, whole partition groups (one of all ranks would only add a second copy), whole micro-batches and
        # groups of a coupling.
        return tuple(
            size
            for size in range(low, high + 1)
            if not (lanes % size or size % group or size == group > 1 or (batch // size) % parts)
        )

    @property
    def _coupled(self) -> int:
        """Rows of a rank that an objective's coupling pairs among themselves."""
        return getattr(getattr(self.objective, "coupling", None), "group_size", 1)

    def _autoencoder_mistakes(self) -> list[str]:
        if not isinstance(self.objective, AutoencodingObjective):
            return []
        found = [f"data.conditions: objective.kind '{self.objective.kind}' takes none; leave them out"]
        found = found if self.data.conditions else []
        if self.evaluation.sheet:
            found.append(
                "evaluation.sheet: an autoencoder draws no samples; leave it out, and take evaluation.metrics "
                "[mse, psnr, ssim, reconstruction_fid]"
            )
        return found

    def _solver_mistakes(self) -> list[str]:
        highest, stage = getattr(self.objective, "max_zero_stage", 3), self.engine.zero_stage
        found = []
        if stage != "auto" and stage > highest:
            found.append(
                f"engine.zero_stage: objective '{self.objective.kind}' calls the network all along a path, and stage 3 "
                f"lets go of its weights in between; choose {highest} or less"
            )
        highest = getattr(self.optimizer, "max_zero_stage", 3)
        if self.engine.offload != "none" and not highest:
            found.append(
                f"engine.offload: optimizer '{self.optimizer.kind}' goes without ZeRO, which offloads; leave it out"
            )
        if stage != "auto" and stage > highest:
            found.append(
                f"engine.zero_stage: optimizer '{self.optimizer.kind}' needs each matrix whole on its rank, and stage "
                f"{stage} cuts them; choose {highest} or auto, or optimizer.kind adamw"
            )
        return found

    @property
    def max_zero_stage(self) -> Literal[0, 1, 2, 3]:
        """The highest ZeRO stage that both objective and optimizer can be trained with."""
        return min(getattr(part, "max_zero_stage", 3) for part in (self.objective, self.optimizer))

    def _lora_mistakes(self) -> list[str]:
        if self.lora is None:
            return []
        found = [] if self.init else ["lora: adapts the model that a run begins from; name it by init.checkpoint"]
        if self.optimizer.frozen:
            found.append("optimizer.frozen: a LoRA leaves the whole network frozen; leave this out")
        return found

    def _batch_mistakes(self) -> list[str]:
        """The global batch is the config's at every world size, so the fewest and the most workers must divide it; of
        the numbers between, the run takes those that do (`world_sizes`)."""
        batch, micro, group = self.data.global_batch_size, self.engine.micro_batch_size, self.engine.partition_group
        low, high = self.scaling.range
        for workers in (low, high):
            if workers % group or workers == group > 1:
                return [
                    f"engine.partition_group: {group} must be a true divisor of every number of workers that the run "
                    f"may have, scaling.workers {self.scaling.workers}; it is the number of workers on a node"
                ]
        lanes = self.data.num_lanes or default_lanes(batch)
        if batch % lanes:
            return [f"data.num_lanes: {lanes} does not divide data.global_batch_size {batch}; give a divisor"]
        for workers in (low, high):
            if lanes % workers:
                fitting = math.lcm(low, high)
                fix = "set data.num_lanes to" if batch % fitting == 0 else "make data.global_batch_size"
                return [
                    f"data.global_batch_size: {batch} in {lanes} lanes can't be shared by {workers} workers, of "
                    f"scaling.workers {self.scaling.workers}; {fix} a multiple of {fitting}"
                ]
            if micro and (batch // workers) % micro:
                return [
                    f"engine.micro_batch_size: {micro} does not divide the {batch // workers} rows that each of "
                    f"{workers} workers has of data.global_batch_size {batch}"
                ]
            if (batch // workers) % self._coupled:
                return [
                    f"objective.coupling.group_size: {self._coupled} does not divide the {batch // workers} rows that "
                    f"each of {workers} workers has of data.global_batch_size {batch}; take a divisor of both, such as "
                    f"{math.gcd(self._coupled, batch // high)}"
                ]
        return []
