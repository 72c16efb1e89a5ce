"""Measures a rank's steps: means since the last record on the device, throughput over the last seconds, MFU."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TypeVar

import torch
import torch.distributed as dist

from scoreray.data.storage.stats import ReadStats
from scoreray.trainer.monitoring.metrics import SIGMA_EDGES, ReadCounts, TrainingProgress, TrainingRecord

T = TypeVar("T")

SHOW_EVERY_S = 0.5
WINDOW_S = 3.0  # what a shown throughput is the mean of


Grid = tuple[int, ...]  # of a sample, (H, W)
Work = tuple[dict[Grid, int], float]
"""FLOPs of training on one image of each size (0: unknown), and FLOPs a second of all workers."""


class StepMeter:
    """Sums since the last record, kept on the device so that a step needs no synchronisation for them.

    work: takes a second, so it is called after the first step, and its time counts nowhere.
    """

    def __init__(self, world_size: int, device: torch.device, work: Callable[[], Work] | None = None) -> None:
        self._world_size, self._work = world_size, work
        self._share_per_image: dict[Grid, float] = {}  # seconds of all workers at their full rate
        self._images, self._window_images = Counter[Grid](), Counter[Grid]()  # images of each
        self._record: TrainingRecord | None = None
        self._reads = ReadCounts()
        self._started_at = time.time()
        self._edges = torch.tensor(SIGMA_EDGES, device=device)
        self._sums = torch.zeros(2, len(SIGMA_EDGES) + 1, dtype=torch.float64, device=device)
        self._since = self._window_start = time.perf_counter()
        self._waited_s = self._window_waited_s = 0.0
        self._shown_images = Counter[Grid]()
        self._shown, self._rate, self._stall = 0.0, math.nan, 0.0
        self._loss = torch.full((), math.nan, device=device)

    def waiting(self, fetch: Callable[[], T]) -> T:
        """What `fetch` returns; the time that it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = fetch()
        waited = time.perf_counter() - start
        self._waited_s += waited
        self._window_waited_s += waited
        return batch

    def add(self, loss: torch.Tensor, sigma: torch.Tensor, grid: Sequence[int]) -> None:
        """A step of this rank: loss and noise level of each sample, [b], and the grid of all of them."""
        bucket = torch.bucketize(sigma.float(), self._edges)
        self._sums[0].index_add_(0, bucket, loss.double())
        self._sums[1].index_add_(0, bucket, torch.ones_like(loss, dtype=torch.float64))
        self._loss = loss.mean()
        for images in (self._images, self._window_images):
            images[tuple(grid)] += len(loss) * self._world_size

    def record(
        self, images: int, learning_rate: float, norm: float, quarantined: int, skipped_steps: int, reads: ReadStats
    ) -> TrainingRecord:
        """Averaged over all ranks: every rank calls it. `reads`: of this rank's stream."""
        self._reads = self._summed(ReadCounts.of(reads))
        if self._world_size > 1:
            dist.all_reduce(self._sums)
        sums, counts = self._sums.tolist()
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        self._record = TrainingRecord(
            images=images,
            loss=sum(sums) / max(sum(counts), 1.0),
            learning_rate=learning_rate,
            gradient_norm=norm,
            images_per_s=sum(counts) / elapsed,
            data_stall=self._waited_s / elapsed,
            sigma_losses=tuple(s / c if c else None for s, c in zip(sums, counts, strict=True)),
            quarantined=quarantined,
            skipped_steps=skipped_steps,
            mfu=None if math.isnan(share := self._mean_share(self._images)) else share * sum(counts) / elapsed,
            time=time.time(),
        )
        self._sums.zero_()
        self._images.clear()
        self._since, self._waited_s = time.perf_counter(), 0.0
        return self._record

    def _mean_share(self, images: Counter[Grid]) -> float:
        """Of an image, by how many there were of each size; nan where it is not known."""
        if not images or not images.keys() <= self._share_per_image.keys():
            return math.nan
        return sum(self._share_per_image[grid] * count for grid, count in images.items()) / images.total()

    def _summed(self, reads: ReadCounts) -> ReadCounts:
        """Of all ranks. A reduction of its own: in one with the losses, it would change the order of their sums."""
        counts = torch.tensor(astuple(reads), dtype=torch.int64, device=self._sums.device)
        if self._world_size > 1:
            dist.all_reduce(counts)
        return ReadCounts(*counts.tolist())

    def show(
        self,
        watch: Callable[[TrainingProgress], None],
        images: int,
        total: int,
        commit: tuple[int, float] | None,
        skipped: int,
        always: bool = False,
    ) -> None:
        """Calls `watch`, but not more often than every `SHOW_EVERY_S`. `commit`: images and Unix time of the last."""
        now = time.perf_counter()
        if now - self._shown < SHOW_EVERY_S and not always:
            return
        elapsed = now - self._window_start
        if elapsed > WINDOW_S or math.isnan(self._rate):
            self._rate, self._stall = self._window_images.total() / elapsed, self._window_waited_s / elapsed
            self._window_start, self._window_waited_s = now, 0.0
            self._shown_images, self._window_images = self._window_images, Counter()
        self._shown = now
        committed, committed_at = commit or (0, 0.0)
        watch(
            TrainingProgress(
                images,
                total,
                float(self._loss),
                self._rate,
                self._stall,
                committed,
                committed_at,
                self._started_at,
                self._rate * self._mean_share(self._shown_images),
                self._record,
                skipped,
                self._reads,
            )
        )
        if self._work is not None:
            self._measure(self._work)

    def _measure(self, work: Callable[[], Work]) -> None:
        flops_per_image, flops_per_s = work()
        self._share_per_image = {grid: flops / flops_per_s for grid, flops in flops_per_image.items() if flops}
        self._work = None
        spent = time.perf_counter() - self._shown
        self._since, self._window_start = self._since + spent, self._window_start + spent
