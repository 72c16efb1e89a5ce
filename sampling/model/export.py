"""Export: the networks of a checkpoint as models for inference (`trainer/checkpoints/exported.py` reads them)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from scoreray.data.errors import UserError
from scoreray.data.scratch import scratch_file
from scoreray.data.storage.store import Store, open_store
from scoreray.sampling.grids.stored import copy_grids
from scoreray.sampling.model.describe import ModelInfo, info_of
from scoreray.trainer.checkpoints.checkpoint import MARKER, Checkpoint
from scoreray.trainer.checkpoints.exported import (
    AUTOENCODER,
    DIFFUSERS_WEIGHTS,
    FORMAT,
    MODEL_JSON,
    ExportedFile,
    ExportedModel,
    ModelManifest,
    State,
    with_autoencoder_at,
)
from scoreray.trainer.checkpoints.marker import page_fields
from scoreray.trainer.checkpoints.stored_model import StoredModel, find_model
from scoreray.trainer.checkpoints.tensor_file import write_tensors
from scoreray.trainer.checkpoints.unfinished import FolderWriter, being_written
from scoreray.trainer.config import Config
from scoreray.trainer.encoders.diffusers import DiffusersAutoencoder, autoencoder_files
from scoreray.trainer.encoders.load import load_autoencoder
from scoreray.trainer.encoders.scoreray import ScorerayAutoencoder
from scoreray.trainer.optim.ema import RAW, choose_length, lengths_stored
from scoreray.trainer.run_folder import CONFIG_FILE

OURS = rf"((ema-([0-9.]+|half-life)|weights-none)\.safetensors|{DIFFUSERS_WEIGHTS}(\.[a-z0-9_-]+)?\.safetensors)"


@dataclass(frozen=True)
class ModelToExport:
    """A model on its way out. page: its model.json, without files; config: the page's; states: what reads the network's
    weights, by EMA length, the one that is used by default first."""

    page: ModelManifest
    config: Config
    states: Mapping[str, Callable[[], State]]

    @property
    def default(self) -> str:
        """The EMA length that is used by default."""
        return next(iter(self.states))

    def info(self, length: str) -> ModelInfo:
        return info_of(self.page, self.page.checkpoint, length, self.config)


def export(checkpoint: str | Checkpoint, out: str, lengths: Sequence[str] = ()) -> dict[str, Any]:
    """Write the networks of a committed checkpoint to `out` (a folder or `s3://` prefix); returns model.json's fields.

    lengths: tracked EMA lengths ("0.050", "none" for raw weights); all tracked ones when empty.
    Raises UserError (not committed, no such length), DataError (damaged), StorageError.
    """
    stored, store = find_model(checkpoint if isinstance(checkpoint, str) else checkpoint.url), open_store(out)
    page = write_model(model_to_export(stored, lengths), store)
    copy_grids(stored.source.store, store)
    return page_fields(page)


def model_to_export(
    stored: StoredModel,
    lengths: Sequence[str] = (),
    states: Mapping[str, Callable[[], State]] | None = None,
    *,
    adapters_alone: bool = False,
) -> ModelToExport:
    """Of a checkpoint, or of a model that was exported or imported before.

    states: whole training states by length for those that are not in a checkpoint (`trainer/checkpoints/posthoc.py`).
    adapters_alone: a LoRA stays one; else it is merged into what it adapts.  Raises UserError for an unknown length.
    """
    states, source = states or {}, stored.source

    def weights(name: str) -> State:
        at = replace(stored, ema=name)
        found = stored.named(states[name]()) if name in states else at.stored_weights()
        return found if adapters_alone else at.whole(found)

    known: Sequence[str] = stored.lengths
    default: Sequence[str] = stored.lengths
    if isinstance(source, ExportedModel):
        default = (source.chosen,) if source.chosen else default
        page = replace(source.page, files={}, format=FORMAT)
    else:
        marker, tracked = source.marker, lengths_stored(source.marker.state_keys)
        known, default = (*tracked, *states, RAW), tracked
        page = ModelManifest(
            source.url, marker.images_seen, marker.image_shape, marker.classes, {}, marker.config,
            target=marker.target, conditions=marker.conditions, lineage=marker.lineage, own_code=marker.own_code,
            image_shapes=marker.image_shapes,
        )  # fmt: skip
    if stored.is_lora and not adapters_alone:
        page = replace(page, config={**page.config, "lora": None})
    names = dict.fromkeys([choose_length(name, known, stored.url) for name in lengths] or default)
    return ModelToExport(page, stored.config, {name: partial(weights, name) for name in names})


def check_other_place(store: Store, model: StoredModel) -> None:
    """Raises UserError where a folder to write to is the model's own: its model.json would hide a run."""
    if store.root == model.source.store.root:
        raise UserError(f"{store.url()}: is the model itself; give another folder")
    _check_no_run(store)


def _check_no_run(store: Store) -> None:
    """Raises UserError where a folder to write to is a run's or a checkpoint's: verbs look for model.json first."""
    for key, what in ((MARKER, "checkpoint"), (CONFIG_FILE, "run")):
        if store.exists(key):
            raise UserError(f"{store.url()}: holds a {what}, which a model's files would hide; give another folder")


def file_name(length: str) -> str:
    """Without its suffix: of the weights at an EMA length."""
    return f"weights-{length}" if length == RAW else f"ema-{length}"


def write_model(
    model: ModelToExport,
    store: Store,
    files: Mapping[str, str] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> ModelManifest:
    """Writes weights, what belongs `beside` them, and model.json last.

    files: by length, of what file the weights are, where it is not that of our own format. Raises UserError where
    `store` is a run's.
    """
    _check_no_run(store)
    beside = {**(beside or {})}
    keys = {name: files[name] if files else f"{file_name(name)}.safetensors" for name in model.states}
    with being_written(store, MODEL_JSON, [*beside, *keys.values()]) as folder:
        store.delete(beside)
        page = _with_autoencoder(model.page, folder)
        written = {}
        for name, weights in model.states.items():
            written[name] = put_weights(store, keys[name], weights())
        for key, data in beside.items():
            store.put(key, data)
        page = replace(page, files=written)
        folder.commit(page.to_json())
        prefixes = ("ema-", "weights-", DIFFUSERS_WEIGHTS)
        stored = {key for start in prefixes for key, _ in store.list(start) if re.fullmatch(OURS, key)}
        store.delete(stored - {about.file for about in written.values()})  # of an earlier export
    return page


def has_autoencoder(page: ModelManifest) -> bool:
    """Whether a model's folder gets the autoencoder that decodes its samples: a whole model's, of diffusers or ours."""
    encoding = None if page.target is None else page.target.encoding
    kinds = (DiffusersAutoencoder.kind, ScorerayAutoencoder.kind)
    return encoding is not None and encoding.kind in kinds and page.config.get("lora") is None


def _with_autoencoder(page: ModelManifest, folder: FolderWriter) -> ModelManifest:
    """Puts the autoencoder, if `has_autoencoder`, into a folder of it; the page that says so."""
    if not has_autoencoder(page) or page.target is None or page.target.encoding is None:
        return page
    found, place = load_autoencoder(page.target.encoding, "cpu"), open_store(folder.store.url(AUTOENCODER))
    if found.kind == ScorerayAutoencoder.kind:
        stored = find_model(found.path)
        folder.lists(f"{AUTOENCODER}/{name}" for name in (f"{file_name(stored.ema)}.safetensors", MODEL_JSON))
        write_model(model_to_export(stored, [stored.ema]), place)
    else:
        files = autoencoder_files(replace(page.target.encoding, path=found.path))
        folder.lists(f"{AUTOENCODER}/{name}" for name in files)
        for name, data in files.items():
            place.put(name, data)
    return with_autoencoder_at(page, AUTOENCODER)


def put_weights(store: Store, key: str, weights: State) -> ExportedFile:
    """Writes a network's state to a safetensors file."""
    prefix = ExportedFile(key, 0, "").prefix
    with scratch_file() as (file, path):
        tensors = {f"{prefix}{name}": tensor.detach().cpu() for name, tensor in weights.items()}
        size, digest = write_tensors(file, tensors)
        store.put(key, path)
    return ExportedFile(key, size, digest)
