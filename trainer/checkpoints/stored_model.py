"""Which model is at a URL, at which EMA length: a run, a checkpoint or an exported model, read before any weights.

`sampling/model/describe.py` describes it to whatever draws samples; a run begins from it (`trainer/initial.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TypeVar

from scoreray.data.errors import DataError, UserError
from scoreray.data.own_code import check_stored
from scoreray.trainer.checkpoints.checkpoint import MARKER, SNAPSHOTS, Checkpoint, find
from scoreray.trainer.checkpoints.exported import MODEL_JSON, PREFIX, ExportedModel, ModelManifest, State, find_exported
from scoreray.trainer.checkpoints.marker import Ancestor, Marker
from scoreray.trainer.checkpoints.tensor_file import write_tensors
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.diffusion.condition import Conditions, class_condition
from scoreray.trainer.networks.lora import merged, stored_adapters
from scoreray.trainer.networks.network import build_network
from scoreray.trainer.optim.ema import RAW, choose_length, lengths_stored, state_key
from scoreray.trainer.optim.fragments import Fragment

T = TypeVar("T")


@dataclass(frozen=True)
class StoredModel:
    """A model without its weights. ema: the length that was chosen; lengths: every one that it holds, spelled alike."""

    source: Checkpoint | ExportedModel
    config: Config
    lengths: tuple[str, ...]
    ema: str

    @property
    def page(self) -> ModelManifest | Marker:
        return _page(self.source)

    @property
    def url(self) -> str:
        return self.source.url

    @property
    def is_lora(self) -> bool:
        """Whether it holds adapters alone, of the model that is the first of its lineage."""
        return self.config.lora is not None

    @property
    def conditions(self) -> Conditions:
        """What its network was built for."""
        return conditions_of_page(self.page)

    @cached_property
    def sha256(self) -> str:
        """One hash of the model: of all its files, and the length."""
        hashes = sorted(about.sha256 for about in self.page.files.values())
        hashes += [origin.sha256 for origin in self.page.lineage[:1] if self.is_lora]
        return hashlib.sha256(json.dumps([hashes, self.ema]).encode()).hexdigest()

    def lineage(self) -> list[Ancestor]:
        """Of a run that begins from it."""
        source = self.source
        key = MODEL_JSON if isinstance(source, ExportedModel) else f"{source.folder}/{MARKER}"
        digest = hashlib.sha256(source.store.get(key)).hexdigest()
        return [Ancestor(self.url, self.ema, self.page.images_seen, digest), *self.page.lineage]

    def lineage_of_lora(self) -> list[Ancestor]:
        """Of a LoRA of it: by its weights too, all of which are read for that."""
        first, *others = self.lineage()
        return [replace(first, weights=weights_sha256(self)), *others]

    def shapes(self) -> Mapping[str, list[int]]:
        """Of the network's parameters and buffers, by name."""
        if self.is_lora:
            return find_base(self.url, self.page).shapes()
        if isinstance(self.source, ExportedModel):
            return self.source.shapes(self.ema)
        buffers = {name: list(buffer.shape) for name, buffer in self.buffers().items()}
        return {**of_network(self.source.marker.shapes), **buffers}

    def restore(self, fragments: Iterable[Fragment]) -> None:
        """Write the network's weights at `ema` into the one tensor of each of `fragments`, any partition of some of its
        parameters, named as in the training module. Raises DataError (its bytes are not what was committed)."""
        if self.is_lora:
            state = {PREFIX + name: values.flatten() for name, values in self.weights().items()}
            for one in fragments:
                for into in one.tensors.values():
                    into.copy_(state[one.name][one.start : one.start + one.length])
            return
        if isinstance(self.source, ExportedModel):
            self.source.restore(self.ema, fragments)
            return
        key = state_key(self.ema)
        self.source.read(replace(one, tensors={key: into}) for one in fragments for into in one.tensors.values())

    def buffers(self) -> State:
        """Of the network, by name (of an exported model, its parameters too)."""
        if self.is_lora:
            return find_base(self.url, self.page).buffers()
        if isinstance(self.source, ExportedModel):
            return self.source.weights(self.ema)
        return of_network(self.source.buffers())

    def weights(self) -> State:
        """The network's state at `ema`, of a LoRA with its adapters merged into what they adapt. Raises DataError (its
        bytes are not what was committed), StorageError, and of a LoRA UserError, as of `find_base`."""
        return self.whole(self.stored_weights())

    def stored_weights(self) -> State:
        """What is stored of the network's state at `ema`: of a LoRA its adapters, as peft names them."""
        if isinstance(self.source, ExportedModel):
            wrapped = self.config.network.wrapped_prefix if self.is_lora else ""
            return {wrapped + name: tensor for name, tensor in self.source.weights(self.ema).items()}
        return self.named(self.source.full_state(state_key(self.ema)))

    def named(self, training_state: State) -> State:
        """What belongs to the network of the tensors of its training module, with the names of `stored_weights`."""
        state = of_network(training_state)
        return stored_adapters(state) if self.is_lora else state

    def whole(self, stored: State) -> State:
        """The network's state, from what is stored of it."""
        if self.config.lora is None:
            return stored
        base = find_base(self.url, self.page).weights()
        network = build_network(self.config.network, self.page.image_shape, self.conditions)
        return merged(network, self.config.lora, base, stored)


def find_model(url: str, ema: str | None = None) -> StoredModel:
    """The model at a URL, at an EMA length.

    url: a run (its newest committed checkpoint), one checkpoint's folder, or an exported model (its folder or one of
    its safetensors files), `s3://` or a path.
    ema: a length that it holds, in any spelling of the number ("0.05", "0.050"); None for the first one, "none" for
    the weights without averaging.
    Raises UserError (nothing is there, no such length), DataError (what is there describes no model), StorageError.
    """
    source = find_exported(url) or find(url)
    page = _page(source)
    check_stored(page.config, page.own_code, url)
    try:
        config = load_config(page.config)
        lengths = _lengths(source, config)
    except (TypeError, UserError) as error:
        raise DataError(f"{url}: does not describe a model: {error}") from None
    if not lengths or not page.image_shape:
        what = "the shape of its samples is not there" if lengths else "it holds weights of no EMA length"
        raise DataError(f"{url}: does not describe a model: {what}")
    chosen = source.chosen if isinstance(source, ExportedModel) and ema is None else None
    return StoredModel(source, config, lengths, chosen or choose_length(ema, lengths, url, config.ema.stds))


def find_named(section: str, checkpoint: str, ema: str | None) -> StoredModel:
    """The model that a section of a config names by `checkpoint` and `ema`, "weights" for those without averaging.
    Errors as of `find_model`, in the section's words."""
    try:
        return find_model(checkpoint, RAW if ema == "weights" else ema)
    except UserError as error:
        raise UserError(f"{section}.checkpoint: {error}") from None


def find_base(url: str, page: ModelManifest | Marker) -> StoredModel:
    """The model that a LoRA at `url` adapts. Raises UserError where it is gone or another than it was trained on."""
    if not page.lineage:
        raise DataError(f"{url}: a LoRA that does not say of which model")
    origin = page.lineage[0]
    try:
        base = find_model(origin.checkpoint, origin.ema)
    except UserError as error:
        raise UserError(f"{url}: a LoRA of {origin.text()}, which is not there: {error}") from None
    check_base(url, origin, base)
    return base


def check_base(url: str, wanted: Ancestor, base: StoredModel) -> None:
    """Raises UserError unless `base` is what the LoRA at `url` was trained on, or holds the same weights elsewhere."""
    found = base.lineage()[0]
    if (wanted.sha256, wanted.ema) == (found.sha256, found.ema):
        return
    if wanted.weights is None or wanted.weights != weights_sha256(base):
        raise UserError(f"{url}: a LoRA of another model: of {wanted.text()}; this is {found.text()}")


def weights_sha256(model: StoredModel) -> str:
    """SHA-256 of the safetensors file that an export of the model at its EMA length is (1 s a GB where all is read)."""
    page = model.page
    if isinstance(page, ModelManifest) and not model.is_lora and not page.files[model.ema].prefix:
        return page.files[model.ema].sha256
    return _digest_of(model.url, model.ema, model.sha256)


@lru_cache(maxsize=16)  # a service looks its models up every few seconds
def _digest_of(url: str, ema: str, sha256: str) -> str:
    """sha256: of the model, so that another one under its URL is read again."""
    with open(os.devnull, "wb") as nothing:
        return write_tensors(nothing, find_model(url, ema).weights())[1]


def conditions_of_page(page: ModelManifest | Marker) -> Conditions:
    """What the network was built for; a page of before conditions names classes alone."""
    return class_condition(page.classes) if page.conditions is None else page.conditions


def _page(source: Checkpoint | ExportedModel) -> ModelManifest | Marker:
    return source.page if isinstance(source, ExportedModel) else source.marker


def _lengths(source: Checkpoint | ExportedModel, config: Config) -> tuple[str, ...]:
    """The lengths that are stored, the config's first one first; of a checkpoint, the weights without averaging too."""
    if isinstance(source, ExportedModel):
        return tuple(source.page.files)
    stored = lengths_stored(source.marker.state_keys)
    ordered = [length for length in config.ema.names if length in stored]
    raw = () if f"/{SNAPSHOTS}/" in source.url else (RAW,)  # a snapshot is the averages alone
    return (*ordered, *(length for length in stored if length not in ordered), *raw)


def of_network(named: Mapping[str, T]) -> dict[str, T]:
    """What the training module calls the network's, as the network calls it."""
    return {name.removeprefix(PREFIX): value for name, value in named.items() if name.startswith(PREFIX)}
