"""From a checkpoint in the store to a denoiser that samples: averaged weights, the run's config, its classes."""

from __future__ import annotations

from typing import Any

import torch

from scoreray.data.errors import DataError, UserError
from scoreray.sampling.model.describe import Description, ModelInfo, describe
from scoreray.sampling.model.text_encoding import read_texts
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.networks.network import build_network
from scoreray.trainer.networks.rbm import BoltzmannMachine


class LoadedDenoiser(Denoiser):
    """A denoiser (eval mode, no gradients) that knows where it comes from."""

    info: ModelInfo

    def encode(self, condition: Condition) -> Condition:
        """As a denoiser's; texts that an encoder of the data reads are read first."""
        return super().encode(read_texts(condition, self.info.conditions))


class LoadedMachine(torch.nn.Module):
    """A restricted Boltzmann machine (eval mode, no gradients) that knows where it comes from."""

    def __init__(self, machine: BoltzmannMachine, info: ModelInfo):
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


def load_machine(
    checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None
) -> BoltzmannMachine:
    """The RBM of a committed checkpoint, or of an exported model; arguments and errors as for `load_model`."""
    model = load_model(checkpoint_url, ema, device)
    if isinstance(model, LoadedDenoiser):
        raise UserError(f"{checkpoint_url}: network.kind '{model.info.config.network.kind}' is no RBM; use load")
    return model.machine


def load_model(
    checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None
) -> LoadedDenoiser | LoadedMachine:
    """What a committed checkpoint or an exported model holds.

    checkpoint_url, ema: as `describe` takes them.
    Raises UserError (no such checkpoint or length), DataError (bytes are not what was committed), StorageError.
    """
    return load_described(describe(checkpoint_url, ema), device)


def load_described(found: Description, device: torch.device | str | None = None) -> LoadedDenoiser | LoadedMachine:
    """The model of a description that was read already; errors of its weights as for `load_model`."""
    return build_model(found.info, found.weights(), device)


def build_model(
    info: ModelInfo, weights: dict[str, torch.Tensor], device: torch.device | str | None = None
) -> LoadedDenoiser | LoadedMachine:
    """The model of these weights, of its network's state_dict. Raises DataError where they do not fit the config."""
    model = _build(info)
    holder: Any = model.machine if isinstance(model, LoadedMachine) else model.network
    try:
        holder.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{info.url}: does not fit its own config: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _build(info: ModelInfo) -> LoadedDenoiser | LoadedMachine:
    config = info.config
    network = build_network(config.network, info.network_shape, info.conditions)
    if isinstance(network, BoltzmannMachine):
        return LoadedMachine(network, info)
    denoiser = LoadedDenoiser(network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data)
    denoiser.info = info
    return denoiser
