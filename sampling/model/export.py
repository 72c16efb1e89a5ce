"""Export: the networks of a checkpoint as models for inference (`trainer/checkpoints/exported.py` reads them)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from scoreray.data.scratch import scratch_file
from scoreray.data.storage.store import Store, open_store
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, find
from scoreray.trainer.checkpoints.exported import MODEL_JSON, PREFIX, ExportedFile, ModelManifest, State
from scoreray.trainer.checkpoints.tensor_file import write_tensors
from scoreray.trainer.optim.ema import RAW, choose_length, lengths_stored, state_key

OURS = r"(ema-([0-9.]+|half-life)|weights-none)\.safetensors"


def export(
    checkpoint: str | Checkpoint,
    out: str,
    lengths: Sequence[str] = (),
    *,
    states: Mapping[str, Callable[[], State]] | None = None,
) -> dict[str, Any]:
    """Write the networks of a committed checkpoint to `out` (a folder or `s3://` prefix); returns model.json's fields.

    lengths: tracked EMA lengths ("0.050", "none" for raw weights); all tracked ones when empty.
    states: whole training states by length for those not in the checkpoint (`trainer/checkpoints/posthoc.py`).
    Raises UserError (not committed, no such length), DataError (damaged), StorageError.
    """
    checkpoint = find(checkpoint) if isinstance(checkpoint, str) else checkpoint
    states = states or {}
    tracked = lengths_stored(checkpoint.marker.state_keys)
    names = [choose_length(name, (*tracked, *states, RAW), checkpoint.url) for name in lengths] or tracked
    marker = checkpoint.marker
    page = ModelManifest(
        checkpoint.url, marker.images_seen, marker.image_shape, marker.classes, {}, marker.config,
        target=marker.target, conditions=marker.conditions, lineage=marker.lineage, own_code=marker.own_code,
    )  # fmt: skip

    def weights_of(name: str) -> State:
        state = states[name]() if name in states else checkpoint.full_state(state_key(name))
        return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}

    return asdict(write_model(out, {name: partial(weights_of, name) for name in names}, page))


def write_model(out: str, states: Mapping[str, Callable[[], State]], page: ModelManifest) -> ModelManifest:
    """Writes the network's state at each length, read one at a time, then `page` with the files that hold them."""
    store = open_store(out)
    store.delete([MODEL_JSON])
    files = {
        name: _put(store, f"weights-{name}.safetensors" if name == RAW else f"ema-{name}.safetensors", state())
        for name, state in states.items()
    }
    page = replace(page, files=files)
    store.put(MODEL_JSON, page.to_json())
    stored = {key for start in ("ema-", "weights-") for key, _ in store.list(start) if re.fullmatch(OURS, key)}
    store.delete(stored - {about.file for about in files.values()})  # of an earlier export
    return page


def _put(store: Store, key: str, weights: State) -> ExportedFile:
    with scratch_file() as (file, path):
        size, digest = write_tensors(file, {name: tensor.detach().cpu() for name, tensor in weights.items()})
        store.put(key, path)
    return ExportedFile(key, size, digest)
