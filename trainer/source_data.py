"""The data set that a flow starts from, `objective.source: {kind: data}`: checked against the run's, and its batches.

It is read at the run's positions by a stream of its own, so each of its samples is met once in as many positions as it
has samples, at any world size and after any resume, whatever the size of the run's own data set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scoreray.data.errors import UserError
from scoreray.data.reading.batches import BatchStream
from scoreray.data.reading.manifest import Manifest
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.marker import DataSet
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import FlowStart, RunFields, run_fields
from scoreray.trainer.flows.sources import SOURCE_SEED, DataSetSource
from scoreray.trainer.run_data import open_batches, open_run_data


def source_config(config: Config) -> Config | None:
    """The config of a run on the source's data set alone, with an order of its own; None where noise is the source."""
    source = getattr(config.objective, "source", None)
    if not isinstance(source, DataSetSource):
        return None
    chosen: dict[str, Any] = {
        "url": source.url,
        "target": source.target,
        "conditions": {},
        "on_error": "stop",
        "shuffle_block": None,
    }
    seed = {"seed": (config.run.seed + SOURCE_SEED) % 2**63}
    data, run = config.data.model_copy(update=chosen), config.run.model_copy(update=seed)
    return config.model_copy(update={"data": data, "run": run, "autoencoder": None})


def with_source(config: Config, fields: RunFields, *, patient: bool = True) -> RunFields:
    """`fields` with what is read of the source's data set. Raises UserError where it is not packed or its samples are
    of another shape, DataError, StorageError."""
    own = source_config(config)
    if own is None:
        return fields
    try:
        data = open_run_data(own, patient=patient)
        if not isinstance(data, Manifest) or fields.shapes:
            raise UserError(f"{own.data.url}: must be a packed data set of one size, as must the run's own")
        found = run_fields(own.data, data)
        if found.shape != fields.shape:
            raise UserError(
                f"{own.data.url}: samples '{found.target.name}' are of shape {found.shape}, the run's '"
                f"{fields.target.name}' of {fields.shape}; both must be the same"
            )
    except UserError as error:
        raise UserError(f"objective.source: {error}") from None
    return replace(fields, source=FlowStart(data, found))


def check_source(checkpoint: Checkpoint, fields: RunFields) -> None:
    """Raises UserError unless the source's data set is the one that `checkpoint` was trained from."""
    found = None if fields.source is None else DataSet.of(fields.source.manifest)
    if found != checkpoint.marker.source:
        raise UserError(
            f"objective.source.url: is not the data set that {checkpoint.url} was trained from; give the same samples, "
            "or begin a new run (another run.name, or --fresh)"
        )


def source_batches(
    config: Config, fields: RunFields, position: int, rank: int, world_size: int, device: torch.device
) -> BatchStream | None:
    """The rank's batches of the source's data set from `position` on; None where noise is the source."""
    own = source_config(config)
    if own is None or fields.source is None:
        return None
    start = fields.source
    return open_batches(own, start.manifest, start.fields, position, rank, world_size, device, None, [])
