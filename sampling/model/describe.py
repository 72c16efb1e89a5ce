"""Which model is at a URL, of which kind, at which EMA length: read from its JSON, before any weights.

Whatever takes the URL of a model (sample, serve, evaluate, export, tune) calls `describe`, so all of them know the same
URLs, the same spellings of a length, and refuse in the same words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from scoreray.data.classes import class_number
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.description import DataDescription
from scoreray.data.fields.limits import is_picture
from scoreray.sampling.model.export import PREFIX, ExportedModel, ModelManifest, find_exported
from scoreray.sampling.samplers.sigmas import from_process, grid
from scoreray.trainer.checkpoints.checkpoint import FOLDER, SNAPSHOTS, Checkpoint, find
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.condition_values import described
from scoreray.trainer.config.run_fields import TargetField, run_fields
from scoreray.trainer.diffusion.condition import ConditionSpec, class_condition, classes_of
from scoreray.trainer.optim.ema import RAW, choose_length, lengths_stored, state_key
from scoreray.trainer.step import to_uint8

PROCESS_GRID = "process"  # the grid's name that means the process's own times
SIGMA_RANGE = (0.002, 80.0)  # flow matching starts at pure noise and many processes end at none: a grid can't


@dataclass(frozen=True)
class ModelInfo:
    """Where a model comes from and what it draws. classes: of its one class condition, if it has one."""

    url: str
    images_seen: int
    ema: str
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    config: Config
    conditions: Mapping[str, ConditionSpec] = field(default_factory=dict)
    target: TargetField | None = None

    @staticmethod
    def planned(config: Config, data: DataDescription) -> ModelInfo:
        """Of a model that is yet to be trained on these data. Raises UserError."""
        fields, length = run_fields(config.data, data), config.ema.names[0]
        classes, shape = classes_of(fields.conditions), tuple(fields.shape)
        return ModelInfo("", 0, length, shape, classes, config, fields.conditions, fields.target)

    @property
    def takes(self) -> str:
        """What conditions it, as a person reads it."""
        return "; ".join(f"{name}: {described(spec)}" for name, spec in self.conditions.items()) or "no conditions"

    def class_number(self, label: str | int | None) -> int:
        """The class meant by a number or a name; -1 for None. Raises UserError (`data.classes`)."""
        return class_number(label, self.classes)

    @property
    def is_picture(self) -> bool:
        """Whether its samples are grey or RGB pictures, -1 black and 1 white; else values in units of their own. Of a
        checkpoint that does not know what field it models, those of such a shape are."""
        return is_picture(self.image_shape) and (self.target is None or self.target.kind == "image")

    @property
    def sample_dtype(self) -> Literal["uint8", "float32"]:
        """Of samples in the data's units: those of pictures are 0 to 255."""
        return "uint8" if self.is_picture else "float32"

    def in_data_units(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples float32 [b, ...] as a model draws them -> in the units of the data that it was trained on, of
        `sample_dtype`: the one way out for files, answers and pictures."""
        if self.is_picture:
            return to_uint8(samples)
        normaliser = None if self.target is None else self.target.normaliser
        return samples if normaliser is None else normaliser.invert(samples)

    @property
    def is_machine(self) -> bool:
        """Whether it is a restricted Boltzmann machine, which knows no noise level and has no denoiser."""
        return self.config.network.is_machine

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels that the run's process covers, as far as a grid can."""
        low, high = self.config.process.sigma_range()
        return max(low, SIGMA_RANGE[0]), min(high, max(SIGMA_RANGE[1], 2 * low))

    def sigmas(self, steps: int, name: str = "karras") -> torch.Tensor:
        """A grid of `steps` levels: one of `sigmas.GRIDS` over `sigma_range`, or "process", even in the process's t."""
        if name == PROCESS_GRID:
            return from_process(self.config.process, steps)
        return grid(name, steps, *self.sigma_range)


@dataclass(frozen=True)
class Description:
    """A model without its weights. lengths: every EMA length that it holds, as `info.ema` spells them."""

    info: ModelInfo
    lengths: tuple[str, ...]
    source: Checkpoint | ExportedModel

    @property
    def follows_run(self) -> bool:
        """Whether the URL is a run's, which means its newest checkpoint."""
        return isinstance(self.source, Checkpoint) and self.source.folder.startswith(f"{FOLDER}/")

    @cached_property
    def sha256(self) -> str:
        """One hash of the model: of all its files, and the length."""
        hashes = sorted(about.sha256 for about in _page(self.source).files.values())
        return hashlib.sha256(json.dumps([hashes, self.info.ema]).encode()).hexdigest()

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's state at `info.ema`. Raises DataError (its bytes are not what was committed), StorageError."""
        if isinstance(self.source, ExportedModel):
            return self.source.weights(self.info.ema)
        state = self.source.full_state(state_key(self.info.ema))
        return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def describe(url: str, ema: str | None = None) -> Description:
    """The model at a URL, at an EMA length.

    url: a run (its newest committed checkpoint), one checkpoint's folder, or an exported model (its folder or one of
    its safetensors files), `s3://` or a path.
    ema: a length that it holds, in any spelling of the number ("0.05", "0.050"); None for the first one, "none" for
    the weights without averaging.
    Raises UserError (nothing is there, no such length), DataError (what is there describes no model), StorageError.
    """
    source = find_exported(url) or find(url)
    page = _page(source)
    try:
        config = load_config(page.config)
        lengths = _lengths(source, config)
    except (TypeError, UserError) as error:
        raise DataError(f"{url}: does not describe a model: {error}") from None
    if not lengths or not page.image_shape:
        what = "the shape of its samples is not there" if lengths else "it holds weights of no EMA length"
        raise DataError(f"{url}: does not describe a model: {what}")
    chosen = source.chosen if isinstance(source, ExportedModel) and ema is None else None
    name = chosen or choose_length(ema, lengths, url, config.ema.stds)
    where = source.store.url() if isinstance(source, ExportedModel) else source.url
    conditions = class_condition(page.classes) if page.conditions is None else page.conditions
    shape, classes = tuple(page.image_shape), classes_of(conditions)
    info = ModelInfo(where, page.images_seen, name, shape, classes, config, conditions, page.target)
    return Description(info, lengths, source)


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
