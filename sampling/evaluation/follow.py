"""Beside a run: every newly committed checkpoint is handed to functions that measure it or draw from it.

    <run>/evaluations/metrics/000000020480.json     what they found, by images seen
    <run>/evaluations/sheets/000000020480.png       samples of that checkpoint
    <run>/tensorboard/evaluation/                   the same for TensorBoard
    <run>/evaluations/failed/000000020480.txt       what went wrong, in one line a function

It reads committed checkpoints and nothing else of the run, so the run never waits for it, and its failure is never the
run's.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import ScorerayError, StorageError, UserError
from scoreray.data.fields.description import DataDescription
from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import to_uint8
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import Store
from scoreray.sampling.evaluation.evaluate import described, evaluate
from scoreray.sampling.evaluation.loaded import fixed_threads
from scoreray.sampling.evaluation.prepare import choose_extractor, choose_metrics
from scoreray.sampling.metrics.plan import FOLDER, EvaluationSettings
from scoreray.sampling.metrics.registry import check_names, checked_options
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import load_model
from scoreray.sampling.offline.generate import generate, png_of_sheet
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.monitoring.tensorboard import Point, events_file
from scoreray.trainer.run_folder import run_store

EVENTS = "tensorboard/evaluation/events.out.tfevents"
METRICS, SHEETS, FAILED = f"{FOLDER}/metrics", f"{FOLDER}/sheets", f"{FOLDER}/failed"
POLL_S = 2.0
LOWEST = 19  # of the scheduler's niceness: a core that training wants is training's

Values = dict[str, Any]
Function = Callable[[Config, Checkpoint], Values]


def follow(
    config: Config,
    stop: Callable[[], bool],
    note: Callable[[str], None] = lambda line: None,
    *,
    functions: Sequence[Function] | None = None,
) -> int:
    """Call the functions that `config.evaluation` asks for with each new checkpoint, until `stop`, and then once more
    for the last one. Where several were committed meanwhile, only the newest counts. Returns how many it took.

    What a function raises is noted and stored, and the next checkpoint is taken as if nothing had happened.
    """
    functions = chosen(config) if functions is None else functions
    run, taken = run_store(config), 0
    names = (re.search(r"(\d{12,})\.json$", key) for key, _ in run.list(METRICS + "/"))
    last = max((int(name[1]) for name in names if name), default=0)
    while functions:
        ending = stop()
        checkpoint = _newest(run, note)
        if checkpoint is not None and _due(config, checkpoint, last, ending):
            last, taken = checkpoint.images_seen, taken + 1
            _take(config, run, checkpoint, functions, note)
        elif ending:
            break
        else:
            time.sleep(POLL_S)
    return taken


def chosen(config: Config) -> list[Function]:
    """The functions that a config asks for."""
    wanted = {measure: bool(config.evaluation.metrics), draw_sheet: config.evaluation.sheet > 0}
    return [function for function, is_wanted in wanted.items() if is_wanted]


def check_evaluation(config: Config, data: DataDescription) -> None:
    """Whether the functions will find what they need: the reference is there and fits `data`, the training set, and so
    do metrics, extractor and sampler. Raises ScorerayErrors that name the section, before a run begins."""
    section = config.evaluation
    info = ModelInfo.planned(config, run_fields(config.data, data, config.autoencoder))
    try:
        reference = data if section.reference is None else Manifest.at(section.reference)
        if section.metrics and isinstance(reference, BucketedSet):
            raise UserError(f"missing, and data.url is in buckets; give one of them, {reference.bucket_url(0)}")
    except ScorerayError as error:
        raise type(error)(f"evaluation.reference: {error}") from None
    drawn = data.shape if info.encoding is None else list(info.sample_shape)
    info = info.at_shape(reference.shape)
    if section.reference is not None and reference.shape not in (drawn, list(info.sample_shape)):
        raise UserError(
            f"evaluation.reference: {section.reference} has samples of shape {reference.shape}, the data set that is "
            f"trained on {drawn}"
        )
    try:
        settings = settings_of(config, "")
        check_names(settings.metrics)
        settings.request().fitted(info)
        if section.metrics or section.sheet:
            info.check_decodes()
        if section.metrics:
            if not isinstance(reference, Manifest):
                raise UserError("reference: missing, and data.url has no manifest; give a packed data set")
            extractor = choose_extractor(settings, reference, None)
            chosen = choose_metrics(settings.metrics, info, reference, extractor, settings.restoration)
            checked_options(settings.metric_options, chosen)
        if section.sheet:
            _check_pictures(info.sample_shape)
    except ScorerayError as error:
        raise type(error)(f"evaluation: {error}") from None


def _check_pictures(shape: Sequence[int]) -> None:
    if not is_picture(shape):
        raise UserError(f"evaluation.sheet: samples of shape {list(shape)} are no pictures")


def settings_of(config: Config, checkpoint_url: str) -> EvaluationSettings:
    """The evaluation of a checkpoint that a config asks for."""
    section = config.evaluation
    return EvaluationSettings(
        checkpoint=checkpoint_url,
        reference=section.reference or str(config.data.url),
        metrics=tuple(section.metrics),
        metric_options=section.metric_options,
        out=run_store(config).url(FOLDER),
        extractor=section.extractor,
        count=section.count,
        reference_count=section.reference_count,
        sampler=section.sampler,
        steps=section.steps,
        grid=section.grid,
        max_calls=section.max_calls,
        guidance=section.guidance,
        batch_size=section.batch_size,
    )


def measure(config: Config, checkpoint: Checkpoint) -> Values:
    """The metrics of the config, each as {name: value, name_error: its standard error}, and the record's URL."""
    done = evaluate(settings_of(config, checkpoint.url))
    found: Values = {"record": done.url}
    for name, metric in done.record.metrics.items():
        found[name] = metric.value
        found[f"{name}_error"] = metric.std_error
        found[f"{name}_text"] = described(metric)
    return found


def draw_sheet(config: Config, checkpoint: Checkpoint) -> Values:
    """A sheet of samples, the same seeds for every checkpoint: what a person looks at while a run goes on."""
    section = config.evaluation
    request = settings_of(config, checkpoint.url).request()
    request = replace(request, count=section.sheet, batch_size=min(section.batch_size, section.sheet))
    with fixed_threads(1):
        model = load_model(checkpoint.url, device="cpu")
        samples = model.info.latents_decoded(torch.cat([x for x, _ in generate(model, request)]))
    _check_pictures(samples.shape[1:])
    run, key = run_store(config), f"{SHEETS}/{checkpoint.images_seen:012d}.png"
    run.put(key, png_of_sheet(to_uint8(samples)))
    return {"sheet": run.url(key)}


def give_way() -> None:
    """Puts this process last in the queue for a core."""
    os.nice(LOWEST)


def _events(found: Values) -> bytes:
    """A TensorBoard file of the metrics of one checkpoint; steps are images seen."""
    scalars = {f"evaluation/{name}": value for name, value in found.items() if isinstance(value, float)}
    return events_file([Point(found["images"], time.time(), scalars)])


def _newest(run: Store, note: Callable[[str], None]) -> Checkpoint | None:
    try:
        return latest(run)
    except ScorerayError as error:  # a store that does not answer now may later
        note(f"evaluation: {error}")
        time.sleep(POLL_S)
        return None


def _due(config: Config, checkpoint: Checkpoint, last: int, ending: bool) -> bool:
    every = config.evaluation.every_images
    if checkpoint.images_seen <= last:
        return False
    return ending or not every or checkpoint.images_seen // every > last // every


def _take(
    config: Config, run: Store, checkpoint: Checkpoint, functions: Sequence[Function], note: Callable[[str], None]
) -> None:
    found: Values = {"images": checkpoint.images_seen}
    mistakes = []
    for function in functions:
        try:
            found |= function(config, checkpoint)
        except Exception as error:  # whatever it is, the run is not to end of it
            mistakes.append(f"{function.__name__}: {type(error).__name__}: {' '.join(str(error).split())}")
    texts = [f"{name[:-5]} {found.pop(name)}" for name in list(found) if name.endswith("_text")]
    name = f"{checkpoint.images_seen:012d}"
    try:
        run.put(f"{METRICS}/{name}.json", json.dumps(found).encode())
        if config.log.tensorboard:
            run.put(f"{EVENTS}.{name}", _events(found))
        if mistakes:
            run.put(f"{FAILED}/{name}.txt", "\n".join(mistakes).encode())
    except StorageError as error:
        mistakes.append(str(error))
    if texts:
        note(f"evaluation at {checkpoint.images_seen:,} images: {'; '.join(texts)}")
    for line in mistakes:
        note(f"evaluation at {checkpoint.images_seen:,} images failed: {line}")
