"""From a checkpoint in the store to a denoiser that samples: averaged weights, the run's config, its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scoreray.data.errors import DataError, UserError, nearest
from scoreray.sampling.export import PREFIX, RAW, ExportedModel, find_exported
from scoreray.sampling.sigmas import from_process, grid
from scoreray.trainer.checkpoint import Checkpoint, find
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.denoiser import Denoiser
from scoreray.trainer.ema import name_of_std
from scoreray.trainer.network import build_network
from scoreray.trainer.rbm import Machine, MachineConfig, build_machine

PROCESS_GRID = "process"  # the grid's name that means the process's own times
SIGMA_RANGE = (0.002, 80.0)  # flow matching starts at pure noise and many processes end at none: a grid can't


@dataclass(frozen=True)
class ModelInfo:
    """Where a loaded denoiser comes from and what it draws."""

    url: str
    images_seen: int
    ema: str
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    config: Config

    def class_number(self, label: str | int | None) -> int:
        """The class meant by a number or a name; -1 for None. Raises UserError with the classes that there are."""
        if label is None:
            return -1
        if str(label).lstrip("-").isdigit() and -1 <= int(label) < len(self.classes):
            return int(label)
        if not self.classes:
            raise UserError(f"class '{label}': this model was trained without classes")
        matching = [i for i, name in enumerate(self.classes) if name.lower() == str(label).lower()]
        if not matching:
            raise UserError(
                f"class '{label}' is unknown; {nearest(str(label), self.classes)}; or 0 to {len(self.classes) - 1}"
            )
        return matching[0]

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


class LoadedDenoiser(Denoiser):
    """A denoiser (eval mode, no gradients) that knows where it comes from."""

    info: ModelInfo


class LoadedMachine(torch.nn.Module):
    """A restricted Boltzmann machine (eval mode, no gradients) that knows where it comes from."""

    def __init__(self, machine: Machine, info: ModelInfo):
        super().__init__()
        self.machine, self.info = machine, info


def load(checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None) -> LoadedDenoiser:
    """The denoiser of a committed checkpoint, or of an exported model; arguments and errors as for `load_model`."""
    model = load_model(checkpoint_url, ema, device)
    if isinstance(model, LoadedMachine):
        raise UserError(
            f"{checkpoint_url}: network.kind '{model.info.config.network.kind}' knows no noise level, so it has no "
            "denoiser; `scoreray sample` draws from it by Gibbs, load_machine gives the machine itself"
        )
    return model


def load_machine(checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None) -> Machine:
    """The RBM of a committed checkpoint, or of an exported model; arguments and errors as for `load_model`."""
    model = load_model(checkpoint_url, ema, device)
    if isinstance(model, LoadedDenoiser):
        raise UserError(f"{checkpoint_url}: network.kind '{model.info.config.network.kind}' is no RBM; use load")
    return model.machine


def load_model(
    checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None
) -> LoadedDenoiser | LoadedMachine:
    """What a committed checkpoint or an exported model holds.

    checkpoint_url: a run (its newest committed checkpoint), one checkpoint's folder, or an exported model (its folder
    or one of its safetensors files), `s3://` or a path.
    ema: a length that is there ("0.050"), None for the first one, "none" for the weights without averaging.
    Raises UserError (no such checkpoint or length), DataError (bytes are not what was committed), StorageError.
    """
    source = find_exported(checkpoint_url) or find(checkpoint_url)
    page = source.page if isinstance(source, ExportedModel) else source.marker
    try:
        config = load_config(page["config"])
        shape, classes, images_seen = tuple(page["image_shape"]), tuple(page["classes"]), int(page["images_seen"])
    except (KeyError, TypeError, UserError) as error:
        raise DataError(f"{checkpoint_url}: does not describe a model: {error}") from None
    name, weights = _weights(source, config, ema)
    url = source.store.url() if isinstance(source, ExportedModel) else source.url
    model = _build(ModelInfo(url, images_seen, name, shape, classes, config))
    holder: Any = model.machine if isinstance(model, LoadedMachine) else model.network
    try:
        holder.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{checkpoint_url}: does not fit its own config: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def without_weights(info: ModelInfo) -> LoadedDenoiser | LoadedMachine:
    """A described model on the meta device: its kind and its shapes, for who checks what fits it."""
    with torch.device("meta"):
        return _build(info)


def _build(info: ModelInfo) -> LoadedDenoiser | LoadedMachine:
    config = info.config
    if isinstance(config.network, MachineConfig):
        return LoadedMachine(build_machine(config.network, info.image_shape), info)
    network = build_network(config.network, info.image_shape, len(info.classes))
    denoiser = LoadedDenoiser(network, config.denoiser.parameterization, config.denoiser.sigma_data)
    denoiser.info = info
    return denoiser


def _weights(source: Checkpoint | ExportedModel, config: Config, ema: str | None) -> tuple[str, dict[str, Any]]:
    """The length that is meant by `ema`, and the network's weights at it."""
    if isinstance(source, ExportedModel):
        try:
            name = ema if ema in (None, RAW) else name_of_std(float(ema))
        except ValueError:
            name = ema
        name = name or source.chosen or next(iter(source.page["files"]))
        return name, source.weights(name)
    name = RAW if ema == RAW else config.ema.choose(ema)
    state = source.full_state("master" if name == RAW else f"ema_{name}")
    return name, {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
