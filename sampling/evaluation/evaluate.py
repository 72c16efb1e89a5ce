"""An evaluation from its settings to its record: plan, chunks, sums, a page. Interrupted, it goes on where it was.

    <out>/<images seen>-<hash>/record.json      written last: every number with all that changes it
    <out>/<images seen>-<hash>/report.html      the same for people, with pictures
    <out>/<images seen>-<hash>/<stage>/*.npz    chunks that are done, removed once the record is stored
    <out>/cache/                                extractors and the reference's features and moments, by hash

What computes the chunks is a parameter: `in_process` does it here, `cluster/verbs/evaluate.py` on Ray actors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from scoreray.data.errors import DataError
from scoreray.sampling.evaluation.loaded import fixed_threads
from scoreray.sampling.evaluation.page import page
from scoreray.sampling.evaluation.prepare import Run, load_inputs, make_plan, needs_training, train_extractor
from scoreray.sampling.evaluation.stages import STAGES, run_chunk, stages_of, stored_chunks
from scoreray.sampling.metrics.compute import compute_metrics
from scoreray.sampling.metrics.plan import Chunk, EvaluationInputs, EvaluationPlan, EvaluationSettings
from scoreray.sampling.metrics.record import EvaluationRecord, MetricValue, as_text, read_record
from scoreray.sampling.metrics.registry import in_order

RECORD, PAGE = "record.json", "report.html"
AT_ONCE = 2  # chunks of a process: one computes, another one reads or stores

Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""(name, total, unit) of a stage -> what takes the numbers that are done."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its record and where it is stored."""

    record: EvaluationRecord
    url: str
    report: str

    def answer(self) -> dict[str, Any]:
        return {"url": self.url, "report": self.report, **json.loads(self.record.to_json())}

    def text(self) -> str:
        subject, metrics = self.record.subject.checkpoint, self.record.metrics
        lines = [f"{subject.url} (EMA {subject.ema}, {subject.images_seen:,} images)"]
        width = max(5, *map(len, metrics))
        lines += [f"  {name:{width}} {described(metrics[name])}" for name in in_order(metrics)]
        lines += [f"  note: {warning}" for warning in self.record.warnings]
        return "\n".join([*lines, f"record {self.url}", f"report {self.report}"])


def described(found: MetricValue) -> str:
    """A metric's value and 95% interval as a person reads them, and what belongs to it."""
    text = as_text(found.value)
    if found.interval_text:
        text += f"  ({found.interval_text})"
    if found.channels_text:
        text += f"  {found.channels_text}"
    if found.get("fid_infinity") is not None:
        text += f"  at infinite count {found.get('fid_infinity'):.5g}"
    if found.get("recall") is not None:
        precision, recall = (as_text(found.get(name)["value"], ".3f") for name in ("precision", "recall"))
        text = f"precision {precision}, recall {recall}"
    for key, spec in (("scores", ".3f"), ("parts", ".4g")):
        for name, one in (found.get(key) or {}).items():
            text += f", {name} {as_text(one['value'], spec)}"
    if found.get("bits_per_dim") is not None:
        text += f"  {as_text(found.get('bits_per_dim')['value'], '.4g')} bits per dimension at most"
    if found.get("ks_p_value") is not None:
        text += f"  KS {as_text(found.get('ks'), '.3g')}, p = {as_text(found.get('ks_p_value'), '.3g')}"
    if found.get("p_value") is not None:
        text += f"  p {found.get('p_value'):.3g}"
    if found.get("nfe") is not None:
        text += f"  {found.get('nfe'):.0f} evaluations"
    return text


def in_process(function: Callable[..., int], arguments: Sequence[tuple[Any, ...]], done: Callable[[int], None]) -> None:
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


def evaluate(inputs: EvaluationInputs | EvaluationSettings, *, run: Run = in_process, bar: Bar = silent) -> Evaluation:
    """Evaluate a checkpoint, or find that the same evaluation is done. Raises ScorerayErrors, one line each.

    inputs: what `load_inputs` has loaded, or settings to load. What is wrong with them is found before anything is
    computed.
    """
    if isinstance(inputs, EvaluationSettings):
        inputs = load_inputs(inputs)
    if needs_training(inputs):
        with bar("train classifier", inputs.settings.classifier_images, "images") as done:
            inputs = train_extractor(inputs, run, done)
    plan = make_plan(inputs)
    finished = find_finished(plan)
    if finished is not None:
        return finished
    plan.store.check_writable()
    for stage in stages_of(plan):
        chunks = STAGES[stage].chunks(stage, inputs)
        left = missing(plan, stage, chunks)
        with bar(stage, sum(chunk.size for chunk in chunks), "samples") as done:
            done(sum(chunk.size for chunk in chunks) - sum(chunk.size for chunk in left))
            run(run_chunk, [(plan, chunk) for chunk in left], done)
    with bar("metrics", 1, "record") as done:
        run(finish, [(plan,)], done)
    finished = find_finished(plan)
    assert finished is not None
    return finished


def missing(plan: EvaluationPlan, stage: str, chunks: list[Chunk]) -> list[Chunk]:
    """The chunks of a stage that are not stored yet."""
    stored = {key for key, _ in plan.folder(stage).list(f"{stage}/")}
    return [chunk for chunk in chunks if chunk.key not in stored]


def find_finished(plan: EvaluationPlan) -> Evaluation | None:
    """The evaluation if its record is stored with every metric of the plan: some share all that their numbers depend
    on, so another choice of them has the same place. Raises DataError where it is damaged."""
    store = plan.store
    if not store.exists(RECORD):
        return None
    try:
        found = read_record(store.url(RECORD))
    except DataError as error:
        raise DataError(f"{error}; remove that file, and the same command evaluates again") from None
    if not set(plan.metrics) <= set(found.metrics):
        return None
    return Evaluation(found, store.url(RECORD), store.url(PAGE))


def finish(plan: EvaluationPlan) -> int:
    """Metrics of chunks that are all stored, the page, and last the record; then the chunks are removed."""
    stored = stored_chunks(plan)
    with fixed_threads(plan.inputs.settings.threads):
        results, warnings = compute_metrics(stored)
    metrics = {name: result.value() for name, result in results.items()}
    record = EvaluationRecord(**dict(plan.head), metrics=metrics, warnings=warnings)
    data = record.to_json()
    plan.store.put(PAGE, page(EvaluationRecord.from_json(data, RECORD), stored, results).encode())
    plan.store.put(RECORD, data)
    plan.store.delete([key for key, _ in plan.store.list() if key.endswith(".npz")])
    return 1
