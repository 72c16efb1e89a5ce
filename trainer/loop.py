"""The training loop: validate, build, resume, then batches until the run has seen its images.

It needs neither Ray nor (with engine.zero_stage=0) DeepSpeed: `train(config)` on one process is the whole of it, for a
laptop, a profiler or a debugger. Started once per rank, it is what Ray Train runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, TypeAdapter

from scoreray.data.errors import Unanswered
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.stream import Batch, Stream
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.data.traces import flush, span
from scoreray.trainer.checkpoints.checkpoint import TRIES, latest
from scoreray.trainer.checkpoints.marker import DataSet
from scoreray.trainer.checkpoints.writer import METRICS, CheckpointWriter
from scoreray.trainer.config import Config
from scoreray.trainer.config.data_scale import resolve_sigma_data
from scoreray.trainer.engine.cpu import keep_large_tensors_on_the_heap, onednn_products
from scoreray.trainer.engine.engine import Engine, build_engine, resolve_precision, settle_stage
from scoreray.trainer.meta import meta_module
from scoreray.trainer.monitoring.metrics import SIGMA_EDGES, TENSORBOARD, tensorboard_events, tensorboard_key
from scoreray.trainer.monitoring.progress import Progress, Record
from scoreray.trainer.monitoring.segments import read_segment, segment_key, segments
from scoreray.trainer.monitoring.stopping import Ask, Moved, NonFiniteError
from scoreray.trainer.monitoring.vote import Vote
from scoreray.trainer.networks.flops import matmul_rate, training_flops
from scoreray.trainer.optim.fragments import parameter_shapes
from scoreray.trainer.quarantined import QuarantineLog
from scoreray.trainer.step import build_training_module

T = TypeVar("T")


def run_store(config: Config) -> Store:
    """Everything that the run writes lies under this."""
    return open_store(f"{config.run.storage.rstrip('/')}/{config.run.name}")


def with_sigma_data(config: Config, manifest: Manifest, run: Store) -> Config:
    """`config` with a number for `denoiser.sigma_data: auto`: that of the run's newest checkpoint, else the data's."""
    if config.denoiser.sigma_data != "auto":
        return config
    checkpoint = latest(run)
    known = None if checkpoint is None else float(checkpoint.marker.config["denoiser"]["sigma_data"])
    return resolve_sigma_data(config, manifest, known)


def train(
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    watch: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
    asked: Callable[[], Ask] = lambda: Ask.NOTHING,
) -> int:
    """Train until `duration.images`, from the newest committed checkpoint if there is one; returns images seen.

    Every rank calls it; with world_size > 1 torch's default process group must exist. Randomness is a function of
    (seed, position), so the same config gives the same weights whether or not it was interrupted. `asked` is looked at
    between steps (see `Ask`); told to stop, it returns what was seen by then, told to move, it raises Moved, both with
    everything committed.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_large_tensors_on_the_heap()
    if rank:
        note = lambda line: None  # noqa: E731
    starting = contextlib.ExitStack()
    starting.enter_context(span("train.start", run=config.run.name, rank=rank, world_size=world_size))
    run = run_store(config)
    batch_size, total = config.data.global_batch_size, config.duration.images
    manifest = Manifest.load(open_store(config.data.url))
    config = with_sigma_data(config, manifest, run)  # prepare_run() did it for any other start than this function's own
    torch.manual_seed(config.run.seed)
    module = build_training_module(config, manifest)
    shapes = parameter_shapes(module)
    settled, why = settle_stage(config, module, world_size=world_size, device=device)
    if why:
        note(f"ZeRO-{settled.engine.zero_stage}: {why}")
    engine = build_engine(module, settled, world_size=world_size, device=device)
    attempt, identity = _from_rank_0((uuid.uuid4().hex[:8], manifest.identity), world_size)
    if identity != manifest.identity:
        raise Unanswered(f"{config.data.url}: was packed again while ranks read it; they start again")
    writer = CheckpointWriter(
        run,
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        keep=config.checkpoint.keep,
        keep_every_images=config.checkpoint.keep_every_images,
    )
    images_seen = num_steps = skipped = 0
    checkpoint = _from_rank_0(latest(run) if rank == 0 else None, world_size)  # all go on from the same one
    if checkpoint is not None:
        checkpoint.check_data(manifest, config.data.url)
        with span("train.restore", checkpoint=checkpoint.folder, images=checkpoint.images_seen):
            checkpoint.restore(engine.fragments(), module)
        images_seen, num_steps = checkpoint.images_seen, checkpoint.num_steps
        skipped = checkpoint.marker.skipped_steps
        engine.publish(num_steps)
        writer.last_commit = (images_seen, checkpoint.marker.time)
    if rank == 0:
        writer.check_lease()  # else these may be a newer start's
        _forget_records(run, images_seen)
    saved, ahead = images_seen, config.checkpoint.ahead_images

    about = {
        "config": config.model_dump(mode="json"),
        "shapes": shapes,
        "state_keys": list(engine.optimizer.state_keys),
        "image_shape": list(manifest.shape),
        "classes": list(manifest.classes),
        "data": DataSet.of(manifest),
    }
    unreadable = QuarantineLog(run, config.data, world_size)
    stream = Stream(
        config.data.url,
        global_batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.run.seed,
        position=images_seen,
        num_lanes=config.data.num_lanes,
        shuffle_block=config.data.shuffle_block,
        prefetch_batches=config.data.prefetch_batches,
        cache_dir=config.data.cache_dir,
        cache_dir_bytes=config.data.cache_bytes,
        pin_memory=device.type == "cuda",
        quarantine=unreadable.quarantine,
        manifest=manifest,
    )
    work = partial(_work_for_mfu, config, manifest, world_size, device) if rank == 0 else None
    meter, vote = _Meter(world_size, device, work), Vote(world_size)
    lines: list[str] = []
    norm, decided = 0.0, Ask.NOTHING
    starting.close()
    try:
        while images_seen < total and decided < Ask.MOVE:
            batch = meter.waiting(lambda: next(stream))
            learning_rate = config.optimizer.rate(images_seen + batch_size, total)
            decays = config.ema.decays(num_steps + 1, batch_size)
            _seed_dropout(config.run.seed, rank, images_seen)
            before, images_seen = images_seen, images_seen + batch_size
            try:
                norm = _step(engine, batch, learning_rate, decays, meter, world_size)
                num_steps += 1
            except NonFiniteError as error:
                skipped += 1
                if skipped > config.optimizer.skip_nonfinite:
                    raise
                note(f"step to {images_seen:,} images skipped ({skipped} of optimizer.skip_nonfinite): {error}")

            decided = vote.cast(asked())
            last = images_seen >= total or decided >= Ask.SAVE
            save = last or _crosses(before, images_seen, config.checkpoint.every_images)
            if save or _crosses(before, images_seen, config.log.every_images):
                record = meter.record(images_seen, learning_rate, norm)
                record = replace(record, quarantined=unreadable.gather(stream, note), skipped_steps=skipped)
                lines.append(json.dumps(asdict(record)))
            if save:
                snapshot = _crosses(saved, images_seen, config.checkpoint.snapshot_every_images or 2**63)
                saved = images_seen
                segment = "".join(line + "\n" for line in lines)
                objects = [(segment_key(METRICS, images_seen), segment.encode())]
                if config.log.tensorboard and rank == 0:
                    objects += [(tensorboard_key(images_seen), tensorboard_events(map(json.loads, lines)))]
                objects += filter(None, [unreadable.segment(images_seen)])
                writer.save(
                    images_seen,
                    num_steps,
                    list(engine.fragments()) if rank == 0 or not engine.replicated else [],
                    module,
                    {**about, "skipped_steps": skipped},
                    before_commit=partial(_put_all, run, objects),
                    snapshot=engine.optimizer.ema_keys if snapshot else (),
                )
                lines.clear()
            writer.poll()
            if ahead is not None and images_seen - saved >= ahead:
                writer.wait()
            if rank == 0:
                meter.show(watch, images_seen, total, writer.last_commit, skipped)
        writer.wait()
        if rank == 0:
            meter.show(watch, images_seen, total, writer.last_commit, skipped, always=True)
        vote.close(meet=decided >= Ask.MOVE)
    finally:
        stream.close()
        writer.close()
        flush()
    if decided is Ask.MOVE and images_seen < total:
        raise Moved(f"their places go away; all was saved at {images_seen:,} images")
    return images_seen


class _StoredRecord(BaseModel):
    """What all readers of metrics need; the rest of `Record` has grown from version to version."""

    model_config = ConfigDict(extra="allow", strict=True)

    images: int
    loss: float


_RECORD = TypeAdapter(_StoredRecord)


def read_metrics(run: Store, after: int = 0) -> list[dict[str, Any]]:
    """A run's committed records beyond `after` images, oldest first. Raises DataError where a file is damaged."""
    for _ in range(TRIES):
        files = segments(run, METRICS)
        if max(files, default=0) <= after:
            return []
        newest = latest(run)
        end = newest.images_seen if newest else 0
        try:
            wanted = [files[at] for at in sorted(files) if after < at <= end]
            records = [record for key in wanted for record in read_segment(run, key, _RECORD)]
        except NotFound:  # a start that goes on from before it has removed it since
            continue
        return [dict(record) for record in records if record.images > after]
    raise Unanswered(f"{run.url(METRICS)}: files go while they are read; is something removing them?")


def _put_all(run: Store, objects: list[tuple[str, bytes]]) -> None:
    for key, data in objects:
        run.put(key, data)


def _forget_records(run: Store, images_seen: int) -> None:
    """Remove records that a killed start wrote for a checkpoint that it did not commit: they will be measured again."""
    keys = [key for folder in (METRICS, TENSORBOARD) for key, _ in run.list(folder + "/")]
    seen = {key: re.search(r"\d{12,}", key.rpartition("/")[2]) for key in keys}  # others' files have no such number
    run.delete([key for key, found in seen.items() if found and int(found[0]) > images_seen])


def _step(
    engine: Engine, batch: Batch, learning_rate: float, decays: list[float], meter: _Meter, world_size: int
) -> float:
    """One optimizer step on this rank's share of the global batch; returns the gradient's norm."""
    losses, sigmas = [], []
    rows = len(batch.images) // engine.num_micro_batches
    images, labels, positions = (
        tensor.to(engine.device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.position)
    )
    for i in range(engine.num_micro_batches):
        part = slice(i * rows, (i + 1) * rows)
        with onednn_products(engine.device):
            loss, sigma = engine.module(images[part], labels[part], positions[part])
            engine.backward(loss.mean())
        losses.append(loss.detach())
        sigmas.append(sigma)
    loss, sigma = torch.cat(losses), torch.cat(sigmas)
    try:
        norm = engine.step(learning_rate, decays)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; {_blame(loss, sigma, batch, world_size)}") from None
    meter.add(loss, sigma)
    return norm


def _blame(loss: torch.Tensor, sigma: torch.Tensor, batch: Batch, world_size: int) -> str:
    """Which samples of all ranks have a non-finite loss; every rank calls it, as every rank saw the norm."""
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    mine = [(int(batch.index[i]), float(sigma[i]), float(loss[i])) for i in bad]
    everyones: list[Any] = [mine]
    if world_size > 1:
        everyones = [None] * world_size
        dist.all_gather_object(everyones, mine)
    found = [entry for entries in everyones for entry in entries]
    if not found:
        return "every sample's loss is finite, so the backward pass overflowed: lower the learning rate or clip"
    index, level, value = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"loss {value} at sample {index} (sigma {level:.4g}){more}; nothing was changed by this step"


def _crosses(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _seed_dropout(seed: int, rank: int, images_seen: int) -> None:
    """Generator state is a function of where the run is, so none is saved (after Karras 2024's training loop)."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + rank * 0xBF58476D1CE4E5B9 + images_seen) % 2**63)


def _work_for_mfu(config: Config, manifest: Manifest, world_size: int, device: torch.device) -> tuple[int, float]:
    """FLOPs of training on one image (0 where they can't be counted), and matrix FLOPs a second of all workers."""
    module = meta_module(config, manifest)
    network = getattr(getattr(module, "denoiser", module), "network", None)
    if not isinstance(network, torch.nn.Module):
        return 0, math.inf
    rate = matmul_rate(device, resolve_precision(config.engine.precision, device))
    return training_flops(network, manifest.shape), rate * world_size


def _from_rank_0(value: T, world_size: int) -> T:
    """Rank 0's value on every rank."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


class _Meter:
    """Means since the last record, kept on the device so that a step needs no synchronisation for them."""

    def __init__(
        self, world_size: int, device: torch.device, work: Callable[[], tuple[int, float]] | None = None
    ) -> None:
        """`work`: FLOPs of an image, and FLOPs a second of all workers; takes a second, so asked after a first step."""
        self._world_size, self._work = world_size, work
        self._share_per_rate = math.nan
        self._record: Record | None = None
        self._started_at = time.time()
        self._edges = torch.tensor(SIGMA_EDGES, device=device)
        self._sums = torch.zeros(2, len(SIGMA_EDGES) + 1, dtype=torch.float64, device=device)
        self._since = self._window_start = time.perf_counter()
        self._waited_s = self._window_waited_s = 0.0
        self._window_images, self._shown, self._rate, self._stall = 0, 0.0, math.nan, 0.0
        self._loss = torch.full((), math.nan, device=device)

    def waiting(self, fetch: Callable[[], Batch]) -> Batch:
        start = time.perf_counter()
        batch = fetch()
        waited = time.perf_counter() - start
        self._waited_s += waited
        self._window_waited_s += waited
        return batch

    def add(self, loss: torch.Tensor, sigma: torch.Tensor) -> None:
        bucket = torch.bucketize(sigma.float(), self._edges)
        self._sums[0].index_add_(0, bucket, loss.double())
        self._sums[1].index_add_(0, bucket, torch.ones_like(loss, dtype=torch.float64))
        self._loss = loss.mean()
        self._window_images += len(loss) * self._world_size

    def record(self, images: int, learning_rate: float, norm: float) -> Record:
        """Averaged over all ranks: every rank calls it."""
        if self._world_size > 1:
            dist.all_reduce(self._sums)
        sums, counts = self._sums.tolist()
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        record = Record(
            images=images,
            loss=sum(sums) / max(sum(counts), 1.0),
            learning_rate=learning_rate,
            gradient_norm=norm,
            images_per_s=sum(counts) / elapsed,
            data_stall=self._waited_s / elapsed,
            sigma_losses=[s / c if c else None for s, c in zip(sums, counts, strict=True)],
            mfu=None if math.isnan(self._share_per_rate) else self._share_per_rate * sum(counts) / elapsed,
            time=time.time(),
        )
        self._record = record
        self._sums.zero_()
        self._since, self._waited_s = time.perf_counter(), 0.0
        return record

    def show(
        self,
        watch: Callable[[Progress], None],
        images: int,
        total: int,
        commit: tuple[int, float] | None,
        skipped: int,
        always: bool = False,
    ) -> None:
        now = time.perf_counter()
        if now - self._shown < 0.5 and not always:
            return
        elapsed = now - self._window_start
        if elapsed > 3.0 or math.isnan(self._rate):
            self._rate, self._stall = self._window_images / elapsed, self._window_waited_s / elapsed
            self._window_start, self._window_images, self._window_waited_s = now, 0, 0.0
        self._shown = now
        committed, committed_at = commit or (0, 0.0)
        watch(
            Progress(
                images,
                total,
                float(self._loss),
                self._rate,
                self._stall,
                committed,
                committed_at,
                self._started_at,
                self._rate * self._share_per_rate,
                self._record,
                skipped,
            )
        )
        if self._work is not None:
            self._measure(self._work)

    def _measure(self, work: Callable[[], tuple[int, float]]) -> None:
        """What MFU needs; the time that it takes counts nowhere."""
        flops_per_image, flops_per_s = work()
        self._share_per_rate = flops_per_image / flops_per_s if flops_per_image else math.nan
        self._work = None
        spent = time.perf_counter() - self._shown
        self._since, self._window_start = self._since + spent, self._window_start + spent
