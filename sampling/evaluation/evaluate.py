"""An evaluation from its settings to its record: plan, chunks, sums, a page. Interrupted, it goes on where it was.

    <out>/<images seen>-<hash>/record.json      written last: every number with all that changes it
    <out>/<images seen>-<hash>/report.html      the same for people, with pictures
    <out>/<images seen>-<hash>/<stage>/*.npz    chunks that are done, removed once the record is there
    <out>/cache/                                extractors and the reference's features and moments, by hash

Who computes is a parameter: `here` does it in this process, `cluster/verbs/evaluate.py` on Ray actors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from scoreray.data.errors import DataError
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import Samples, spread
from scoreray.data.storage.store import Store, open_store
from scoreray.sampling.evaluation import quality, record
from scoreray.sampling.evaluation.page import page
from scoreray.sampling.evaluation.plan import (
    FOLDER,
    PAGE,
    RECORD,
    EvaluationPlan,
    EvaluationSettings,
    Task,
    make_plan,
    run_of,
)
from scoreray.sampling.evaluation.protocol import choose_metrics
from scoreray.sampling.evaluation.tasks import fixed_threads, run_task
from scoreray.sampling.measures import features
from scoreray.sampling.measures.classifier import ClassifierConfig, read_classifier, train_classifier
from scoreray.sampling.measures.features import ExtractorChoice
from scoreray.sampling.model.describe import describe

AT_ONCE = 2  # chunks of a process: one computes, another one reads or stores
CLASSIFIER_IMAGES = 10_000  # of the reference, at most, that a classifier is trained on

Run = Callable[[Callable[..., int], Sequence[tuple[Any, ...]], Callable[[int], None]], None]
"""Calls a function with each of the arguments, wherever and in whatever order, and tells what each call returned."""

Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""(name, total, unit) of a stage -> what takes the numbers that are done."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its record and where it lies."""

    record: dict[str, Any]
    url: str
    report: str

    def answer(self) -> dict[str, Any]:
        return {"url": self.url, "report": self.report, **self.record}

    def text(self) -> str:
        subject, metrics = self.record["subject"]["checkpoint"], self.record["metrics"]
        lines = [f"{subject['url']} (EMA {subject['ema']}, {subject['images_seen']:,} images)"]
        lines += [f"  {name:5} {described(metrics[name])}" for name in record.PROTOCOL if name in metrics]
        lines += [f"  note: {warning}" for warning in self.record["warnings"]]
        return "\n".join([*lines, f"record {self.url}", f"report {self.report}"])


def described(values: dict[str, Any]) -> str:
    """A metric's value and 95% interval as a person reads them, and what belongs to it."""
    text = record.as_text(values["value"])
    if between := record.interval_text(values):
        text += f"  ({between})"
    if values.get("fid_infinity") is not None:
        text += f"  at infinite count {values['fid_infinity']:.5g}"
    if "recall" in values:
        precision, recall = (record.as_text(values[name]["value"], ".3f") for name in ("precision", "recall"))
        text = f"precision {precision}, recall {recall}"
    if values.get("nfe") is not None:
        text += f"  {values['nfe']:.0f} evaluations"
    return text


def here(function: Callable[..., int], arguments: Sequence[tuple[Any, ...]], done: Callable[[int], None]) -> None:
    """In this process, AT_ONCE at a time: one reads or stores while another one computes."""
    with ThreadPoolExecutor(AT_ONCE, "scoreray-chunk") as threads:
        calls = [threads.submit(function, *each) for each in arguments]
        try:
            for call in as_completed(calls):
                done(call.result())
        except BaseException:
            threads.shutdown(cancel_futures=True)  # waits for those under way, as the block's end would
            raise


@contextlib.contextmanager
def silent(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that shows nothing."""
    yield lambda n: None


def evaluate(settings: EvaluationSettings, *, run: Run = here, bar: Bar = silent) -> Evaluation:
    """Evaluate a checkpoint, or find that the same evaluation is done. Raises ScorerayErrors, one line each.

    What is wrong with the settings is found before anything is computed.
    """
    extractor, accuracy = prepare(settings, run, bar)
    plan = make_plan(settings, extractor, accuracy)
    finished = find_finished(plan)
    if finished is not None:
        return finished
    plan.store.check_writable()
    for stage, tasks in plan.stages().items():
        left = missing(plan, stage, tasks)
        with bar(stage, sum(task.size for task in tasks), "samples") as done:
            done(sum(task.size for task in tasks) - sum(task.size for task in left))
            run(run_task, [(plan, task) for task in left], done)
    with bar("metrics", 1, "record") as done:
        run(finish, [(plan,)], done)
    finished = find_finished(plan)
    assert finished is not None
    return finished


def prepare(settings: EvaluationSettings, run: Run = here, bar: Bar = silent) -> tuple[ExtractorChoice, float | None]:
    """The extractor with its weights at hand, and a classifier's accuracy. Raises UserError for what does not fit."""
    info = describe(settings.checkpoint, settings.ema).info
    manifest = Manifest.load(open_store(settings.reference))
    cache = open_store(settings.cache or f"{settings.out or f'{run_of(info.url)}/{FOLDER}'}/cache")
    extractor = choose_extractor(settings, manifest, cache)
    choose_metrics(settings.metrics, info, manifest, extractor, settings.restoration)
    settings.request().labels(0, 1, info)
    if extractor.kind != "classifier":
        return extractor, None
    if not extractor.sha256:
        key = _classifier_key(settings)
        if not cache.exists(key):
            with bar("train classifier", settings.classifier_images, "images") as done:
                run(_train_extractor, [(settings, cache.url())], done)
        sha256 = json.loads(cache.get(key))["sha256"]
        extractor = ExtractorChoice("classifier", sha256, "classifier.safetensors")
    return extractor, read_classifier(extractor.file, cache.get(extractor.key))[1]


def choose_extractor(settings: EvaluationSettings, manifest: Manifest, cache: Store | None) -> ExtractorChoice:
    """The extractor of an evaluation against the data set of `manifest`; errors and `cache` as of `features.choose`."""
    looking = {metric for metric, parts in record.PROTOCOL.items() if "extractor" in parts}
    if settings.metrics and not looking & set(settings.metrics):
        return ExtractorChoice("identity")
    return features.choose(settings.extractor, manifest, cache)


def missing(plan: EvaluationPlan, stage: str, tasks: list[Task]) -> list[Task]:
    """The tasks of a stage whose chunks are not there yet."""
    there = {key for key, _ in plan.folder(stage).list(f"{stage}/")}
    return [task for task in tasks if task.key not in there]


def find_finished(plan: EvaluationPlan) -> Evaluation | None:
    """The evaluation if its record is there. Raises DataError where it is damaged."""
    store = plan.store
    if not store.exists(RECORD):
        return None
    try:
        found = record.read_record(store.url(RECORD))
    except DataError as error:
        raise DataError(f"{error}; remove that file, and the same command evaluates again") from None
    return Evaluation(found, store.url(RECORD), store.url(PAGE))


def finish(plan: EvaluationPlan) -> int:
    """Metrics of chunks that are all there, the page, and last the record; then the chunks are removed."""
    with fixed_threads(plan.settings.threads):
        metrics, work = quality.compute(plan)
    made = {"kind": record.KIND, "format": record.FORMAT, **plan.page, "metrics": metrics, "warnings": work.warnings}
    data = record.to_json(made)
    plan.store.put(PAGE, page(plan, json.loads(data), work).encode())
    plan.store.put(RECORD, data)
    plan.store.delete([key for key, _ in plan.store.list() if key.endswith(".npz")])
    return 1


def _classifier_config(manifest: Manifest, images: int) -> ClassifierConfig:
    return ClassifierConfig(manifest.shape[0], len(manifest.classes), images)


def _classifier_key(settings: EvaluationSettings) -> str:
    reference = Samples(settings.reference)
    config = _classifier_config(reference.manifest, settings.classifier_images)
    about = [reference.sha256, asdict(config), torch.__version__, settings.threads, CLASSIFIER_IMAGES]
    return f"extractors/classifier-{record.digest(about)}.json"


def _train_extractor(settings: EvaluationSettings, cache_url: str) -> int:
    """Trains the classifier of a reference set and leaves it in the cache under the hash of its weights."""
    reference, cache = Samples(settings.reference), open_store(cache_url)
    images, labels = _labelled(reference)
    with fixed_threads(settings.threads):
        config = _classifier_config(reference.manifest, settings.classifier_images)
        data = train_classifier(config, images, labels)
    sha256 = hashlib.sha256(data).hexdigest()
    choice = ExtractorChoice("classifier", sha256, "classifier.safetensors")
    cache.put(choice.key, data)
    _keep_first(cache, _classifier_key(settings), json.dumps({"sha256": sha256}).encode())
    return settings.classifier_images


def _keep_first(cache: Store, key: str, data: bytes) -> None:
    """Two evaluations may train the same one at once: all then take the first."""
    cache.put_new(key, data)


def _labelled(reference: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels to learn from, in an order that does not depend on how they were packed by class."""
    numbers = spread(CLASSIFIER_IMAGES, reference.manifest.num_samples)
    images, labels = reference.read(numbers)
    images, labels = images[labels >= 0], labels[labels >= 0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]
