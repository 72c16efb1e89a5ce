"""What an evaluation will do: its settings, what it reads (each loaded once and passed on), its chunks.

Chunks are ranges of samples, not of workers, and each is computed in the same batches on the same number of threads: so
any number of workers gives the same record, and what a killed evaluation has stored is taken up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scoreray.data.errors import UserError, shortened
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader, spread
from scoreray.data.storage.store import Store, open_store
from scoreray.data.units import MOST_THREADS
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.classifier import ClassifierConfig
from scoreray.sampling.measures.ensembles import FEWEST_MEMBERS
from scoreray.sampling.measures.features import ExtractorChoice
from scoreray.sampling.metrics.record import RecordHead, digest
from scoreray.sampling.model.describe import Description, ModelInfo
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.representations.codes import CodeOptions
from scoreray.sampling.samplers.sigmas import Grid

FOLDER = "evaluations"  # in a run, where no other place is given
SMALLEST_RTOL = 1e-14  # as of the sampler rk45
MOST_ROWS = 10_000  # a side, of metrics that look at all pairs or keep rows: memory does not grow beyond
NUM_SIGMAS = 12
VERSION = 2  # raised when the same settings give other numbers


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, against what, and how much of it.

    metrics: none takes those that fit and cost no more than features and a forward pass. metric_options: of some of
    them, by the metric's name.
    sampler, steps, grid: None takes what fits the model, or `max_calls`, the network calls that a sample may take.
    count: samples drawn; reference_count: of the reference, spread evenly over it. likelihood_count, loss_count,
    restoration_count: of the reference, for bpd and nats, the loss, psnr and ssim. chains: of AIS.
    codes_count: of the reference, for representations; codes: how a denoiser encodes them (`CodeOptions.parse`).
    ensembles: samples of the reference whose conditions are requested, per_condition times each. scorer: of `match`, as
    package.module:Name.
    threads: of each worker, whatever the number of workers; device: "cpu" or "cuda".
    """

    checkpoint: str
    reference: str
    metrics: tuple[str, ...] = ()
    out: str = ""
    cache: str = ""
    ema: str | None = None
    extractor: str = "auto"
    count: int = 10_000
    reference_count: int = 50_000
    likelihood_count: int = 128
    loss_count: int = 1024
    restoration_count: int = 128
    codes_count: int = 2000
    codes: str = ""
    chains: int = 256
    ensembles: int = 64
    per_condition: int = 16
    scorer: str = ""
    sampler: str | None = None
    steps: int | None = None
    grid: Grid | None = None
    max_calls: int | None = None
    seed: int = 0
    guidance: float = 1.0
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    metric_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    restoration: str = "superresolution=2"
    rtol: float = 1e-5
    threads: int = 1
    device: str = "cpu"
    classifier_images: int = ClassifierConfig.images

    def __post_init__(self) -> None:
        for name in ("count", "reference_count"):
            if getattr(self, name) < frechet.FEWEST:
                raise UserError(f"{name} = {getattr(self, name)}: at least {frechet.FEWEST} are needed")
        for name in ("likelihood_count", "loss_count", "restoration_count", "codes_count", "chains", "ensembles"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} = {getattr(self, name)}: at least 2, for a standard error")
        if self.per_condition < FEWEST_MEMBERS:
            raise UserError(
                f"per_condition = {self.per_condition}: at least {FEWEST_MEMBERS}, for an ensemble's spread"
            )
        if not SMALLEST_RTOL <= self.rtol < 1:
            raise UserError(f"rtol = {self.rtol}: must be in [{SMALLEST_RTOL:g}, 1)")
        if not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"threads = {shortened(str(self.threads))}: must be 1 to {MOST_THREADS}")
        self.code_options()
        self.request()

    def code_options(self) -> CodeOptions:
        """How a denoiser encodes. Raises UserError."""
        return CodeOptions.parse(self.codes, "--codes")

    def request(self) -> Request:
        """What is drawn."""
        return Request(
            count=self.count,
            sampler=self.sampler,
            steps=self.steps,
            grid=self.grid,
            max_calls=self.max_calls,
            seed=self.seed,
            guidance=self.guidance,
            batch_size=self.batch_size,
            options=dict(self.options),
        )


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads before it computes, each loaded once: the model's page, the reference's manifest.

    extractor: a classifier that is still to be trained has no hash yet. accuracy: of a classifier on held-out images.
    """

    settings: EvaluationSettings
    model: Description
    reference: SampleReader
    extractor: ExtractorChoice
    accuracy: float | None = None

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def manifest(self) -> Manifest:
        return self.reference.manifest

    @property
    def request(self) -> Request:
        """What is drawn, all of it filled in for the model; an autoencoder draws nothing."""
        request = self.settings.request()
        return request if self.info.is_autoencoder else request.fitted(self.info)

    @property
    def out(self) -> str:
        """Where records go."""
        return self.settings.out or f"{run_of(self.info.url)}/{FOLDER}"

    @property
    def cache(self) -> Store:
        """Where extractors and the reference's features are kept, by hash."""
        return open_store(self.settings.cache or f"{self.out}/cache")

    @property
    def num_reference(self) -> int:
        return self.at_most(self.settings.reference_count)

    @property
    def num_rows(self) -> int:
        """Rows a side, of metrics that look at all pairs."""
        return min(MOST_ROWS, self.settings.count, self.num_reference)

    @property
    def sigmas(self) -> list[float]:
        """The fixed noise levels of the loss: even in ln sigma over what the process covers."""
        low, high = self.info.sigma_range
        return np.geomspace(low, high, NUM_SIGMAS).tolist()

    def at_most(self, count: int) -> int:
        """So many of the reference, or all of it."""
        return min(count, self.manifest.num_samples)

    def numbers(self, count: int) -> np.ndarray:
        """Which samples of the reference `count` of them are."""
        return spread(count, self.manifest.num_samples)


@dataclass(frozen=True)
class Chunk:
    """Rows [first, last) of a stage. Its result is stored under `key` of the evaluation's place or the cache."""

    stage: str
    number: int
    first: int
    last: int

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.number:06d}.npz"

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that a worker needs to do any chunk, and what the record says of the evaluation."""

    inputs: EvaluationInputs
    metrics: tuple[str, ...]
    head: RecordHead

    @property
    def store(self) -> Store:
        """Of this evaluation alone: named after all that changes its numbers."""
        return open_store(self.inputs.out).child(f"{self.inputs.info.images_seen:012d}-{self.head.digest}")

    def folder(self, stage: str) -> Store:
        """Where a stage's chunks are: the reference's in the cache, for every evaluation that has the same ones."""
        return self.inputs.cache.child(self._reference_key) if stage == "reference" else self.store

    @property
    def _reference_key(self) -> str:
        head, inputs = self.head, self.inputs
        extractor = inputs.extractor
        return digest([inputs.reference.sha256, extractor.kind, extractor.sha256, head.numerics.model_dump(),
                       head.versions["torch"], inputs.num_reference, VERSION,
                       *(["spectrum"] if "spectrum" in self.metrics else [])])  # fmt: skip


def run_of(url: str) -> str:
    """The run that a checkpoint's URL belongs to: where evaluations of it go by default."""
    head, _, tail = url.rstrip("/").rpartition("/")
    return head[: -len("/checkpoints")] if head.endswith("/checkpoints") and tail else url.rstrip("/")
