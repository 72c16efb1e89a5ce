"""Which model is at a URL, of which kind, at which EMA length: read from its JSON, before any weights.

Whatever takes the URL of a model (sample, serve, evaluate, export, tune) calls `describe`, so all of them know the same
URLs, the same spellings of a length, and refuse in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from scoreray.data.classes import class_number
from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import to_uint8
from scoreray.sampling.samplers.sigmas import from_process, grid
from scoreray.trainer.checkpoints.checkpoint import FOLDER, Checkpoint
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.stored_model import StoredModel, conditions_of_page, find_model
from scoreray.trainer.config import Config
from scoreray.trainer.config.condition_values import described
from scoreray.trainer.config.run_fields import RunFields, TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec, classes_of

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
    def planned(config: Config, fields: RunFields) -> ModelInfo:
        """Of a model that is yet to be trained on these fields."""
        length = config.ema.names[0]
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
    """A model without its weights: what it draws, and where it is stored."""

    info: ModelInfo
    stored: StoredModel

    @property
    def follows_run(self) -> bool:
        """Whether the URL is a run's, which means its newest checkpoint."""
        source = self.stored.source
        return isinstance(source, Checkpoint) and source.folder.startswith(f"{FOLDER}/")

    @property
    def sha256(self) -> str:
        """One hash of the model: of all its files, and the length."""
        return self.stored.sha256

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's state at `info.ema`. Raises DataError (its bytes are not what was committed), StorageError."""
        return self.stored.weights()


def describe(url: str, ema: str | None = None) -> Description:
    """The model at a URL, at an EMA length; arguments and errors as of `find_model`."""
    stored = find_model(url, ema)
    return Description(info_of(stored.page, stored.url, stored.ema, stored.config), stored)


def info_of(page: ModelManifest | Marker, url: str, ema: str, config: Config) -> ModelInfo:
    """What a page says of its model. config: the page's, loaded."""
    conditions, shape = conditions_of_page(page), tuple(page.image_shape)
    return ModelInfo(url, page.images_seen, ema, shape, classes_of(conditions), config, conditions, page.target)
