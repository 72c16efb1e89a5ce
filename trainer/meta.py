"""A config's module on the meta device: shapes without memory, for counting parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.engine import resolve_precision
from scoreray.trainer.networks.flops import matmul_rate, training_flops
from scoreray.trainer.step import MachineModule, TrainingModule, build_training_module

T = TypeVar("T")
DRAWS = {torch.Tensor.normal_, torch.Tensor.uniform_}


class _NoInitialValues(TorchFunctionMode):
    """Skips random initialisation: on the meta device torch would import its compiler (1 s) to draw nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(build: Callable[[], T]) -> T:
    """What `build` makes, on torch's meta device."""
    with torch.device("meta"), _NoInitialValues():
        return build()


def meta_module(config: Config, fields: RunFields) -> TrainingModule | MachineModule:
    """What `build_training_module` makes, on torch's meta device. Raises UserError when network and data do not fit."""
    return on_meta(lambda: build_training_module(config, fields))


def training_work(config: Config, fields: RunFields, world_size: int, device: torch.device) -> tuple[int, float]:
    """FLOPs of training on one image (0 where they can't be counted), and matrix FLOPs a second of all workers."""
    module = meta_module(config, fields)
    network = getattr(getattr(module, "denoiser", module), "network", None)
    if not isinstance(network, torch.nn.Module):
        return 0, math.inf
    rate = matmul_rate(device, resolve_precision(config.engine.precision, device))
    return training_flops(network, fields.shape), rate * world_size
