"""LoRA (Hu 2021): low-rank adapters beside some layers of a network that stays as it is, by the `peft` package.

peft is imported where a network gets adapters, not before: it takes seconds, as it brings transformers and accelerate.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.data.errors import UserError, nearest
from scoreray.data.extras import check_installed
from scoreray.trainer.networks.base import state_misfits

ADAPTER = "default"  # peft's name for the adapter that is trained; it stands in the names of its parameters
ADAPTER_CONFIG = "adapter_config.json"  # where peft looks for what a LoRA's adapters are
PEFT_PREFIX = "base_model.model."  # of a network's parameters in peft's own model around it, and in peft's files
BASE_LAYER = ".base_layer."  # what peft puts into the names of an adapted layer's own parameters
CONDITIONING = "embedding."  # of our networks: read before the network is called, for many calls, and never adapted
OURS = ("attention.qkv", "attention.out", "cross_attention.q", "cross_attention.kv", "cross_attention.out",
        "context_kv", "mlp_in", "mlp_out", "inside", "out")  # fmt: skip
DIFFUSERS = ("to_q", "to_k", "to_v", "to_out.0")
FIRST_HALF = ".lora_A.weight"  # of an adapter: what reads the layer's input
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

State = dict[str, Tensor]


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters alone are trained, beside the weights of the model that `init` names.

    `rank`: of each adapter.  `alpha`: what an adapter gives is scaled by alpha / rank; None: by 1.  `targets`: layers
    (linear and convolutions) by name, by the end of their names ("attention.qkv"), or by globs ("up.*.conv_in"); None:
    those of attention and MLPs.  `dropout`: of what an adapter reads.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        checks.at_least("lora", 1, rank=self.rank)
        if self.alpha is not None:
            checks.positive("lora", alpha=self.alpha)
        checks.fraction("lora", dropout=self.dropout)
        if self.targets is not None and not self.targets:
            raise UserError("lora.targets: no layers; name some, or leave it out for those of attention and MLPs")

    def layers(self, network: nn.Module) -> list[str]:
        """Names of the network's layers that get adapters. Raises UserError where a target fits none."""
        names = [
            name
            for name, module in network.named_modules()
            if isinstance(module, LAYERS) and not name.startswith(CONDITIONING)
        ]
        if self.targets is None:
            found = {name for target in (*OURS, *DIFFUSERS) for name in _fitting(target, names)}
            if not found:
                raise UserError(
                    f"lora.targets: this network has no layers of the usual names; name some of {names[:10]}"
                )
        else:
            found = set()
            for target in self.targets:
                fitting = _fitting(target, names)
                if not fitting:
                    raise UserError(f"lora.targets: '{target}' fits no layer of the network; {nearest(target, names)}")
                found.update(fitting)
        return [name for name in names if name in found]

    def for_peft(self, layers: Iterable[str]) -> Any:
        """As peft's LoraConfig. Raises UserError where peft is not installed."""
        check_installed("lora", "lora", "peft")
        from peft import LoraConfig

        alpha: Any = self.rank if self.alpha is None else self.alpha  # a float too, whatever peft's annotation says
        return LoraConfig(
            r=self.rank, lora_alpha=alpha, target_modules=list(layers), lora_dropout=self.dropout, bias="none"
        )


def _fitting(target: str, names: Iterable[str]) -> list[str]:
    return [one for one in names if fnmatch.fnmatchcase(one, target) or fnmatch.fnmatchcase(one, f"*.{target}")]


def add_adapters(network: nn.Module, config: LoRAConfig) -> nn.Module:
    """Puts adapters into the network, which alone can be trained afterwards; gives the same network back. They change
    nothing at first, as their second halves are 0; the first come from torch's generator. Raises UserError."""
    settings = config.for_peft(config.layers(network))
    from peft import inject_adapter_in_model

    inject_adapter_in_model(settings, network, ADAPTER)
    return network


def base_name(name: str) -> str:
    """A parameter's name in the network without adapters."""
    return name.replace(BASE_LAYER, ".")


def stored_adapters(named: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of adapters among all that are named, as peft's files name them: without the adapter's name."""
    infix = f".{ADAPTER}."
    return {name.replace(infix, "."): value for name, value in named.items() if infix in name}


def layers_of(adapters: Iterable[str]) -> list[str]:
    """The layers that adapters of these names (of `stored_adapters`) adapt."""
    return [name.removesuffix(FIRST_HALF) for name in adapters if name.endswith(FIRST_HALF)]


@torch.no_grad()
def merged(network: nn.Module, config: LoRAConfig, base: State, adapters: State) -> State:
    """The state of the network each of whose adapted layers is what it and its adapter give together.

    network: without adapters and of any weights.  adapters: as of `stored_adapters`.  Raises UserError unless they fit
    `base` and this network.
    """
    network.load_state_dict(base)
    load_adapters(add_adapters(network, config), adapters, ADAPTER)
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {base_name(name): tensor for name, tensor in network.state_dict().items()}
    return {name: state[name] for name in base}


def load_adapters(network: nn.Module, adapters: State, name: str) -> None:
    """Gives the adapters called `name` of a network these weights. Raises UserError unless they are of its layers."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    if wrong := state_misfits(wanted, adapters):
        raise UserError(f"a LoRA of another network: {wrong}")
    set_peft_model_state_dict(network, dict(adapters), name, low_cpu_mem_usage=True)  # also into a network on "meta"
