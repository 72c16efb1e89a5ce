"""From an evaluation's settings to its plan: what it reads is loaded once and checked before anything is computed."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from scoreray.data.errors import UserError
from scoreray.data.own_code import code_hash, is_own, load, name_in_command
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader, spread
from scoreray.data.storage.store import Store
from scoreray.sampling.evaluation.loaded import fixed_threads, load_extractor
from scoreray.sampling.evaluation.sample_chunks import reconstructs
from scoreray.sampling.evaluation.stages import STAGES
from scoreray.sampling.guidance.operators import restoration_task
from scoreray.sampling.measures import features, frechet
from scoreray.sampling.measures.classifier import ClassifierConfig, TrainedClassifier, train_classifier
from scoreray.sampling.measures.features import ExtractorChoice
from scoreray.sampling.measures.scorer import load_scorer
from scoreray.sampling.metrics.plan import VERSION, EvaluationInputs, EvaluationPlan, EvaluationSettings
from scoreray.sampling.metrics.record import (
    EvaluatedCheckpoint,
    EvaluationSubject,
    Numerics,
    RecordHead,
    SamplingSettings,
    digest,
)
from scoreray.sampling.metrics.registry import METRICS, check_names, checked_options, in_order, metric_of
from scoreray.sampling.model.describe import ModelInfo, describe

CLASSIFIER_IMAGES = 10_000  # of the reference, at most, that a classifier is trained on

Run = Callable[[Callable[..., int], Sequence[tuple[Any, ...]], Callable[[int], None]], None]
"""Calls a function with each of the arguments, wherever and in whatever order, and reports what each call returned."""


def load_inputs(settings: EvaluationSettings) -> EvaluationInputs:
    """Everything that an evaluation reads but samples and weights. Raises UserError for what does not fit together."""
    check_names(settings.metrics)
    name_in_command([*settings.metrics, settings.metric_options, settings.scorer, settings.extractor, settings.sampler])
    for name in filter(is_own, settings.metrics):
        load(name, "--metrics")
    model, reference = describe(settings.checkpoint, settings.ema), SampleReader(settings.reference)
    model = replace(model, info=model.info.at_shape(reference.manifest.shape))
    inputs = EvaluationInputs(settings, model, reference, ExtractorChoice("identity"))
    extractor = choose_extractor(settings, reference.manifest, inputs.cache)
    chosen = choose_metrics(settings.metrics, model.info, reference.manifest, extractor, settings.restoration)
    settings = replace(settings, metric_options=checked_options(settings.metric_options, chosen))
    model.info.check_decodes()
    settings.code_options().check_fits(model.info, "--codes")
    inputs.request.labels(0, 1, model.info)
    if "match" in settings.metrics:
        load_scorer(settings.scorer)
    inputs = replace(inputs, settings=settings, extractor=extractor)
    return _with_classifier(inputs) if needs_training(inputs) else _with_accuracy(inputs)


def needs_training(inputs: EvaluationInputs) -> bool:
    """Whether the extractor is a classifier that is not in the cache yet."""
    return inputs.extractor.kind == "classifier" and not inputs.extractor.sha256


def train_extractor(inputs: EvaluationInputs, run: Run, done: Callable[[int], None]) -> EvaluationInputs:
    """The inputs with the classifier that they need, trained by `run` and left in the cache."""
    run(train_into_cache, [(inputs,)], done)
    return _with_classifier(inputs)


def choose_extractor(settings: EvaluationSettings, manifest: Manifest, cache: Store | None) -> ExtractorChoice:
    """The extractor of an evaluation against the data set of `manifest`; errors and `cache` as of `features.choose`."""
    if settings.metrics and not any("extractor" in metric_of(name).needs for name in settings.metrics):
        return ExtractorChoice("identity")
    return features.choose(settings.extractor, manifest, cache)


def choose_metrics(
    wanted: tuple[str, ...], info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice, task: str
) -> tuple[str, ...]:
    """The metrics to compute, in the record's order. Raises UserError, a line for each that does not fit.

    task: of restoration, where psnr or ssim are wanted.
    """
    check_names(wanted)
    if tuple(manifest.shape) != info.sample_shape:
        fix = "" if info.encoding is None else f"; give one of '{info.encoding.of}', which its latents were made of"
        raise UserError(
            f"--reference: samples of shape {list(manifest.shape)}, the model draws {list(info.sample_shape)}{fix}"
        )
    reasons = {name: metric_of(name).unfit(info, manifest, extractor) for name in (*METRICS, *wanted)}
    mistakes = [f"metric {name} does not fit: {reasons[name]}" for name in wanted if reasons[name]]
    if mistakes:
        raise UserError("\n".join(mistakes))
    if not reconstructs(info, task) and any("restoration" in metric_of(name).needs for name in wanted):
        restoration_task(task, info.image_shape)
    fitting = [name for name in METRICS if not reasons[name]]
    cheap = [name for name in fitting if METRICS[name].is_default(info)]
    chosen = in_order(wanted or cheap)
    for name in chosen:
        metric_of(name).check_packages(name)
    of_sets = [name for name in chosen if metric_of(name).compares_sets]
    if of_sets and manifest.num_samples < frechet.FEWEST:
        raise UserError(
            f"--reference: '{manifest.name}' has {manifest.num_samples} samples, and {', '.join(of_sets)} compare sets "
            f"of at least {frechet.FEWEST}; give a larger one, or other --metrics"
        )
    return chosen


def make_plan(inputs: EvaluationInputs) -> EvaluationPlan:
    """The plan of inputs whose extractor's weights are known."""
    settings, info, model, request = inputs.settings, inputs.info, inputs.model, inputs.request
    metrics = choose_metrics(settings.metrics, info, inputs.manifest, inputs.extractor, settings.restoration)
    head = RecordHead(
        subject=EvaluationSubject(
            checkpoint=EvaluatedCheckpoint(
                url=info.url, sha256=model.sha256, images_seen=info.images_seen, ema=info.ema
            ),
            sampling=SamplingSettings(
                sampler=request.sampler,
                steps=request.steps,
                grid=request.grid if request.grid is None or isinstance(request.grid, str) else list(request.grid),
                sigma_range=list(info.sigma_range),
                seed=request.seed,
                guidance=settings.guidance,
                options=request.options,
                grid_checkpoint=request.grid_checkpoint,
            ),
        ),
        protocol=_protocol(inputs, metrics),
        numerics=Numerics(device=settings.device, threads=settings.threads, batch_size=settings.batch_size),
        versions={name: version(name) for name in ("scoreray", "torch", "numpy")}
        | {"python": platform.python_version()},
    )
    return EvaluationPlan(inputs, metrics, head)


def _protocol(inputs: EvaluationInputs, metrics: tuple[str, ...]) -> dict[str, Any]:
    """How it is measured, part by part; of the parts that no chosen metric depends on, none."""
    found: dict[str, Any] = {"version": VERSION}
    for name in metrics:
        metric = metric_of(name)
        found |= {} if metric.protocol is None else {name: metric.protocol(inputs)}
        if options := dict(inputs.settings.metric_options.get(name, {})):
            codes = {value: code_hash(value) for value in options.values() if is_own(value)}
            found[name] = found.get(name, {}) | options | ({"code": codes} if codes else {})
        found |= {part: STAGES[part].protocol(inputs) for part in metric.needs if part in STAGES}
        if "extractor" in metric.needs:
            found["extractor"] = {"kind": inputs.extractor.kind, "sha256": inputs.extractor.sha256}
            if inputs.accuracy is not None:
                found["extractor"]["accuracy"] = inputs.accuracy
    return found


def _classifier_config(inputs: EvaluationInputs) -> ClassifierConfig:
    manifest = inputs.manifest
    return ClassifierConfig(manifest.shape[0], len(manifest.classes), inputs.settings.classifier_images)


def _classifier_key(inputs: EvaluationInputs) -> str:
    about = [inputs.reference.sha256, asdict(_classifier_config(inputs)), torch.__version__, inputs.settings.threads,
             CLASSIFIER_IMAGES]  # fmt: skip
    return f"extractors/classifier-{digest(about)}.json"


def _with_classifier(inputs: EvaluationInputs) -> EvaluationInputs:
    """The inputs with their classifier if it is in the cache, else as they are."""
    key = _classifier_key(inputs)
    if not inputs.cache.exists(key):
        return inputs
    trained = TrainedClassifier.from_json(inputs.cache.get(key), inputs.cache.url(key))
    choice = ExtractorChoice("classifier", trained.sha256, "classifier.safetensors")
    return _with_accuracy(replace(inputs, extractor=choice))


def _with_accuracy(inputs: EvaluationInputs) -> EvaluationInputs:
    if inputs.extractor.kind != "classifier":
        return inputs
    return replace(inputs, accuracy=getattr(load_extractor(inputs), "accuracy", None))


def train_into_cache(inputs: EvaluationInputs) -> int:
    """Trains the classifier of a reference set and leaves it in the cache under the hash of its weights.

    Of two evaluations that train the same one at once both then take the first.
    """
    images, labels = _labelled(inputs.reference)
    with fixed_threads(inputs.settings.threads):
        data = train_classifier(_classifier_config(inputs), images, labels)
    trained = TrainedClassifier(hashlib.sha256(data).hexdigest())
    inputs.cache.put(ExtractorChoice("classifier", trained.sha256, "classifier.safetensors").key, data)
    inputs.cache.put_new(_classifier_key(inputs), trained.to_json())
    return inputs.settings.classifier_images


def _labelled(reference: SampleReader) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels to learn from, in an order that does not depend on how they were packed by class."""
    numbers = spread(CLASSIFIER_IMAGES, reference.manifest.num_samples)
    images, labels = reference.read(numbers)
    images, labels = images[labels >= 0], labels[labels >= 0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]
