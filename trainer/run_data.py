"""The data of a run, a packed set or tars without a manifest: what is known of them, and the batches of a rank."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter

from scoreray.data.buckets.bucket_stream import BucketStream
from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import UserError
from scoreray.data.reading.batches import BatchStream
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.quarantine import Quarantine
from scoreray.data.reading.stream import Stream
from scoreray.data.storage.store import Store
from scoreray.data.unpacked.tar_stream import FinishedTar, TarStream, check_world_size
from scoreray.data.unpacked.tars import TarSettings, UnpackedTars, open_data
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.segments import Segments
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.ranks import from_all_ranks, from_rank_0
from scoreray.trainer.records import FINISHED_TARS

RunData = Manifest | BucketedSet | UnpackedTars
FINISHED = Segments(FINISHED_TARS, TypeAdapter(FinishedTar))


def open_run_data(config: Config, *, patient: bool = True) -> RunData:
    """What is known of the data at `data.url`. Raises UserError, DataError, StorageError; where not `patient`, the last
    within seconds where the store does not answer."""
    section = config.data
    settings = TarSettings(section.num_classes, section.image_size, section.on_error == "quarantine")
    data = open_data(section.url, settings, patient=patient)
    if isinstance(data, UnpackedTars):
        check_world_size(data, config.world_sizes[-1])
        if section.cache_dir is not None:
            raise UserError(
                f"data.cache_dir: {section.cache_dir}, and tars without a manifest are read from start to end and not "
                "kept; leave it out, or scoreray data pack indexes them"
            )
    return data


def open_batches(
    config: Config,
    data: RunData,
    fields: RunFields,
    position: int,
    rank: int,
    world_size: int,
    device: torch.device,
    quarantine: Quarantine | None,
    finished: list[FinishedTar],
) -> BatchStream:
    """This rank's batches from `position` on."""
    section = config.data
    shared: dict[str, Any] = {
        "global_batch_size": section.global_batch_size,
        "rank": rank,
        "world_size": world_size,
        "seed": config.run.seed,
        "position": position,
        "num_lanes": section.num_lanes,
        "shuffle_block": section.shuffle_block,
        "prefetch_batches": section.prefetch_batches,
        "pin_memory": device.type == "cuda",
        "quarantine": quarantine,
    }
    if isinstance(data, UnpackedTars):
        return TarStream(data, **shared, finished=finished)
    shared |= {"cache_dir": section.cache_dir, "cache_dir_bytes": section.cache_bytes, "fields": fields.requests}
    if isinstance(data, BucketedSet):
        return BucketStream(data, **shared)
    return Stream(str(section.url), **shared, manifest=data)


class FinishedTars:
    """Which tars a run has gone through, committed with its checkpoints: a resume goes on with the others. Of packed
    data nothing, where the position says it all."""

    def __init__(self, run: Store, data: RunData, rank: int, world_size: int, newest: Checkpoint | None) -> None:
        """Every rank makes one; rank 0 alone reads. `newest`: the checkpoint that the run resumes from."""
        self._world_size = world_size
        self.known: list[FinishedTar] = []
        if newest and isinstance(data, UnpackedTars):
            self.known = from_rank_0(FINISHED.read(run, newest) if rank == 0 else [], world_size)

    def objects(self, stream: BatchStream, images_seen: int) -> list[tuple[str, bytes]]:
        """(key, bytes) of those that all ranks finished since the last call; every rank calls it."""
        if not isinstance(stream, TarStream):
            return []
        found = from_all_ranks(stream.finished, self._world_size)
        stream.finished = []
        return [FINISHED.write(images_seen, found)] if found else []
