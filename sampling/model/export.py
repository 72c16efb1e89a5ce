"""Models for inference: safetensors, one per EMA length, and model.json; nothing of the training state.

<out>/model.json                  what the network is, written last: config, classes, each file's bytes and SHA-256;
                                  sealed (`data/seal.py`), but for format 1
<out>/ema-0.050.safetensors       the network's fp32 weights, averaged at that length; names as in its state_dict
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors.torch import load_file

from scoreray.data.errors import UserError, nearest
from scoreray.data.reading.manifest import Sha256
from scoreray.data.scratch import scratch_file
from scoreray.data.seal import read_sealed, sealed
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, find, verified_copy
from scoreray.trainer.checkpoints.marker import Number, StoredFile
from scoreray.trainer.checkpoints.tensor_file import write_tensors
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.optim.ema import RAW, choose_length, lengths_stored, state_key

MODEL_JSON = "model.json"
FORMAT = 2
UNSEALED = 1  # the format before seals
PREFIX = "denoiser.network."  # of the network's parameters in the training module
OURS = r"(ema-([0-9.]+|half-life)|weights-none)\.safetensors"

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ExportedFile:
    """The weights at one EMA length."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    file: str
    bytes: Number
    sha256: Sha256

    def __post_init__(self) -> None:
        if "/" in self.file or "\0" in self.file:
            raise ValueError(f"bad entry for file {self.file!r}: its name leads elsewhere")


@dataclass(frozen=True)
class ModelManifest:
    """model.json. checkpoint: the URL of what was exported. files: by EMA length. config: of the run.
    target, conditions: as of the checkpoint's marker."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    checkpoint: str
    images_seen: Number
    image_shape: list[Number]
    classes: list[str]
    files: dict[str, ExportedFile]
    config: dict[str, Any] = field(repr=False)
    format: Annotated[int, Field(ge=UNSEALED, le=FORMAT)] = FORMAT
    target: TargetField | None = None
    conditions: dict[str, ConditionSpec] | None = None

    def to_json(self) -> bytes:
        """For people too: a field a line; sealed."""
        fields = {"format": self.format, **asdict(self)}
        return sealed([f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]).encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> ModelManifest:
        """Raises DataError in one line that names `url`."""
        return read_sealed(_ADAPTER, data, url, "exported model's page", unsealed_format=UNSEALED, place=url)


@dataclass(frozen=True)
class ExportedModel:
    """A folder that `export` wrote; `chosen`: the length of the file that the URL named, if it named one."""

    store: Store
    page: ModelManifest
    chosen: str | None = None

    def weights(self, name: str) -> State:
        """The network's state. Raises UserError (no such length here), DataError (not the bytes that were written)."""
        files = self.page.files
        if name not in files:
            raise UserError(f"EMA length '{name}' is not in {self.store.url()}; {nearest(name, files)}")
        about = files[name]
        with verified_copy(self.store, about.file, StoredFile(about.bytes, about.sha256)) as path:
            return load_file(path)


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
    store = open_store(out)
    store.delete([MODEL_JSON])
    files = {}
    for name in dict.fromkeys(names):
        state = states[name]() if name in states else checkpoint.full_state(state_key(name))
        weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        files[name] = _put(store, f"weights-{name}.safetensors" if name == RAW else f"ema-{name}.safetensors", weights)
    marker = checkpoint.marker
    page = ModelManifest(
        checkpoint.url, marker.images_seen, marker.image_shape, marker.classes, files, marker.config,
        target=marker.target, conditions=marker.conditions,
    )  # fmt: skip
    store.put(MODEL_JSON, page.to_json())
    stored = {key for start in ("ema-", "weights-") for key, _ in store.list(start) if re.fullmatch(OURS, key)}
    store.delete(stored - {about.file for about in files.values()})  # of an earlier export
    return asdict(page)


def find_exported(url: str) -> ExportedModel | None:
    """The exported model at `url`, a folder or one of its safetensors files; None when it is something else.

    Raises DataError when its model.json is not one.
    """
    folder, file = url.rstrip("/"), None
    if folder.endswith(".safetensors"):
        folder, _, file = folder.rpartition("/")
    store = open_store(folder or ".")
    store.check_reachable()
    try:
        page = ModelManifest.from_json(store.get(MODEL_JSON), store.url(MODEL_JSON))
    except NotFound:
        if file is None:
            return None
        raise UserError(f"{url}: no {MODEL_JSON} is beside it, so it is not a model that was exported") from None
    if file is None:
        return ExportedModel(store, page)
    chosen = [name for name, about in page.files.items() if about.file == file]
    if not chosen:
        raise UserError(f"{url}: not one of the files of {store.url(MODEL_JSON)}")
    return ExportedModel(store, page, chosen[0])


def _put(store: Store, key: str, weights: State) -> ExportedFile:
    with scratch_file() as (file, path):
        size, digest = write_tensors(file, {name: tensor.detach().cpu() for name, tensor in weights.items()})
        store.put(key, path)
    return ExportedFile(key, size, digest)


_ADAPTER = TypeAdapter(ModelManifest)
