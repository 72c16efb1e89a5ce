"""From a checkpoint in the store to a denoiser that samples: averaged weights, the run's config, its classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from scoreray.data.errors import UserError
from scoreray.sampling.model.describe import Description, ModelInfo, describe
from scoreray.sampling.model.text_encoding import read_texts
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.networks.autoencoder import AutoencoderNetwork, check_autoencoder
from scoreray.trainer.networks.network import build_network, load_weights
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


class LoadedAutoencoder(torch.nn.Module):
    """An autoencoder (eval mode, no gradients) that knows where it comes from. Its samples are in the model's range,
    its latents as they are encoded: neither is scaled."""

    def __init__(self, network: AutoencoderNetwork, info: ModelInfo):
        super().__init__()
        assert isinstance(network, torch.nn.Module)
        self.network, self.info = network, info

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, *image_shape] -> mean and standard deviation of its latents."""
        return self.network.encode(x)  # type: ignore[operator, no-any-return]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents -> samples [B, *image_shape]."""
        return self.network.decode(z)  # type: ignore[operator, no-any-return]


SampledModel = LoadedDenoiser | LoadedMachine
"""What samples can be drawn from."""
LoadedModel = SampledModel | LoadedAutoencoder


def load(checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None) -> LoadedDenoiser:
    """The denoiser of a committed checkpoint, or of an exported model; arguments and errors as for `load_model`."""
    model = load_model(checkpoint_url, ema, device)
    if not isinstance(model, LoadedDenoiser):
        raise UserError(f"{checkpoint_url}: {model.info.instead_of_denoiser}; load_model gives the model itself")
    return model


def load_machine(
    checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None
) -> BoltzmannMachine:
    """The RBM of a committed checkpoint, or of an exported model; arguments and errors as for `load_model`."""
    model = load_model(checkpoint_url, ema, device)
    if not isinstance(model, LoadedMachine):
        raise UserError(f"{checkpoint_url}: network.kind '{model.info.config.network.kind}' is no RBM; use load")
    return model.machine


def load_model(checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None) -> LoadedModel:
    """What a committed checkpoint or an exported model holds.

    checkpoint_url, ema: as `describe` takes them.
    Raises UserError (no such checkpoint or length), DataError (bytes are not what was committed), StorageError.
    """
    return load_described(describe(checkpoint_url, ema), device)


def load_to_sample(
    checkpoint_url: str,
    ema: str | None = None,
    device: torch.device | str | None = None,
    *,
    check: Callable[[ModelInfo], object] = lambda info: None,
) -> SampledModel:
    """The model, if samples can be drawn from it; arguments and errors as for `load_model`. check: raises what else
    there is against it, before its weights are read."""
    found = describe(checkpoint_url, ema)
    if found.info.is_autoencoder:
        raise UserError(f"{checkpoint_url}: {found.info.instead_of_denoiser}")
    check(found.info)
    model = load_described(found, device)
    assert not isinstance(model, LoadedAutoencoder)
    return model


def load_described(found: Description, device: torch.device | str | None = None) -> LoadedModel:
    """The model of a description that was read already; errors of its weights as for `load_model`."""
    return build_model(found.info, found.weights(), device)


def build_model(
    info: ModelInfo, weights: dict[str, torch.Tensor], device: torch.device | str | None = None
) -> LoadedModel:
    """The model of these weights, of its network's state_dict. Raises DataError where they do not fit the config."""
    model = _build(info)
    network: Any = model.machine if isinstance(model, LoadedMachine) else model.network
    load_weights(network, weights, info.url)
    return model.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _build(info: ModelInfo) -> LoadedModel:
    config = info.config
    network = build_network(config.network, info.network_shape, info.network_conditions)
    if isinstance(network, BoltzmannMachine):
        return LoadedMachine(network, info)
    if info.is_autoencoder:
        return LoadedAutoencoder(check_autoencoder(network, config.network.kind, info.image_shape), info)
    denoiser = LoadedDenoiser(network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data)
    denoiser.info = info
    return denoiser
