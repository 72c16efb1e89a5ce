"""The training loop: validate, build, resume, then batches until the run has seen its images.

It needs neither Ray nor (with engine.zero_stage=0) DeepSpeed: `train(config)` on one process is the whole of it, for a
laptop, a profiler or a debugger. Started once per rank, it is what Ray Train runs.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from scoreray.data.errors import Unanswered
from scoreray.data.own_code import code_hashes, own_mistake
from scoreray.data.reading.batches import Batch
from scoreray.data.storage.store import Store
from scoreray.data.traces import flush, span
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.checkpoints.duration import RunClock, as_decided, with_images
from scoreray.trainer.checkpoints.marker import Ancestor, DataSet, Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.diffusion.buffers import state_buffers
from scoreray.trainer.diffusion.levels import with_levels
from scoreray.trainer.engine import Engine, build_engine
from scoreray.trainer.engine.cpu import keep_large_tensors_on_the_heap, onednn_products
from scoreray.trainer.initial import begin
from scoreray.trainer.meta import training_work
from scoreray.trainer.monitoring.meter import StepMeter
from scoreray.trainer.monitoring.metrics import TrainingProgress, TrainingRecord
from scoreray.trainer.monitoring.stopping import LoopRequest, NonFiniteError, Preempted
from scoreray.trainer.monitoring.vote import Vote
from scoreray.trainer.optim.fragments import Fragment, parameter_shapes
from scoreray.trainer.prepare import as_begun
from scoreray.trainer.quarantined import QuarantineLog
from scoreray.trainer.ranks import from_all_ranks, from_rank_0, tensors_from_rank_0
from scoreray.trainer.records import record_objects, remove_uncommitted
from scoreray.trainer.run_data import FinishedTars, RunData, open_batches, open_run_data
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.source_data import check_source, source_batches
from scoreray.trainer.step import RunModule, TrainingModule, build_training_module
from scoreray.trainer.teacher import load_teacher

T = TypeVar("T")


def train(
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    watch: Callable[[TrainingProgress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
    requested: Callable[[], LoopRequest] = lambda: LoopRequest.NOTHING,
) -> int:
    """Train for `duration`, from the newest committed checkpoint if there is one; returns images seen.

    Every rank calls it; with world_size > 1 torch's default process group must exist. Randomness is a function of
    (seed, position), so the same config gives the same weights whether or not it was interrupted. `requested` is called
    between steps (see `LoopRequest`): on STOP it returns what was seen by then, on PREEMPT it raises Preempted, both
    with everything committed.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_large_tensors_on_the_heap()
    if rank:
        note = lambda line: None  # noqa: E731
    with span("train.start", run=config.run.name, rank=rank, world_size=world_size):
        run, data = run_store(config), open_run_data(config)
        config, fields = as_begun(config, data, run, rank, world_size)
        optimizer = config.optimizer.for_run(config.run.seed, data.num_samples)
        built = config.model_copy(update={"optimizer": optimizer})
        module, engine = _build(built, fields, world_size, device, note)
        writer, checkpoint = _take_over(config, data, run, rank, world_size, 1 if engine.replicated else None)
        config = as_decided(config, checkpoint)
        images_seen = num_steps = skipped = 0
        if checkpoint is not None:
            images_seen, num_steps = checkpoint.images_seen, checkpoint.num_steps
            skipped = checkpoint.marker.skipped_steps
            with span("train.restore", checkpoint=checkpoint.folder, images=images_seen), writer.while_reading():
                if checkpoint.marker.is_lora:
                    begin(config, fields, engine, module, rank, world_size, checkpoint)
                _restore(checkpoint, _stored_fragments(config, engine), module, engine, rank, world_size)
            engine.publish(num_steps)
            lineage = checkpoint.marker.lineage
        elif config.init is not None:
            with span("train.init"):
                lineage = begin(config, fields, engine, module, rank, world_size)
        else:
            lineage = []
        if checkpoint is not None:
            check_source(checkpoint, fields)
        teacher, origin = load_teacher(config, fields, engine.device, rank, world_size, checkpoint)
        if isinstance(module, TrainingModule):
            module.teacher = teacher
        if rank == 0:
            writer.check_lease()  # else these may be a newer start's
            remove_uncommitted(run, images_seen)
        unreadable = QuarantineLog(run, config.data, rank, world_size, checkpoint)
        finished = FinishedTars(run, data, rank, world_size, checkpoint)
        stream = open_batches(
            config, data, fields, images_seen, rank, world_size, device, unreadable.quarantine, finished.known
        )
        sources = source_batches(config, fields, images_seen, rank, world_size, device)
        work = partial(training_work, config, fields, world_size, device) if rank == 0 else None
        meter, vote = StepMeter(world_size, device, work), Vote(world_size)
    marker = replace(_marker(config, data, fields, module, engine, world_size, lineage), teacher=origin)
    batch_size, total, saved = config.data.global_batch_size, config.duration.images, images_seen
    clock = RunClock(config.duration.minutes or 0, batch_size)
    records: list[TrainingRecord] = []
    norm, decided = 0.0, LoopRequest.NOTHING
    try:
        while (total is None or images_seen < total) and decided < LoopRequest.PREEMPT:
            batch, start = meter.waiting(lambda: (next(stream), None if sources is None else next(sources)))
            learning_rate = config.optimizer.rate(images_seen + batch_size, math.inf if total is None else total)
            decays = config.ema.decays(num_steps + 1, batch_size)
            _seed_dropout(config.run.seed, rank, images_seen)
            before, images_seen = images_seen, images_seen + batch_size
            try:
                source = _paired(module, engine, batch, start, fields)
                norm = _step(engine, batch, source, fields, learning_rate, decays, meter, world_size)
                num_steps += 1
            except NonFiniteError as error:
                skipped += 1
                if skipped > config.optimizer.skip_nonfinite:
                    raise
                note(f"step to {images_seen:,} images skipped ({skipped} of optimizer.skip_nonfinite): {error}")
            except (Exception, SystemExit) as error:
                if (mistake := own_mistake(error, marker.config)) is not None:
                    raise mistake from None
                raise

            decided = vote.cast(requested())
            save = decided >= LoopRequest.SAVE or _crosses(before, images_seen, config.checkpoint.every_images)
            if total is None:
                total = from_rank_0(clock.images(images_seen, at_once=save), world_size)
                if total is not None:
                    config = with_images(config, total)
                    marker = replace(marker, config=config.model_dump(mode="json"))
                    note(f"as fast as it is now, that will be {total:,} images")
            save = save or (total is not None and images_seen >= total)
            if save or _crosses(before, images_seen, config.log.every_images):
                quarantined = unreadable.gather(stream, note)
                records.append(meter.record(images_seen, learning_rate, norm, quarantined, skipped, stream.stats))
            if save:
                plots = config.log.tensorboard and rank == 0
                snapshot = _crosses(saved, images_seen, config.checkpoint.snapshot_every_images)
                writer.save(
                    replace(marker, images_seen=images_seen, num_steps=num_steps, skipped_steps=skipped),
                    _stored_fragments(config, engine),
                    module,
                    record_objects(images_seen, records, plots)
                    + unreadable.objects(images_seen)
                    + finished.objects(stream, images_seen),
                    snapshot=engine.optimizer.ema_keys if snapshot else (),
                )
                records.clear()
                saved = images_seen
            writer.poll()
            if (ahead := config.checkpoint.ahead_images) is not None and images_seen - saved >= ahead:
                writer.wait()
            if rank == 0:
                expected = clock.expected(images_seen) if total is None else total
                meter.show(watch, images_seen, expected, writer.last_commit, skipped)
        writer.wait()
        if rank == 0:
            meter.show(watch, images_seen, total or images_seen, writer.last_commit, skipped, always=True)
        vote.close(meet=decided >= LoopRequest.PREEMPT)
    finally:
        stream.close()
        if sources is not None:
            sources.close()
        writer.close()
        flush()
    if decided is LoopRequest.PREEMPT and images_seen < (total or math.inf):
        raise Preempted(f"the workers' machines go away; all was saved at {images_seen:,} images")
    return images_seen


def _build(
    config: Config, fields: RunFields, world_size: int, device: torch.device, note: Callable[[str], None]
) -> tuple[RunModule, Engine]:
    """The module, with weights from the run's seed, and the engine that shards and steps it."""
    torch.manual_seed(config.run.seed)
    module = build_training_module(config, fields)
    engine = build_engine(
        module,
        config.engine,
        config.optimizer,
        config.ema,
        global_batch_size=config.data.global_batch_size,
        world_size=world_size,
        device=device,
        image_shape=fields.shape,
        max_stage=config.max_zero_stage,
        note=note,
    )
    return module, engine


def _restore(
    checkpoint: Checkpoint, fragments: list[Fragment], module: RunModule, engine: Engine, rank: int, world_size: int
) -> None:
    """The state of `checkpoint`. Where every rank holds all of it rank 0 alone reads, and sends it to the others: the
    store would have to send it once for each."""
    if rank == 0 or not engine.replicated:
        checkpoint.restore(fragments, module)
    if engine.replicated:
        tensors = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
        tensors_from_rank_0([*tensors, *state_buffers(module).values()], world_size, engine.device)


def _stored_fragments(config: Config, engine: Engine) -> list[Fragment]:
    """What checkpoints hold of this rank: of a LoRA what is trained alone."""
    return [*engine.fragments(), *(engine.frozen_fragments() if config.lora is None else ())]


def _take_over(
    config: Config, data: RunData, run: Store, rank: int, world_size: int, num_shares: int | None
) -> tuple[CheckpointWriter, Checkpoint | None]:
    """This start becomes the run's only writer; returns its writer, and the checkpoint that all ranks resume from.

    Rank 0 looks for the checkpoint after it has taken the run over: an older start may commit until then.
    """
    attempt, identity = from_rank_0((uuid.uuid4().hex[:8], data.identity), world_size)
    if identity != data.identity:
        raise Unanswered(f"{config.data.url}: was packed again while ranks read it; they start again")
    writer = CheckpointWriter(
        run,
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        keep=config.checkpoint.keep,
        keep_every_images=config.checkpoint.keep_every_images,
        num_shares=num_shares,
    )
    checkpoint = from_rank_0(latest(run) if rank == 0 else None, world_size)
    if checkpoint is not None:
        checkpoint.check_data(data, config.data.url)
        writer.last_commit = (checkpoint.images_seen, checkpoint.marker.time)
    return writer, checkpoint


def _marker(
    config: Config,
    data: RunData,
    fields: RunFields,
    module: RunModule,
    engine: Engine,
    world_size: int,
    lineage: list[Ancestor],
) -> Marker:
    """What the markers of this start's checkpoints have in common."""
    return Marker(
        images_seen=0,
        num_steps=0,
        config=config.model_dump(mode="json"),
        shapes=parameter_shapes(module, trained_only=config.lora is not None),
        state_keys=list(engine.optimizer.state_keys),
        files={},
        world_size=world_size,
        image_shape=fields.shape,
        image_shapes=[list(shape) for shape in fields.shapes],
        classes=list(data.classes),
        data=DataSet.of(data),
        source=None if fields.source is None else DataSet.of(fields.source.manifest),
        target=fields.target,
        conditions=dict(with_levels(fields.conditions, config.levels)),
        frozen=[name for name, one in module.named_parameters() if not one.requires_grad and config.lora is None],
        lineage=lineage,
        own_code=code_hashes(config.model_dump(mode="json")),
    )


def _paired(
    module: RunModule, engine: Engine, batch: Batch, start: Batch | None, fields: RunFields
) -> torch.Tensor | None:
    """What each of the rank's rows is paired with; None where that is the noise of its own position."""
    if not isinstance(module, TrainingModule) or not module.objective.only_flow:
        return None
    images, condition = fields.inputs(batch)
    stored = None if start is None or fields.source is None else fields.source.fields.inputs(start)[0]
    at, condition = engine.device, None if condition is None else condition.to(engine.device)
    stored = None if stored is None else stored.to(at)
    return module.paired_source(images.to(at), condition, batch.position.to(at), stored)


def _step(
    engine: Engine,
    batch: Batch,
    source: torch.Tensor | None,
    fields: RunFields,
    learning_rate: float,
    decays: list[float],
    meter: StepMeter,
    world_size: int,
) -> float:
    """One optimizer step on this rank's share of the global batch; returns the gradient's norm."""
    losses, sigmas = [], []
    rows = len(batch.index) // engine.num_micro_batches
    images, condition = fields.inputs(batch)
    images, positions = (tensor.to(engine.device, non_blocking=True) for tensor in (images, batch.position))
    condition = None if condition is None else condition.to(engine.device, non_blocking=True)
    features = [tensor.to(engine.device, non_blocking=True) for tensor in fields.features_of(batch)]
    for i in range(engine.num_micro_batches):
        part = slice(i * rows, (i + 1) * rows)
        with onednn_products(engine.device):
            given = None if condition is None else condition[part]
            extra = {} if source is None else {"source": source[part]}
            known = [tensor[part] for tensor in features]
            loss, sigma = engine.module(images[part], given, positions[part], *known, **extra)
            engine.backward(loss.mean())
        losses.append(loss.detach())
        sigmas.append(sigma)
    loss, sigma = torch.cat(losses), torch.cat(sigmas)
    try:
        norm = engine.step(learning_rate, decays)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; {_blame(loss, sigma, batch, world_size)}; see docs/faq.md#nan") from None
    meter.add(loss, sigma, images.shape[2:])
    return norm


def _blame(loss: torch.Tensor, sigma: torch.Tensor, batch: Batch, world_size: int) -> str:
    """Which samples of all ranks have a non-finite loss; every rank calls it, as every rank saw the norm."""
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    mine = [(int(batch.index[i]), float(sigma[i]), float(loss[i]), batch.not_finite(i)) for i in bad]
    found = from_all_ranks(mine, world_size)
    if not found:
        return "every sample's loss is finite, so the backward pass overflowed: lower the learning rate or clip"
    index, level, value, data = next((one for one in found if one[3]), found[0])
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    data = f", which holds {data}" if data else ""
    return f"loss {value} at sample {index} (sigma {level:.4g}){data}{more}; nothing was changed by this step"


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` was reached after `before`; with 0, never."""
    return every > 0 and before // every != after // every


def _seed_dropout(seed: int, rank: int, images_seen: int) -> None:
    """Generator state is a function of where the run is, so none is saved (after Karras 2024's training loop)."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + rank * 0xBF58476D1CE4E5B9 + images_seen) % 2**63)
