"""The configuration of a run: YAML into frozen typed sections, with dotted overrides and all mistakes at once."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.reading.order import default_lanes
from scoreray.data.storage.store import NotFound, open_store
from scoreray.data.units import Count, CountOrZero
from scoreray.data.yaml_text import MAX_BYTES, dump_yaml, parse_value, parse_yaml
from scoreray.trainer.config import validation as fits
from scoreray.trainer.diffusion.augmentation import AugmentationConfig
from scoreray.trainer.diffusion.denoiser import DenoiserConfig
from scoreray.trainer.diffusion.objective import EDMObjective, ObjectiveConfig
from scoreray.trainer.diffusion.process import EDM, Process
from scoreray.trainer.networks.network import NetworkConfig
from scoreray.trainer.networks.rbm import MachineConfig
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.optimizer import OptimizerConfig

MOST_WORKERS = 100_000
MOST_S = 1e9  # of waiting: what a system's timers take
MAX_GUIDANCE = 100.0  # beyond it, on either side, samples are noise or not finite


def _workers(value: Any) -> Any:
    ends = [value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    good = all(isinstance(end, int) and not isinstance(end, bool) and 1 <= end <= MOST_WORKERS for end in ends)
    if not good or len(ends) not in (1, 2) or ends[0] > ends[-1]:
        accepted = f"a number from 1 to {MOST_WORKERS:,}, or [fewest, most]"
        raise ValueError(f"{shortened(repr(value))} is not accepted; it should be {accepted}")
    return ends[0] if len(ends) == 1 else tuple(ends)


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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RunSection(Section):
    """Where the run lives: everything it writes goes under `<storage>/<name>`."""

    name: Annotated[str, AfterValidator(check_run_name)]
    storage: str
    seed: int = Field(0, ge=0, lt=2**63)


class DataSection(Section):
    """The packed data set (`scoreray data pack`) and how much of it makes one optimizer step.

    `on_error`: a sample that can't be read stops the run, or, with "quarantine", is named, counted and replaced by
    another one, up to `quarantine_budget` samples in the whole run.
    `cache_dir`: a folder of each machine that keeps the shards' bytes that its ranks read, up to `cache_bytes`.
    """

    url: str
    global_batch_size: Count = 256
    num_lanes: Count | None = None
    shuffle_block: Count | None = None
    prefetch_batches: int = Field(4, ge=1, le=1024)
    on_error: Literal["stop", "quarantine"] = "stop"
    quarantine_budget: Count = 1000
    cache_dir: str | None = None
    cache_bytes: CountOrZero = Field(64 << 30, ge=64 << 20)


class EngineSection(Section):
    """How one step is computed. None of it changes what is learnt, except `precision`, by rounding.

    `micro_batch_size`: rows per forward pass on one worker; None takes the worker's whole share of the batch.
    `zero_stage`: "auto" takes the cheapest stage whose state fits a rank's memory, and says which.
    `precision`: "bf16" keeps bf16 weights with fp32 masters; "auto" takes bf16 where the device gains from it.
    `partition_group`: with ZeRO-3, ranks (those of a node) that hold a second copy of the weights among them, so that
    the backward pass gathers inside the node only (ZeRO++ hpZ, Wang 2023); 1 for none.
    """

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    micro_batch_size: Count | None = None
    offload: Literal["none", "optimizer"] = "none"
    compile: bool = False
    partition_group: int = Field(1, ge=1)


class ScalingSection(Section):
    """Workers: a number, or [fewest, most] for a run that shrinks and grows with the cluster. Both must divide the
    batch's lanes; of the numbers between, the run takes those that do.

    `max_failures`: failures of workers without a commit in between, after which the run ends; -1 never ends it.
    `hang_timeout_s`: a worker whose process does not answer for so long is ended, and all start again.
    `resize_every_s`: how often a run that could be larger looks whether the cluster has room.
    `grace_s`: how long a run that is told to stop (Ctrl-C, SIGTERM) may take to save.
    `standby_after_s`: on this machine's own Ray, so long after a start as many processes are made ready as there are
    workers; when one of these dies, all start again there in seconds. null: none, which spares their memory.
    """

    workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    use_gpu: bool = False
    cpus_per_worker: float = Field(1, gt=0, le=1024)
    max_failures: int = Field(8, ge=-1)
    hang_timeout_s: float = Field(30, ge=3, le=MOST_S)
    resize_every_s: float = Field(30, ge=1, le=MOST_S)
    grace_s: float = Field(25, ge=0, le=MOST_S)
    standby_after_s: float | None = Field(60, ge=0, le=MOST_S)

    @property
    def range(self) -> tuple[int, int]:
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers


class DurationSection(Section):
    images: Count


class CheckpointSection(Section):
    """A checkpoint every so many images (and at the end); the newest `keep` stay.

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
    """A line of metrics every so many images; `tensorboard`: also as files under `<run>/tensorboard`.

    `mlflow`: also to this MLflow, "https://...", "http://...", "sqlite:///FILE" or "databricks"; needs the package.
    """

    every_images: Count = 10_000
    tensorboard: bool = True
    mlflow: Annotated[str | None, AfterValidator(_mlflow_uri)] = None


class EvaluationSection(Section):
    """What is measured beside the run at each committed checkpoint, by a process of its own that gives way to training.

    `metrics`: as of `scoreray evaluate`; none measures nothing. `sheet`: samples in a picture of each checkpoint.
    `every_images`: only the first checkpoint after each so many images; 0 takes every one (the newest, where evaluation
    is slower than training). `reference`: a packed data set; None takes `data.url`.
    """

    metrics: tuple[str, ...] = ()
    sheet: int = Field(0, ge=0, le=1024)
    every_images: CountOrZero = 0
    reference: str | None = None
    count: Count = Field(1000, ge=16)
    reference_count: Count = Field(10_000, ge=16)
    extractor: str = "auto"
    sampler: str | None = None
    steps: int | None = Field(None, ge=1)
    guidance: float = Field(1.0, ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)
    batch_size: int = Field(64, ge=1)


class Config(Section):
    """A whole run. Keys and defaults: `scoreray train --print-config CONFIG`."""

    run: RunSection
    data: DataSection
    augmentation: AugmentationConfig = AugmentationConfig()
    process: Annotated[Process, Field(discriminator="kind")] = EDM()
    network: Annotated[NetworkConfig | MachineConfig, Field(discriminator="kind")] = UNetConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: Annotated[ObjectiveConfig, Field(discriminator="kind")] = EDMObjective()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    engine: EngineSection = EngineSection()
    scaling: ScalingSection = ScalingSection()
    duration: DurationSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        found = fits.mistakes(
            self.network,
            self.process,
            self.denoiser,
            self.objective,
            self.data.global_batch_size,
            self.engine.compile,
        )
        fits.refuse(found + self._batch_mistakes())
        return self

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of workers that the run may have, ascending: of scaling.workers, those that share the batch."""
        low, high = self.scaling.range
        batch, group = self.data.global_batch_size, self.engine.partition_group
        micro = self.engine.micro_batch_size or 1
        lanes = self.data.num_lanes or default_lanes(batch)
        return tuple(
            size
            for size in range(low, high + 1)
            if not (lanes % size or size % group or size == group > 1 or (batch // size) % micro)
        )

    def _batch_mistakes(self) -> list[str]:
        """The global batch is the config's at every world size, so the fewest and the most workers must divide it; of
        the numbers between, the run takes those that do (`world_sizes`)."""
        batch, micro, group = self.data.global_batch_size, self.engine.micro_batch_size, self.engine.partition_group
        if self.engine.offload != "none" and self.engine.zero_stage == 0:
            return [f"engine.offload: {self.engine.offload} needs engine.zero_stage 1, 2, 3 or auto, this is 0"]
        if group > 1 and self.engine.zero_stage != 3:
            return [f"engine.partition_group: {group} needs engine.zero_stage 3, this is {self.engine.zero_stage}"]
        low, high = self.scaling.range
        for workers in (low, high):
            if workers % group or workers == group > 1:
                return [
                    f"engine.partition_group: {group} must be a true divisor of every number of workers that the run "
                    f"may have, scaling.workers {self.scaling.workers}; it is the number of workers on a node"
                ]
        lanes = self.data.num_lanes or default_lanes(batch)
        if batch % lanes:
            return [f"data.num_lanes: {lanes} does not divide data.global_batch_size {batch}"]
        for workers in (low, high):
            if lanes % workers:
                fitting = math.lcm(low, high)
                mend = "set data.num_lanes to" if batch % fitting == 0 else "make data.global_batch_size"
                return [
                    f"data.global_batch_size: {batch} in {lanes} lanes can't be shared by {workers} workers, of "
                    f"scaling.workers {self.scaling.workers}; {mend} a multiple of {fitting}"
                ]
            if micro and (batch // workers) % micro:
                return [
                    f"engine.micro_batch_size: {micro} does not divide the {batch // workers} rows that each of "
                    f"{workers} workers has of data.global_batch_size {batch}"
                ]
        return []


MOST_MISTAKES = 100  # that are listed

# Keys that may change when a run goes on: they decide where and how long it computes, not what.
CHANGEABLE = ("run.storage", "scaling", "checkpoint", "log", "evaluation",
              "engine.zero_stage", "engine.micro_batch_size",
              "engine.offload", "engine.compile", "engine.partition_group", "data.url", "data.prefetch_batches",
              "data.cache_dir", "data.cache_bytes",
              "data.on_error", "data.quarantine_budget", "duration")  # fmt: skip


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The validated config of a YAML file (or a plain dict) with `section.key=value` overrides applied.

    Raises one UserError that lists every mistake, a line each.
    """
    name = "config" if isinstance(source, dict) else str(source)
    try:
        raw = _with_default_kinds(override(read_yaml(source), overrides))
    except RecursionError:
        raise UserError(f"{name}: nested too deeply, or within itself: not a config") from None
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise explained(error, Config, name) from None


def explained(error: ValidationError, root: type[BaseModel], name: str) -> UserError:
    """What pydantic found wrong with a `root` read from `name`, a line for each mistake."""
    return refusal(
        name, [line for one in error.errors(include_url=False) for line in _describe(one, root).splitlines()]
    )


def refusal(name: str, mistakes: Sequence[str]) -> UserError:
    """The error of what was read from `name`, a line for each mistake."""
    head = f"{name}: {len(mistakes)} mistakes\n  " if len(mistakes) > 1 else f"{name}: "
    more = [f"... and {len(mistakes) - MOST_MISTAKES:,} more"] if len(mistakes) > MOST_MISTAKES else []
    return UserError(head + "\n  ".join([*mistakes[:MOST_MISTAKES], *more]))


def dump_config(config: Config) -> str:
    """The whole config as YAML, every default written out; `load_config` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys that differ and that a run may not change while it goes on, each with both values."""
    old_values, new_values = dict(leaves(old.model_dump())), dict(leaves(new.model_dump()))
    keys = [key for key in sorted(old_values.keys() | new_values.keys()) if old_values.get(key) != new_values.get(key)]
    changeable = tuple(key for key in CHANGEABLE if key != "duration" or new.optimizer.schedule != "cosine")
    return [
        f"{key}: {old_values.get(key)} there, {new_values.get(key)} here"
        for key in keys
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in changeable)
    ]


def read_yaml(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The mapping in a YAML file, here or in S3 (or a plain dict, as it is). Raises UserError, StorageError."""
    if isinstance(source, dict):
        return source
    remote = re.fullmatch(r"s3:/+(.+)/([^/]+)", str(source))  # a Path has one slash there
    try:
        if remote:
            data = open_store(f"s3://{remote[1]}").get(remote[2])
        else:
            with Path(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotFound):
        raise UserError(f"{source}: no such config file") from None
    except OSError as error:
        raise UserError(f"{source}: can't be read: {error}") from None
    return parse_sections(data, str(source))


def parse_sections(data: bytes, name: str) -> dict[str, Any]:
    """The mapping that the bytes of a config hold. Raises UserError, which begins with `name`."""
    raw = parse_yaml(data, name)
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"{name}: a config is a mapping of sections, this is {kind}")
    return raw


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each dotted override set; a new `kind` starts its section anew, as the old keys mean nothing to it.

    Of two overrides of one key the last holds, as of two options of a command line. Raises UserError.
    """
    raw = copied(raw)
    for given in sorted(overrides, key=lambda text: kinds_first(text.partition("=")[0])):
        key, equals, text = given.partition("=")
        name = f"'{shortened(given)}'"
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,31}", key):
            raise UserError(f"{name} is not an override; write section.key=value, e.g. optimizer.learning_rate=1e-4")
        set_key(raw, key, parse_value(text, name), name)
    return raw


def kinds_first(key: str) -> tuple[bool, int]:
    """Sorts dotted keys: an outer kind, which starts its section anew, before an inner one, and all before the rest."""
    kind = key.rpartition(".")[2] == "kind"
    return not kind, key.count(".") if kind else 0


def set_key(raw: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Sets a dotted key of nested sections, in place; a new `kind` starts its section anew, as old keys mean nothing
    to it. Raises UserError, which begins with `name`, where a part of the key is no section."""
    *path, leaf = key.split(".")
    section = raw
    for part in path:
        child = section.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"{name}: {part} is {shortened(repr(child))}, not a section")
        section = child
    if leaf == "kind" and section.get("kind", value) != value:
        section.clear()
    section[leaf] = value


def _with_default_kinds(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the default `kind` wherever a section that has one leaves it out."""

    def fill(section: Any, annotation: Any, default: Any) -> Any:
        if isinstance(section, dict):
            if hasattr(default, "kind"):
                section.setdefault("kind", default.kind)
            members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
            chosen = next((one for one in map(_plain, members) if _kind_of(one) in (None, section.get("kind"))), None)
            for key, inner in _fields_of(chosen).items():
                if key in section:
                    section[key] = fill(section[key], _plain(inner), _default_of(chosen, key))
        return section

    return fill(copied(raw), Config, None)  # type: ignore[no-any-return]


def copied(value: Any) -> Any:
    """Nested sections as ones of their own; the values in them are shared."""
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _describe(mistake: Any, root: Any) -> str:
    """One line for one pydantic error: dotted key, value, what is accepted."""
    key, _ = _walk(mistake["loc"], root)
    kind, value = mistake["type"], mistake.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        _, section = _walk(mistake["loc"][:-1], root)
        return f"{shortened(key)}: unknown key; {nearest(key.rpartition('.')[2], _fields_of(section))}"
    if kind in ("missing", "missing_argument"):
        return f"{key}: missing"
    if kind == "union_tag_invalid":
        expected = [tag.strip(" '") for tag in mistake["ctx"]["expected_tags"].split(",")]
        tag = str(mistake["ctx"]["tag"])
        return f"{key}.kind: unknown '{shortened(tag)}'; {nearest(tag, expected)}"
    if kind == "value_error":
        message = str(mistake["ctx"]["error"])
        return message if not key or message.startswith(key.split(".")[0]) else f"{key}: {message}"
    shown = "a section" if isinstance(value, dict) else shortened(repr(value))
    accepted = mistake["msg"].removeprefix("Input should be ")
    accepted = "a whole number that 64 bits hold" if kind == "int_parsing_size" else accepted
    mend = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"{key}: {shown} is not accepted; it should be {accepted}{mend}"


def _walk(location: tuple[Any, ...], root: Any) -> tuple[str, Any]:
    """Dotted key of a pydantic error location, without the union tags in it, and the type that lies there."""
    parts: list[str] = []
    here: Any = root
    for part in location:
        members = [_plain(member) for member in typing.get_args(here)] if _is_union(here) else []
        tagged = [member for member in members if _kind_of(member) == part]
        if tagged:
            here = tagged[0]
            continue
        parts.append(str(part))
        values = typing.get_args(here)[1] if typing.get_origin(here) is dict else _fields_of(here).get(part)
        here = _plain(values)
    return ".".join(parts), here


def _plain(annotation: Any) -> Any:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _kind_of(annotation: Any) -> str | None:
    kind = _fields_of(annotation).get("kind")
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Literal else None


def _default_of(annotation: Any, key: str) -> Any:
    """What a section's key is where nothing is given; of a key that must be given, nothing that means anything."""
    if issubclass(annotation, BaseModel):
        return next(field for name, field in annotation.model_fields.items() if key in (field.alias, name)).default
    return next(field.default for field in dataclasses.fields(annotation) if field.name == key)


def _fields_of(annotation: Any) -> dict[str, Any]:
    """Names and types of the keys of a section."""
    if not isinstance(annotation, type):
        return {}
    if issubclass(annotation, BaseModel):
        return {field.alias or name: _plain(field.annotation) for name, field in annotation.model_fields.items()}
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return {field.name: hints[field.name] for field in dataclasses.fields(annotation) if field.init}
    return {}
