"""Exported models, read: safetensors, one per EMA length, and model.json; nothing of the training state.

<out>/model.json                  what the network is, written last: config, classes, each file's bytes and SHA-256;
                                  sealed (`data/seal.py`), but for format 1
<out>/vae/                        of a model of latents, the autoencoder (of diffusers or ours) that decodes its samples
<out>/ema-0.050.safetensors       the network's fp32 weights, averaged at that length; names as in its state_dict

A diffusers folder (`sampling/formats`) has the weights in denoiser/, under the names of diffusers, and model.json too;
a LoRA's folder has its adapters, under the names of peft, and a model.json whose lineage names what they adapt.
`sampling/model/export.py` writes them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from scoreray.data.errors import DataError, StorageError, UserError, nearest
from scoreray.data.reading.manifest import Sha256
from scoreray.data.seal import read_sealed, sealed
from scoreray.data.storage.interface import check_key
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.trainer.checkpoints.checkpoint import verified_copy
from scoreray.trainer.checkpoints.marker import Ancestor, Number, StoredFile, page_fields
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.networks.lora import PEFT_PREFIX
from scoreray.trainer.optim.fragments import Fragment

MODEL_JSON = "model.json"
AUTOENCODER = "vae"  # the folder of the autoencoder, as pipelines of diffusers name it
FORMAT = 2
UNSEALED = 1  # the format before seals
PREFIX = "denoiser.network."  # of the network's parameters in the training module
DIFFUSERS_WEIGHTS = "denoiser/diffusion_pytorch_model"  # where diffusers looks for a component's weights
ADAPTERS = "adapter_model.safetensors"  # where peft looks for a LoRA's weights
DENOISER_PREFIX = "network."  # of the network's parameters in its denoiser, which is diffusers' component
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ExportedFile:
    """The weights at one EMA length."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    file: str
    bytes: Number
    sha256: Sha256

    def __post_init__(self) -> None:
        try:
            check_key(self.file)
        except StorageError:
            raise ValueError(f"bad entry for file {self.file!r}: its name leads elsewhere") from None

    @property
    def prefix(self) -> str:
        """What the names of the tensors in it begin with, before those of the network's state_dict."""
        if self.file == ADAPTERS:
            return PEFT_PREFIX
        return DENOISER_PREFIX if self.file.startswith(DIFFUSERS_WEIGHTS) else ""


@dataclass(frozen=True)
class ModelManifest:
    """model.json. checkpoint: the URL of what was exported. files: by EMA length. config: of the run.
    target, conditions, lineage, own_code, image_shapes: as of the checkpoint's marker."""

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
    lineage: list[Ancestor] = field(default_factory=list)
    own_code: dict[str, Sha256] = field(default_factory=dict)
    image_shapes: list[list[Number]] = field(default_factory=list)

    def to_json(self) -> bytes:
        """For people too: a field a line; sealed."""
        fields = {"format": self.format, **page_fields(self)}
        return sealed([f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]).encode()

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> ModelManifest:
        """Of its fields as JSON has them, without a seal. Raises ValueError."""
        return _ADAPTER.validate_json(json.dumps(fields), strict=True)

    @staticmethod
    def from_json(data: bytes, url: str) -> ModelManifest:
        """Raises DataError in one line that names `url`."""
        return read_sealed(_ADAPTER, data, url, "exported model's page", unsealed_format=UNSEALED, place=url)


def with_autoencoder_at(page: ModelManifest, path: str) -> ModelManifest:
    """The page of a model of latents, whose autoencoder is at `path`; AUTOENCODER: in the model's own folder."""
    assert page.target is not None
    assert page.target.encoding is not None
    return replace(page, target=replace(page.target, encoding=replace(page.target.encoding, path=path)))


@dataclass(frozen=True)
class _TensorInHeader:
    """What the header of a safetensors file says of a tensor, as far as it is read here."""

    shape: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class ExportedModel:
    """A folder that `export` wrote; `chosen`: the length of the file that the URL named, if it named one."""

    store: Store
    page: ModelManifest
    chosen: str | None = None

    @property
    def url(self) -> str:
        return self.store.url()

    def weights(self, name: str) -> State:
        """The network's state. Raises UserError (no such length here), DataError (not the bytes that were written)."""
        prefix = self._about(name).prefix
        with self._verified(name) as path:
            return {key.removeprefix(prefix): value for key, value in load_file(path).items()}

    def shapes(self, name: str) -> dict[str, list[int]]:
        """Of the network's state, by the file's header alone. Raises as `weights`."""
        file, prefix = self._about(name).file, self._about(name).prefix
        size = int.from_bytes(self.store.get(file, 0, 8), "little")
        try:
            header = _HEADER.validate_json(self.store.get(file, 8, 8 + size) if size <= LARGEST_HEADER else b"")
        except ValidationError:
            raise DataError(f"{self.store.url(file)}: not a safetensors file: its header can't be read") from None
        return {key.removeprefix(prefix): about.shape for key, about in header.items() if key != "__metadata__"}

    def restore(self, name: str, fragments: Iterable[Fragment]) -> None:
        """Write the weights at a length into every tensor of `fragments`, which are named as in the training module."""
        prefix = self._about(name).prefix
        with self._verified(name) as path, safe_open(path, "pt") as tensors:
            for fragment in fragments:
                values = tensors.get_tensor(f"{prefix}{fragment.name.removeprefix(PREFIX)}").flatten()
                for into in fragment.tensors.values():
                    into.copy_(values[fragment.start : fragment.start + fragment.length])

    def _about(self, name: str) -> ExportedFile:
        if name not in self.page.files:
            raise UserError(f"EMA length '{name}' is not in {self.url}; {nearest(name, self.page.files)}")
        return self.page.files[name]

    def _verified(self, name: str) -> contextlib.AbstractContextManager[Path]:
        about = self._about(name)
        return verified_copy(self.store, about.file, StoredFile(about.bytes, about.sha256))


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
    if page.target is not None and page.target.encoding is not None and page.target.encoding.path == AUTOENCODER:
        page = with_autoencoder_at(page, store.url(AUTOENCODER))
    if file is None:
        return ExportedModel(store, page)
    chosen = [name for name, about in page.files.items() if about.file == file]
    if not chosen:
        raise UserError(f"{url}: not one of the files of {store.url(MODEL_JSON)}")
    return ExportedModel(store, page, chosen[0])


_ADAPTER = TypeAdapter(ModelManifest)
_HEADER = TypeAdapter(dict[str, _TensorInHeader])
