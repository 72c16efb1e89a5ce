"""A run's training records: collected between checkpoints, written with them, read back up to the newest commit."""

from __future__ import annotations

import re

from pydantic import TypeAdapter

from scoreray.data.storage.store import Store
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.segments import Segments
from scoreray.trainer.monitoring import tensorboard
from scoreray.trainer.monitoring.metrics import TrainingRecord

METRICS, FINISHED_TARS = "metrics", "finished_tars"  # folders of a run
RECORDS = Segments(METRICS, TypeAdapter(TrainingRecord))


def read_metrics(run: Store, newest: Checkpoint | None = None, after: int = 0) -> list[TrainingRecord]:
    """A run's committed records beyond `after` images, oldest first. Raises DataError where a file is damaged."""
    return [record for record in RECORDS.read(run, newest, after) if record.images > after]


def record_objects(images_seen: int, records: list[TrainingRecord], plots: bool) -> list[tuple[str, bytes]]:
    """(key, bytes) of what is stored with the checkpoint at `images_seen`: the records, and with `plots` their events
    for TensorBoard."""
    objects = [RECORDS.write(images_seen, records)]
    if plots:
        points = [tensorboard.Point(one.images, one.time, dict(one.scalars())) for one in records]
        objects.append((tensorboard.events_key(images_seen), tensorboard.events_file(points)))
    return objects


def remove_uncommitted(run: Store, images_seen: int) -> None:
    """Remove records that a killed start wrote for a checkpoint that it did not commit: they will be measured again."""
    keys = [key for folder in (METRICS, tensorboard.FOLDER, FINISHED_TARS) for key, _ in run.list(folder + "/")]
    seen = {key: re.search(r"\d{12,}", key.rpartition("/")[2]) for key in keys}  # others' files have no such number
    run.delete([key for key, found in seen.items() if found and int(found[0]) > images_seen])
