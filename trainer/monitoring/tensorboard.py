"""TensorBoard event files as bytes: written in one piece with the checkpoint that they lead to, read by `tensorboard`.

A run's records reach TensorBoard only with their commit, so a run that was killed and resumed plots nothing twice. An
open `SummaryWriter` would append to a file as it goes, which an object store cannot do and a kill would cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scoreray.data.scratch import scratch_folder

FOLDER = "tensorboard"  # of a run: `tensorboard --logdir <run>/tensorboard`


@dataclass(frozen=True)
class Point:
    """Values at one step. `time`: Unix time, s."""

    step: int
    time: float
    values: dict[str, float]


def events_file(points: Iterable[Point]) -> bytes:
    """A whole event file; steps are images seen."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    points = list(points)
    events = [Event(wall_time=points[0].time if points else 0, file_version="brain.Event:2")]
    for point in points:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=one) for tag, one in point.values.items()])
        events.append(Event(wall_time=point.time, step=point.step, summary=summary))
    with scratch_folder() as folder:
        path = folder / "events"
        writer = RecordWriter(str(path))
        for event in events:
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


def events_key(images_seen: int) -> str:
    """Key in a run of the events up to a checkpoint; TensorBoard reads a folder's files in the order of their names."""
    return f"{FOLDER}/events.out.tfevents.{images_seen:012d}"
