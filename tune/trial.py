"""One trial: its record in the study's store, and a stretch of its training and measuring, wherever it is computed."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from scoreray.data.errors import DataError, ScorerayError, UserError, shortened
from scoreray.data.storage.store import Store, open_store
from scoreray.sampling.model.load import LoadedDenoiser, load_model
from scoreray.trainer.checkpoints.checkpoint import MARKER, Checkpoint, latest, verified_copy
from scoreray.trainer.config import Config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.run_folder import run_store
from scoreray.tune.metric import check_finite, measure
from scoreray.tune.space import Values
from scoreray.tune.sweep import StudyPlan, Sweep, draw_settings

TRIALS = "trials"
RUNS = "runs"
NOT_LEARNT = ("run", "scaling", "checkpoint", "log", "evaluation")


class Stopped(ScorerayError):
    """A stretch was asked to end before its target; what it had trained is committed."""


@dataclass
class Trial:
    """What is known of a trial; `<study>/trials/<number>.json` holds it.

    state: running, done, stopped (by the scheduler) or failed. run: name of the run that it trains, "" for none.
    reports: of each stretch, {images, metrics, curve, std_errors, seconds, seq, ...}; seq orders them over all trials.
    lineage: for population-based training, per exchange {images, source, values}; source None where it kept its own.
    """

    number: int
    values: Values
    run: str = ""
    state: str = "running"
    reports: list[dict[str, Any]] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    deaths: int = 0
    error: str = ""

    @property
    def images(self) -> int:
        return int(self.reports[-1]["images"]) if self.reports else 0

    @property
    def metrics(self) -> dict[str, float] | None:
        return self.reports[-1]["metrics"] if self.reports else None

    @property
    def key(self) -> str:
        return record_key(self.number)

    @property
    def has_exchanged(self) -> bool:
        """Whether its population has exchanged weights since its newest report."""
        return any(one["images"] == self.images for one in self.lineage)

    def save(self, study: Store) -> None:
        study.put(self.key, json.dumps(asdict(self)).encode())


def record_key(number: int) -> str:
    """Where a trial's record is stored, in its study."""
    return f"{TRIALS}/{number:05d}.json"


class _Report(BaseModel):
    model_config = ConfigDict(strict=True)
    images: int
    seq: int
    metrics: dict[str, float]
    curve: list[float]
    std_errors: list[float]
    checkpoint: str
    ema: str | None
    seconds: float
    run: str


class _Exchange(BaseModel):
    model_config = ConfigDict(strict=True)
    images: int
    source: int | None
    values: dict[str, Any]


class _Record(BaseModel):
    """What a trial's file must hold to be read as a Trial."""

    model_config = ConfigDict(strict=True, extra="forbid")
    number: int
    values: dict[str, Any]
    run: str
    state: Literal["running", "done", "stopped", "failed"]
    reports: list[_Report]
    lineage: list[_Exchange]
    deaths: int
    error: str


def read_trials(study: Store) -> list[Trial]:
    """Every trial of a study, by number. Raises DataError on a file that is not one."""
    names = [key for key, _ in study.list(f"{TRIALS}/") if re.fullmatch(rf"{TRIALS}/\d{{5,}}\.json", key)]
    numbers = sorted(int(key.rpartition("/")[2].removesuffix(".json")) for key in names)
    return [read_trial(study, number) for number in numbers]


def read_trial(study: Store, number: int) -> Trial:
    """A trial of a study. Raises DataError on a file that is not one, StorageError where there is none."""
    try:
        raw = json.loads(study.get(record_key(number)))
        _Record.model_validate(raw)
        trial = Trial(**raw)
        if trial.number != number:
            raise ValueError(f"it says number {trial.number}")
        if trial.state in ("done", "stopped") and not trial.reports:
            raise ValueError(f"it is {trial.state}, and has no reports")
        _fail_if_not_finite(trial)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        why = "missing" if first["type"] == "missing" else f"{shortened(repr(first['input']))} can't be"
        raise not_a_record(study, number, f"{where}: {why}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not even text
        raise not_a_record(study, number, " ".join(str(error).split())) from None
    return trial


def _fail_if_not_finite(trial: Trial) -> None:
    """A trial that an earlier version left without a finite metric has failed, as it would now."""
    for report in trial.reports:
        try:
            check_finite(report["metrics"])
        except UserError as error:
            trial.state, trial.error = "failed", trial.error or str(error)


def not_a_record(study: Store, number: int, why: str) -> DataError:
    """The error of a trial's file that can't be gone on from."""
    name = study.url(record_key(number))
    return DataError(
        f"{name}: not what a trial leaves: {why}; delete that file, and the same command runs trial {number} again"
    )


def run_name(config: Config) -> str:
    """A name made of everything that decides what is learnt: trials that agree in it share one run."""
    learnt = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_LEARNT}
    text = json.dumps([learnt, config.run.seed], sort_keys=True)
    return f"run-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def trial_config(plan: StudyPlan, values: Values, name: str = "") -> Config:
    """The config of a trial's run, under the study's folder. Raises UserError where the values do not go together."""
    config = plan.config(values)
    study = plan.sweep.study
    place = f"{study.storage.rstrip('/')}/{study.name}/{RUNS}"
    engine = config.engine
    if config.scaling.range[1] == 1:  # sharding has nothing to share out; one process needs no DeepSpeed
        engine = replace(engine, zero_stage=0, offload="none")
    run = config.run.model_copy(update={"name": name or run_name(config), "storage": place})
    none = config.evaluation.model_copy(update={"metrics": (), "sheet": 0})
    return config.model_copy(update={"engine": engine, "run": run, "evaluation": none})


def advance(
    config: Config | None,
    target: int,
    sweep: Sweep,
    values: Values,
    device: str = "cpu",
    watch: Callable[[TrainingProgress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train a run to `target` images, unless it is there already, and measure it: one report.

    config: None where the sweep draws from a checkpoint. stop: asked once a step. Raises ScorerayErrors.
    """
    started, first_step = time.time(), 0.0

    def seen(progress: TrainingProgress) -> None:
        nonlocal first_step
        first_step = first_step or time.time()
        watch(progress)

    if config is None:
        assert sweep.checkpoint is not None
        url, trained_s = sweep.checkpoint, 0.0
    else:
        train_to(config, target, device, seen, stop)
        checkpoint = latest(run_store(config))
        if checkpoint is None or checkpoint.images_seen < target:
            raise Stopped(f"stopped before {target:,} images")
        url, trained_s = checkpoint.url, time.time() - started
    drawn = draw_settings(sweep, values)
    length = drawn["ema"]
    model = load_model(url, None if length is None else str(length), device)
    if not isinstance(model, LoadedDenoiser):
        raise UserError(f"{url}: sweeps compare denoisers: {model.info.instead_of_denoiser}")
    place = f"{sweep.study.storage.rstrip('/')}/{sweep.study.name}"
    found = measure(model, url, sweep.metric, drawn, place)
    return {
        "images": model.info.images_seen if config is None else target,
        **found,
        "checkpoint": url,
        "ema": model.info.ema,
        "trained_s": trained_s,
        "started": started,
        "first_step": first_step,
        "seconds": time.time() - started,
    }


def train_to(
    config: Config, target: int, device: str, watch: Callable[[TrainingProgress], None], stop: Callable[[], bool]
) -> None:
    """Train until `target` images are seen and committed: in this process, or by Ray Train where there are workers.

    Where `stop` comes first, what has been trained by then is committed (in this process; workers just end).
    """
    checkpoint = latest(run_store(config))
    there = checkpoint.images_seen if checkpoint else 0
    if there >= target:
        return
    if config.scaling.range[1] > 1:
        from scoreray.trainer.on_ray.run import fit

        part = config.model_copy(update={"duration": config.duration.model_copy(update={"images": target})})
        fit(part, watch)
        return
    seen = there

    def requested() -> LoopRequest:  # once a step
        nonlocal seen
        seen += config.data.global_batch_size
        return LoopRequest.STOP if seen >= target or stop() else LoopRequest.NOTHING

    train(config, device=torch.device(device), watch=watch, requested=requested)


def copy_checkpoint(source: Checkpoint, run: Store) -> str:
    """A committed checkpoint into another run, each file verified on its way, the marker last; returns its folder."""
    for name, about in source.marker.files.items():
        with verified_copy(source.store, f"{source.folder}/{name}", about) as path:
            run.put(f"{source.folder}/{name}", path)
    for key, _ in source.store.list(f"{source.folder}/"):
        name = key.rpartition("/")[2]
        if name not in source.marker.files and name != MARKER:
            run.put(key, source.store.get(key))
    run.put(f"{source.folder}/{MARKER}", source.store.get(f"{source.folder}/{MARKER}"))
    return source.folder


def study_store(sweep: Sweep) -> Store:
    """Everything that a study writes is stored under this."""
    return open_store(f"{sweep.study.storage.rstrip('/')}/{sweep.study.name}")
