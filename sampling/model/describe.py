"""Which model is at a URL, of which kind, at which EMA length: read from its JSON, before any weights.

Whatever takes the URL of a model (sample, serve, evaluate, export, tune) calls `describe`, so all of them know the same
URLs, the same spellings of a length, and refuse in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from scoreray.data.buckets.sizes import size_text
from scoreray.data.classes import class_number
from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import to_uint8
from scoreray.sampling.grids.stored import StoredGrid, read_grids
from scoreray.sampling.model import decode
from scoreray.sampling.samplers.sigmas import Grid, from_process, grid
from scoreray.trainer.checkpoints.checkpoint import FOLDER, Checkpoint
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.stored_model import StoredModel, conditions_of_page, find_model
from scoreray.trainer.config import Config
from scoreray.trainer.config.condition_values import described
from scoreray.trainer.config.run_fields import RunFields, TargetField
from scoreray.trainer.diffusion.condition import Conditions, ConditionSpec, classes_of
from scoreray.trainer.diffusion.levels import data_conditions, level_names, with_levels
from scoreray.trainer.diffusion.process import VE
from scoreray.trainer.diffusion.sigma_sampling import LadderUniform
from scoreray.trainer.encoders.load import load_autoencoder
from scoreray.trainer.flows.sources import DataSetSource
from scoreray.trainer.networks.conditioning import resized
from scoreray.trainer.networks.network import LadderNetworkConfig
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.base import Map

PROCESS_GRID = "process"  # the grid's name that means the process's own times


@dataclass(frozen=True)
class ModelInfo:
    """Where a model comes from and what it draws. classes: of its one class condition, if it has one.

    image_shape: of what its network models. sample_shape: of what is drawn, which differs where a network of latents
    has its samples decoded. raw: they are left as the latents that they are. image_shapes: of a run on data in buckets,
    in each, the one with the most samples first; image_shape is the one of them that is drawn.  conditions: what of the
    data conditions it; levels: further inputs, which samplers and requests set (`trainer/diffusion/levels.py`). grids:
    those that are stored beside it (`sampling/grids/stored.py`), by URL.
    """

    url: str
    images_seen: int
    ema: str
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    config: Config
    conditions: Mapping[str, ConditionSpec] = field(default_factory=dict)
    target: TargetField | None = None
    raw: bool = False
    image_shapes: tuple[tuple[int, ...], ...] = ()
    levels: tuple[str, ...] = ()
    grids: Mapping[str, StoredGrid | str] = field(default_factory=dict)

    @staticmethod
    def planned(config: Config, fields: RunFields) -> ModelInfo:
        """Of a model that is yet to be trained on these fields."""
        length = config.ema.names[0]
        classes, shape = classes_of(fields.conditions), tuple(fields.shape)
        return ModelInfo(
            "", 0, length, shape, classes, config, fields.conditions, fields.target, image_shapes=fields.shapes,
            levels=config.levels,
        )  # fmt: skip

    @property
    def network_shape(self) -> tuple[int, ...]:
        """What the network was built for, whichever of `image_shapes` is drawn."""
        return self.image_shapes[0] if self.image_shapes else self.image_shape

    @property
    def network_conditions(self) -> Conditions:
        """All that the network was built for."""
        return with_levels(self.conditions, self.levels)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The `image_shape` of each size of samples that it can draw, by what `--size` calls it: WIDTHxHEIGHT."""
        shapes = {shape: self._drawn(shape) for shape in self.image_shapes or (self.image_shape,)}
        return {size_text(drawn[:0:-1]): shape for shape, drawn in shapes.items() if len(drawn) == 3}

    def at_size(self, size: str | None) -> ModelInfo:
        """The model that draws samples of this size; None for what it draws by default. Raises UserError."""
        if size is None:
            return self
        if size not in self.sizes:
            raise UserError(f"size {shortened(size)}: {nearest(size, self.sizes) or 'this model has none'}")
        return replace(self, image_shape=self.sizes[size])

    def at_shape(self, sample_shape: Sequence[int]) -> ModelInfo:
        """The model that draws samples of this shape, if it is one of `image_shapes`; else as it is."""
        found = (shape for shape in self.image_shapes if self._drawn(shape) == tuple(sample_shape))
        return replace(self, image_shape=next(found, self.image_shape))

    @property
    def takes(self) -> str:
        """What conditions it, as a person reads it."""
        return "; ".join(f"{name}: {described(spec)}" for name, spec in self.conditions.items()) or "no conditions"

    def class_number(self, label: str | int | None) -> int:
        """The class meant by a number or a name; -1 for None. Raises UserError (`data.classes`)."""
        return class_number(label, self.classes)

    @property
    def encoding(self) -> Encoding | None:
        """What decodes its samples; None where they are drawn as the network models them."""
        found = None if self.raw or self.target is None else self.target.encoding
        return found if found is not None and found.can_decode else None

    def as_latents(self) -> ModelInfo:
        """The same with samples that are not decoded (`--raw`). Raises UserError where nothing would decode them."""
        if self.encoding is None:
            raise UserError(f"--raw: {self.url} models no latents, so nothing is decoded; leave it out")
        return replace(self, raw=True)

    def check_decodes(self) -> None:
        """Loads what decodes samples, before work begins. Raises UserError, DataError, StorageError."""
        if self.encoding is not None:
            load_autoencoder(self.encoding).decoded_shape(self.image_shape)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of a sample as it is drawn: decoded, where the network models latents."""
        return self._drawn(self.image_shape)

    def _drawn(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`sample_shape` of an `image_shape`: latents of each bucket are of the same share of their pictures' sides."""
        if self.encoding is None or shape == self.network_shape:
            return shape if self.encoding is None else tuple(self.encoding.of_shape)
        channels, *grid = self.encoding.of_shape
        sides = zip(shape[1:], grid, self.network_shape[1:], strict=True)
        return (channels, *(length * whole // part for length, whole, part in sides))

    @property
    def is_picture(self) -> bool:
        """Whether its samples are grey or RGB pictures, -1 black and 1 white; else values in units of their own. Of a
        checkpoint that does not know what field it models, those of such a shape are."""
        kind = self.encoding.of_kind if self.encoding else self.target.kind if self.target else "image"
        return is_picture(self.sample_shape) and kind == "image"

    @property
    def sample_dtype(self) -> Literal["uint8", "float32"]:
        """Of samples in the data's units: those of pictures are 0 to 255."""
        return "uint8" if self.is_picture else "float32"

    def in_data_units(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples float32 [b, *image_shape] as a model draws them -> [b, *sample_shape] in the units of the data, of
        `sample_dtype`: the one way out for files, answers and pictures. Latents are decoded."""
        values = self.decoded(samples)
        return to_uint8(values) if self.is_picture else values

    def decoded(self, samples: torch.Tensor) -> torch.Tensor:
        """As `in_data_units`, but pictures are float32 from -1 to 1."""
        if self.encoding is not None or self.is_picture:
            return self.latents_decoded(samples)
        return self.unscaled(samples)

    def latents_decoded(self, samples: torch.Tensor) -> torch.Tensor:
        """Latents decoded; samples of any other model as they are, in the model's range."""
        return samples if self.encoding is None else decode.decode(self.encoding, self.unscaled(samples))

    def previewed(self, samples: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """As `decoded`, at once, and whether these are pictures: latents by the linear map that was recorded with them,
        scaled up to the height and width of what is drawn, or as they are where none was."""
        if self.encoding is None:
            return self.decoded(samples), self.is_picture
        found = decode.preview(self.encoding, self.unscaled(samples))
        if found is None:
            return self.unscaled(samples), False
        return resized(found, self._drawn(tuple(samples.shape[1:]))[1:]), self.is_picture

    def unscaled(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples in the units of the field that the network models: of latents, the encoder's own."""
        normaliser = None if self.target is None else self.target.normaliser
        return samples if normaliser is None else normaliser.invert(samples)

    @property
    def source(self) -> str | None:
        """The data set that its samples begin from; None of a model that begins from noise."""
        found = getattr(self.config.objective, "source", None)
        return found.url if isinstance(found, DataSetSource) else None

    @property
    def is_machine(self) -> bool:
        """Whether it is a restricted Boltzmann machine, which knows no noise level and has no denoiser."""
        return self.config.network.is_machine

    @property
    def is_autoencoder(self) -> bool:
        """Whether it encodes samples and decodes latents, and draws none."""
        return isinstance(self.config.objective, AutoencodingObjective)

    @property
    def instead_of_denoiser(self) -> str:
        """Of a model without a denoiser, what it is for, as the end of an error's line; "" of all others."""
        if self.is_machine:
            return (
                f"network.kind '{self.config.network.kind}' knows no noise level, so it has no denoiser; `scoreray "
                "sample` draws from it by Gibbs"
            )
        if self.is_autoencoder:
            return (
                "an autoencoder draws no samples; train on its latents, which `scoreray data encode DATA LATENTS "
                f"--encoder scoreray={self.url} --field {self.target.name if self.target else 'image'} --to latent` "
                "makes, and draw from that run; `scoreray evaluate` shows reconstructions"
            )
        return ""

    @property
    def map(self) -> Map:
        """What of the probability-flow ODE its network learned, which says how it is drawn from."""
        return getattr(self.config.objective, "map", "none")  # an objective of somebody else's may have none

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The weights of guidance that its network takes as an input, as its teacher's were drawn; None where guidance
        is made of several calls."""
        teacher = getattr(self.config.objective, "teacher", None)
        return None if teacher is None else teacher.guidance_range

    @property
    def instead_of_mean(self) -> str:
        """Of a model whose network gives no mean E[x_0 | x], so no score: what it does, for a message. "" of others."""
        maps = {"consistency": "where paths of the ODE end", "progressive": "the steps of its own grid"}
        learned, kind = maps.get(self.map), self.config.objective.kind
        return f"objective.kind '{kind}' learns {learned}, no mean E[x_0 | x]" if learned else ""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels between which a grid goes, from the end of the run's process to its beginning."""
        return self.config.process.sampling_range()

    @property
    def rungs(self) -> int | None:
        """How many levels the geometric ladder has that it was trained on; None of a model of any other levels."""
        network, process = self.config.network, self.config.process
        if isinstance(network, LadderNetworkConfig):
            ends = zip(self.sigma_range, (network.sigma_min, network.sigma_max), strict=True)
            return network.num_levels if all(math.isclose(*pair) for pair in ends) else None
        sampling = getattr(self.config.objective, "sigma_sampling", None)
        return sampling.num_levels if isinstance(sampling, LadderUniform) and isinstance(process, VE) else None

    @property
    def stored_grids(self) -> list[StoredGrid]:
        """Those of `grids` that could be read."""
        return [one for one in self.grids.values() if isinstance(one, StoredGrid)]

    def optimised_grid(self, sampler: str | None, steps: int | None) -> StoredGrid:
        """The one that is stored for this sampler and number of steps; None for either takes the only one there is.

        Raises UserError that names those that are stored, DataError where it can't be read.
        """
        whole = self.stored_grids
        found = [one for one in whole if sampler in (None, one.sampler) and steps in (None, one.steps)]
        if len(found) == 1:
            return found[0]
        if damaged := [one for one in self.grids.values() if isinstance(one, str)]:
            raise DataError(damaged[0])
        stored = ", ".join(sorted(one.name for one in whole)) or "none"
        which = " ".join([sampler or "any sampler", *([] if steps is None else [f"of {steps} steps"])])
        if found:
            raise UserError(f"grid optimised: say for which sampler and steps; stored are {stored}")
        if self.instead_of_mean:
            raise UserError(f"grid optimised: {self.instead_of_mean}, so none can be made; leave the grid out")
        raise UserError(
            f"grid optimised: none is stored for {which}, stored: {stored}; `scoreray grid {self.url} --sampler "
            f"{sampler or 'dpmpp_2m'} --steps {steps or 6}` makes one"
        )

    def sigmas(self, steps: int, given: Grid = "karras") -> torch.Tensor:
        """A grid of `steps` levels: one of `sigmas.GRIDS` over `sigma_range`, "process", even in the process's t, or
        levels as they are."""
        if given == PROCESS_GRID:
            return from_process(self.config.process, steps)
        return grid(given, steps, *self.sigma_range)


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
    info = info_of(stored.page, stored.url, stored.ema, stored.config)
    return Description(replace(info, grids=read_grids(stored.source.store)), stored)


def info_of(page: ModelManifest | Marker, url: str, ema: str, config: Config) -> ModelInfo:
    """What a page says of its model. config: the page's, loaded."""
    known, shape = conditions_of_page(page), tuple(page.image_shape)
    conditions = data_conditions(known)
    shapes = tuple(map(tuple, page.image_shapes))
    return ModelInfo(
        url, page.images_seen, ema, shape, classes_of(conditions), config, conditions, page.target, image_shapes=shapes,
        levels=level_names(known),
    )  # fmt: skip
