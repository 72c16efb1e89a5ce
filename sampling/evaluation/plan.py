"""What an evaluation will do: its settings checked, its parts known by hashes, its work cut into fixed chunks.

Chunks are ranges of samples, not of workers, and each is computed in the same batches on the same number of threads: so
any number of workers gives the same record, and what a killed evaluation has stored is taken up again.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import Samples, spread
from scoreray.data.storage.store import Store, open_store
from scoreray.data.units import MOST_THREADS
from scoreray.sampling.evaluation import record
from scoreray.sampling.evaluation.protocol import SIGMAS, VERSION, choose_metrics, label_rule, protocol
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.classifier import ClassifierConfig
from scoreray.sampling.measures.features import ExtractorChoice
from scoreray.sampling.model.describe import ModelInfo, describe
from scoreray.sampling.offline.generate import Request

FOLDER = "evaluations"  # in a run, where nothing else is asked for
SMALLEST_RTOL = 1e-14  # as of the sampler rk45
RECORD, PAGE = "record.json", "report.html"
CHUNK = 256  # samples, about: a multiple of the batch
REFERENCE_BYTES, MOST_REFERENCE = 64 << 20, 1024  # the same of the reference, which costs less a sample


@dataclass(frozen=True)
class EvaluationSettings:
    """What a person asks for.

    metrics: none takes those that fit and cost no more than features and a forward pass.
    sampler, steps, grid: None takes what fits the model.
    count: samples drawn; reference_count: of the reference, spread evenly over it. likelihood_count, loss_count,
    restoration_count: of the reference, for bpd and nats, the loss, psnr and ssim. chains: of AIS.
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
    chains: int = 256
    sampler: str | None = None
    steps: int | None = None
    grid: str | None = None
    seed: int = 0
    guidance: float = 1.0
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    restoration: str = "superresolution=2"
    rtol: float = 1e-5
    threads: int = 1
    device: str = "cpu"
    classifier_images: int = ClassifierConfig.images

    def __post_init__(self) -> None:
        for name in ("count", "reference_count"):
            if getattr(self, name) < frechet.FEWEST:
                raise UserError(f"{name} = {getattr(self, name)}: at least {frechet.FEWEST} are needed")
        for name in ("likelihood_count", "loss_count", "restoration_count", "chains"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} = {getattr(self, name)}: at least 2, for a standard error")
        if not SMALLEST_RTOL <= self.rtol < 1:
            raise UserError(f"rtol = {self.rtol}: must be in [{SMALLEST_RTOL:g}, 1)")
        if not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"threads = {shortened(str(self.threads))}: must be 1 to {MOST_THREADS}")
        for name in self.metrics:
            if name not in record.PROTOCOL:
                raise UserError(f"unknown metric '{name}'; {nearest(name, record.PROTOCOL)}")
        self.request()

    def request(self) -> Request:
        """What is drawn."""
        return Request(
            count=self.count,
            sampler=self.sampler,
            steps=self.steps,
            grid=self.grid,
            seed=self.seed,
            guidance=self.guidance,
            batch_size=self.batch_size,
            options=dict(self.options),
        )


@dataclass(frozen=True)
class Task:
    """One chunk: rows [first, last) of a stage. Its result lies under `key` of the evaluation's place or the cache."""

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
    """Everything that a worker needs to do any task, and what the record says of the evaluation."""

    settings: EvaluationSettings
    metrics: tuple[str, ...]
    info: ModelInfo
    request: Request
    manifest: Manifest
    extractor: ExtractorChoice
    page: dict[str, Any]
    place: str
    cache: str
    reference_key: str

    @property
    def name(self) -> str:
        return f"{self.info.images_seen:012d}-{record.digest(self.page)}"

    @property
    def store(self) -> Store:
        return open_store(self.place).child(self.name)

    def folder(self, stage: str) -> Store:
        """Where a stage's chunks lie: the reference's in the cache, for every evaluation that has the same ones."""
        return open_store(self.cache).child(self.reference_key) if stage == "reference" else self.store

    @property
    def num_reference(self) -> int:
        return min(self.settings.reference_count, self.manifest.num_samples)

    def numbers(self, count: int) -> np.ndarray:
        """Which samples of the reference `count` of them are."""
        return spread(count, self.manifest.num_samples)

    @property
    def sigmas(self) -> list[float]:
        """The fixed noise levels of the loss: even in ln sigma over what the process covers."""
        low, high = self.info.sigma_range
        return np.geomspace(low, high, SIGMAS).tolist()

    def stages(self) -> dict[str, list[Task]]:
        """All tasks, stage by stage."""
        settings, wanted = self.settings, set(self.metrics)
        sizes = {}
        if wanted & record.OF_SAMPLES - {"psnr", "ssim"}:
            fitting = REFERENCE_BYTES // (4 * math.prod(self.manifest.shape))
            sizes["reference"] = (self.num_reference, max(CHUNK, min(MOST_REFERENCE, fitting)))
            sizes["samples"] = (settings.count, CHUNK)
        if wanted & {"bpd", "nats"}:
            sizes["likelihood"] = (min(settings.likelihood_count, self.manifest.num_samples), 16)
        if "loss" in wanted:
            sizes["loss"] = (min(settings.loss_count, self.manifest.num_samples), CHUNK)
        if wanted & {"psnr", "ssim"}:
            sizes["restoration"] = (min(settings.restoration_count, self.manifest.num_samples), settings.batch_size)
        if "ais" in wanted:
            sizes["ais"] = (settings.chains, settings.chains)
        return {stage: _chunks(stage, count, about, settings.batch_size) for stage, (count, about) in sizes.items()}


def _chunks(stage: str, count: int, about: int, batch: int) -> list[Task]:
    size = about if about < batch or stage in ("restoration", "ais") else -(-about // batch) * batch
    return [Task(stage, i, first, min(first + size, count)) for i, first in enumerate(range(0, count, size))]


def run_of(url: str) -> str:
    """The run that a checkpoint's URL belongs to: where evaluations of it go by default."""
    head, _, tail = url.rstrip("/").rpartition("/")
    return head[: -len("/checkpoints")] if head.endswith("/checkpoints") and tail else url.rstrip("/")


def make_plan(
    settings: EvaluationSettings, extractor: ExtractorChoice, accuracy: float | None = None
) -> EvaluationPlan:
    """The plan of checked settings, with an extractor whose weights are known."""
    model = describe(settings.checkpoint, settings.ema)
    info = model.info
    reference = Samples(settings.reference)
    metrics = choose_metrics(settings.metrics, info, reference.manifest, extractor, settings.restoration)
    request = settings.request().fitted(info)
    out = settings.out or f"{run_of(info.url)}/{FOLDER}"
    page = {
        "subject": {
            "checkpoint": {"url": info.url, "sha256": model.sha256, "images_seen": info.images_seen, "ema": info.ema},
            "sampling": _sampling(request, info),
        },
        "protocol": protocol(settings, metrics, info, reference, extractor, accuracy),
        "numerics": {"device": settings.device, "threads": settings.threads, "batch_size": settings.batch_size},
        "versions": {name: version(name) for name in ("scoreray", "torch", "numpy")}
        | {"python": platform.python_version()},
    }
    total = min(settings.reference_count, reference.manifest.num_samples)
    features = [
        page["protocol"]["reference"]["sha256"],
        extractor.kind,
        extractor.sha256,
        page["numerics"],
        page["versions"]["torch"],
        total,
        VERSION,
    ]
    cache = settings.cache or f"{out}/cache"
    return EvaluationPlan(
        settings, metrics, info, request, reference.manifest, extractor, page, out, cache, record.digest(features)
    )


def _sampling(request: Request, info: ModelInfo) -> dict[str, Any]:
    return {
        "sampler": request.sampler,
        "steps": request.steps,
        "grid": request.grid,
        "sigma_range": list(info.sigma_range),
        "seed": request.seed,
        "guidance": request.guidance,
        "options": request.options,
    }


def labels_of(plan: EvaluationPlan, first: int, last: int) -> torch.Tensor:
    """Classes int64 of samples [first, last): every stretch of them has nearly the shares of the whole."""
    if label_rule(plan.info, plan.manifest) != "as in the reference":
        return plan.request.labels(first, last, plan.info)
    shares = np.cumsum(plan.manifest.class_counts) / sum(plan.manifest.class_counts)
    golden = (np.arange(first, last) + 0.5) * ((math.sqrt(5) - 1) / 2) % 1.0
    return torch.from_numpy(np.minimum(np.searchsorted(shares, golden, side="right"), len(shares) - 1))
