"""Every network that a config can name."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from torch import nn

from scoreray.data import checks
from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.own_code import line_of
from scoreray.data.own_code.part import OwnPart, PartOf
from scoreray.trainer.diffusion.condition import Conditions, as_condition, conditions_of
from scoreray.trainer.diffusion.condition_shapes import complete
from scoreray.trainer.diffusion.process import VE
from scoreray.trainer.networks.autoencoder import AutoencoderConfig, AutoencoderNetwork
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.ladder import Conditioning, OnLadder, geometric_ladder
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.mmdit import MMDiTConfig
from scoreray.trainer.networks.preconditioned import PreconditionedNetworkConfig
from scoreray.trainer.networks.rbm import GaussianRBMConfig, RBMConfig
from scoreray.trainer.networks.unet import UNetConfig

SingleNetworkConfig = UNetConfig | DiTConfig | MMDiTConfig | MLPConfig
"""Networks that see any noise level, which a ladder can be put around. A new network is added here."""
OWN_NETWORK = PartOf("network", base=BaseNetworkConfig)
AnySingleNetwork = Annotated[SingleNetworkConfig, OWN_NETWORK]


@dataclass(frozen=True)
class LadderNetworkConfig(BaseNetworkConfig):
    """A network that knows the rungs of a geometric ladder only (`OnLadder`), around any other network.

    network: the one inside.  sigma_min, sigma_max: ends of the ladder.  num_levels: its rungs.
    conditioning: "learned": the network is given an embedding of the rung; "none": it knows no noise level, and its
    output is scaled by the rung's.
    """

    network: AnySingleNetwork = field(default=UNetConfig())
    sigma_min: float = VE.sigma_min
    sigma_max: float = VE.sigma_max
    num_levels: int = 232
    conditioning: Conditioning = "learned"
    kind: Literal["ladder"] = field(default="ladder", kw_only=True)

    def __post_init__(self) -> None:
        checks.positive("network", sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        checks.ordered("network", "sigma_min", "sigma_max", self.sigma_min, self.sigma_max)
        checks.at_least("network", 2, num_levels=self.num_levels)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> OnLadder:
        sigmas = geometric_ladder(self.sigma_max, self.sigma_min, self.num_levels)
        return OnLadder(build_network(self.network, image_shape, conditions), sigmas, self.conditioning)


NetworkConfig = (
    SingleNetworkConfig
    | LadderNetworkConfig
    | RBMConfig
    | GaussianRBMConfig
    | AutoencoderConfig
    | DiffusersNetworkConfig
    | PreconditionedNetworkConfig
)
AnyNetwork = Annotated[NetworkConfig, OWN_NETWORK]
"""The type of a config's `network` section: one of ours, or somebody else's."""

NETWORKS: dict[str, type[NetworkConfig]] = {config.kind: config for config in get_args(NetworkConfig)}


def build_network(
    config: NetworkConfig | OwnPart, image_shape: Sequence[int], conditions: Conditions | int = 0
) -> nn.Module:
    """`config.build`. One of somebody else's knows afterwards what it is conditioned by, as ours do, is called with all
    of that (None of an unconditional one), and what it gives is checked; on the meta device, where a run is checked
    before it starts, it is called once. Raises UserError. An autoencoder's calls are looked at by `check_autoencoder`.
    """
    network = config.build(image_shape, conditions)
    if isinstance(config, OwnPart) and not isinstance(network, AutoencoderNetwork):
        given = conditions_of(conditions)
        if not hasattr(network, "conditions"):
            network.conditions = given  # type: ignore[assignment]
        network.register_forward_pre_hook(partial(_with_every_condition, given))
        network.register_forward_hook(partial(_check_output, config.kind))
        if any(parameter.is_meta for parameter in network.parameters()):
            _check_forward(config.kind, network, image_shape)
    return network


def load_weights(network: nn.Module, weights: Mapping[str, torch.Tensor], url: str) -> None:
    """Raises DataError, which names the `url` of the weights, where they are not those of the network."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{url}: does not fit its own config: {' '.join(str(error).split())}") from None


def _with_every_condition(conditions: Conditions, network: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call with a `Condition` that has every name, the null where none was given."""
    x, c_noise, condition = (*arguments, None)[:3]
    if not conditions:
        return x, c_noise, None
    return x, c_noise, complete(as_condition(condition, conditions), conditions, x.shape[0], x.device)


def _check_output(kind: str, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    """Raises UserError where a call gave another shape than its input's, or numbers that no gradient or no engine has:
    integers, or float64 where the input was not. bf16 is fine, as weights or autocast make it."""
    x = arguments[0]
    if not isinstance(output, torch.Tensor) or output.shape != x.shape:
        given = list(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise UserError(
            f"network: kind '{kind}': forward gave {given} for x {list(x.shape)}: both must have the same shape"
        )
    if not output.is_floating_point() or output.dtype.itemsize > max(x.dtype.itemsize, 4):
        raise UserError(f"network: kind '{kind}': forward gave {output.dtype} for x of {x.dtype}: give x's dtype")


def _check_forward(kind: str, network: nn.Module, image_shape: Sequence[int]) -> None:
    """Raises UserError where a call fails. Code that looks at values can't be called without any: `trainer/dry_run.py`
    calls it with some."""
    x, c_noise = (torch.empty(2, *shape, device="meta") for shape in (image_shape, ()))
    try:
        network(x, c_noise)
    except UserError:
        raise
    except NotImplementedError:  # what torch raises for an operation that meta tensors lack
        return
    except (Exception, SystemExit) as error:
        if "meta" in str(error).lower():
            return
        raise UserError(
            f"network: kind '{kind}': forward(x {list(x.shape)}, c_noise, condition) failed: {line_of(error)}"
        ) from error


def num_parameters(network: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def num_frozen_parameters(network: nn.Module) -> int:
    """Number of values that are not trained, beside `num_parameters`."""
    return sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes from training the parameters that `optimizer.frozen` names: by globs, of which the last that fits a name
    decides; one that begins with "!" trains. Raises UserError where one fits no name, or none is left to train."""
    names = [name for name, _ in network.named_parameters()]
    frozen = set[str]()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern.removeprefix("!"))
        if not found:
            raise UserError(
                f"optimizer.frozen: '{pattern}' fits no parameter of the network; {nearest(pattern, names)}"
            )
        frozen = frozen.difference(found) if pattern.startswith("!") else frozen.union(found)
    if len(frozen) == len(names):
        raise UserError(f"optimizer.frozen: {list(patterns)} leaves no parameter to train; add '!NAME' for some")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
