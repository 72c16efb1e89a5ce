"""README.md of an exported model, a model card: what it draws, its data, training, metrics with their conditions.

Only what is known is on it: what the checkpoint and its run hold, and the data set's manifest where it can be read and
is the one that was trained on. Names out of data are written as code, on one line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from scoreray.data.errors import ScorerayError, UserError, shortened
from scoreray.data.pages import render
from scoreray.data.storage.store import open_store
from scoreray.data.unpacked.tars import UnpackedTars
from scoreray.data.yaml_text import dump_yaml
from scoreray.sampling.evaluation.page import MetricRow, how_measured, metric_rows
from scoreray.sampling.formats.usage import Usage
from scoreray.sampling.metrics.plan import FOLDER, run_of
from scoreray.sampling.metrics.record import EvaluationRecord, read_record
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.checkpoints.stored_model import find_model
from scoreray.trainer.config import Config, dump_config
from scoreray.trainer.networks.network import build_network, num_parameters
from scoreray.trainer.run_data import RunData, open_run_data

CARD, SHEET = "README.md", "samples.png"
MOST_CLASSES = 20  # that are named on a card
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,79}")
UNKNOWN = "not known"


@dataclass(frozen=True)
class Fact:
    """A line of a table."""

    what: str
    value: str


@dataclass(frozen=True)
class CardEvaluation:
    """What an evaluation in the run found of the weights at one EMA length, and how."""

    ema: str
    how: str
    rows: list[MetricRow]
    warnings: list[str]


def check_licence(licence: str) -> None:
    """Raises UserError for what can't be the name of a licence."""
    if licence and not LICENCE.fullmatch(licence):
        raise UserError(f"--licence {shortened(licence)}: give a licence's identifier, such as apache-2.0 or cc-by-4.0")


def model_card(page: ModelManifest, info: ModelInfo, usage: Usage, licence: str = "", samples: str = "") -> str:
    """The card. page: what was exported, with its files. samples: what the sheet beside it shows; "" for no sheet."""
    config, checkpoint = info.config, _checkpoint_of(page)
    kind = "text-to-image" if "text" in _kinds(info) else "unconditional-image-generation"
    front = {
        **({"license": licence} if licence else {}),
        "library_name": usage.library,
        "tags": ["scoreray", "diffusion", config.network.kind],
        **({"pipeline_tag": kind} if info.is_picture and not info.is_autoencoder else {}),
    }
    return render(
        "scoreray.sampling.formats/card.md",
        front_matter=yaml.safe_dump(front, sort_keys=False),
        title=_plain(config.run.name),
        summary=f"{'An autoencoder' if info.is_autoencoder else 'A score-based generative model'} of {_target(info)}, "
        f"{_origin(page)}.",
        language=usage.language,
        usage=usage.lines,
        takes=_plain(info.takes, 1000),
        shape=list(info.sample_shape),
        units="" if info.is_picture or info.target is None else f", {info.target.kind} in the data's own units",
        data=list(_data(info, checkpoint)),
        training=list(_training(info, page)),
        config=dump_config(config) if page.images_seen else dump_yaml(_model_sections(config)),
        evaluations=list(_evaluations(page, checkpoint)),
        samples=samples,
        files=page.files,
        licence=licence or "No licence was given with the export.",
    )


def _checkpoint_of(page: ModelManifest) -> Checkpoint | None:
    """The checkpoint that was exported, where it is still in its place."""
    with contextlib.suppress(ScorerayError):
        source = find_model(page.checkpoint).source
        if isinstance(source, Checkpoint) and source.url == page.checkpoint:
            return source
    return None


def _data(info: ModelInfo, checkpoint: Checkpoint | None) -> Iterator[Fact]:
    trained = None if checkpoint is None else checkpoint.marker.data
    data: RunData | None = None
    with contextlib.suppress(ScorerayError):
        data = open_run_data(info.config, patient=False)
    if data is not None and (trained is None or data.identity != trained.sha256):
        data = None  # other data by now, or nobody knows whether they are the same
    yield Fact("URL", _code(str(info.config.data.url)))
    yield Fact("name", UNKNOWN if data is None or isinstance(data, UnpackedTars) else _code(data.name))
    count = None if trained is None else trained.num_samples
    yield Fact("samples", UNKNOWN if count is None else f"{count:,}")
    yield Fact("SHA-256", UNKNOWN if trained is None else f"`{trained.sha256}`")
    if info.target is not None:
        yield Fact("modelled field", f"{_code(info.target.name)}: {info.target.kind}, {info.target.dtype}")
    if info.classes:
        yield Fact("classes", _classes(info.classes))
    for one in data.fields if data is not None else ():
        counts = f", samples of each: {_numbers(one.class_counts, ',')}" if any(one.class_counts) else ""
        scale = f", mean {_numbers(one.mean)}, standard deviation {_numbers(one.std)}" if one.mean and one.std else ""
        yield Fact(f"field {_code(one.name)}", f"{one.kind} {list(one.shape) or ''}{counts}{scale}")
    yield Fact("sigma_data", f"{info.config.denoiser.sigma_data}")


def _training(info: ModelInfo, page: ModelManifest) -> Iterator[Fact]:
    import torch

    config = info.config
    with torch.device("meta"):
        parameters = num_parameters(build_network(config.network, info.network_shape, info.network_conditions))
    yield Fact("checkpoint", _code(page.checkpoint))
    for origin in page.lineage:
        yield Fact("began from", _code(origin.text()))
    if page.images_seen:
        yield Fact("samples seen", f"{page.images_seen:,}, {config.data.global_batch_size:,} a step")
    yield Fact("network", f"{config.network.kind}, {parameters:,} parameters")
    if not info.is_autoencoder:
        yield Fact("process", config.process.kind)
        yield Fact("denoiser", config.denoiser.parameterization)
    if not page.images_seen:  # how it was trained elsewhere is not known; the other sections are defaults
        return
    yield Fact("objective", config.objective.kind)
    yield Fact("learning rate", f"{config.optimizer.learning_rate:g}")
    yield Fact("seed", str(config.run.seed))


def _model_sections(config: Config) -> dict[str, Any]:
    """What an import knows: the other sections are defaults that nobody chose."""
    return config.model_dump(mode="json", include={"process", "network", "denoiser"})


def _evaluations(page: ModelManifest, checkpoint: Checkpoint | None) -> Iterator[CardEvaluation]:
    """Of the very weights that were exported: records name them by hash."""
    if checkpoint is None:
        return
    store = open_store(f"{run_of(checkpoint.url)}/{FOLDER}")
    stored = find_model(checkpoint.url)
    exported = {replace(stored, ema=length).sha256: length for length in page.files if length in stored.lengths}
    for key, _ in store.list():
        record: EvaluationRecord | None = None
        if key.endswith("/record.json"):
            with contextlib.suppress(ScorerayError):
                record = read_record(store.url(key))
        if record is not None and record.subject.checkpoint.sha256 in exported:
            length = exported[record.subject.checkpoint.sha256]
            warnings = [_plain(one, 300) for one in record.warnings]
            yield CardEvaluation(length, _plain(how_measured(record), 500), metric_rows(record), warnings)


def _kinds(info: ModelInfo) -> set[str]:
    return {spec.kind for spec in info.conditions.values()}


def _target(info: ModelInfo) -> str:
    what = "pictures" if info.is_picture else "samples"
    return f"{what} of shape {list(info.sample_shape)}"


def _origin(page: ModelManifest) -> str:
    if not page.images_seen:  # no run's: `scoreray import`
        return f"imported from {_code(page.checkpoint)}"
    return f"trained with scoreray for {page.images_seen:,} samples"


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(f"{number} {_code(name)}" for number, name in enumerate(names[:MOST_CLASSES]))
    return shown + (f", ... ({len(names):,} in all)" if len(names) > MOST_CLASSES else "")


def _numbers(values: Sequence[float], form: str = ".4g") -> str:
    shown = ", ".join(format(value, form) for value in values[:MOST_CLASSES])
    return f"{shown}, ..." if len(values) > MOST_CLASSES else shown


def _plain(text: str, most: int = 200) -> str:
    """A text from elsewhere on one line, without what Markdown or HTML would act on."""
    return re.sub(r"([\\`|<>\[\]*_])", r"\\\1", _one_line(text, most))


def _code(text: str) -> str:
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def _one_line(text: str, most: int = 200) -> str:
    return "".join(c if c.isprintable() else " " for c in shortened(text, most))
