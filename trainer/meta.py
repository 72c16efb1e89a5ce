"""A config's module on the meta device: shapes without memory, for counting parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from scoreray.data.errors import UserError
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.engine import resolve_precision
from scoreray.trainer.monitoring.meter import Grid, Work
from scoreray.trainer.networks.flops import matmul_rate, training_flops
from scoreray.trainer.step import RunModule, build_training_module

T = TypeVar("T")
DRAWS = {torch.Tensor.normal_, torch.Tensor.uniform_}
NOT_OF_THE_NETWORK = {"run", "data", "duration", "checkpoint", "log"}
_counted: dict[tuple[type, str, str], dict[Grid, int]] = {}
"""FLOPs that were counted in this process: counting takes as long as 20 steps of a small U-Net, and a process may train
the same network more than once."""


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


def meta_module(config: Config, fields: RunFields) -> RunModule:
    """What `build_training_module` makes, on torch's meta device. Raises UserError when network and data do not fit:
    of data in buckets the network is called with each size."""
    module = on_meta(lambda: build_training_module(config, fields))
    for shape in fields.shapes:
        _check_takes(module, config, shape)
    return module


def _check_takes(module: RunModule, config: Config, shape: Sequence[int]) -> None:
    x, c_noise = torch.empty(2, *shape, device="meta"), torch.empty(2, device="meta")
    network: Any = module.denoiser.network
    try:
        with torch.no_grad():
            network(x, c_noise)
    except NotImplementedError:  # what torch raises for an operation that meta tensors lack
        return
    except Exception as error:
        raise UserError(
            f"network.kind: '{config.network.kind}' can't take samples of {list(shape)}, which are in a bucket of "
            f"{config.data.url}: {' '.join(str(error).split())}"
        ) from error


def training_work(config: Config, fields: RunFields, world_size: int, device: torch.device) -> Work:
    """FLOPs of training on one image of each size (0 where they can't be counted), and matrix FLOPs a second of all
    workers."""
    module = meta_module(config, fields)
    network = getattr(getattr(module, "denoiser", module), "network", None)
    if not isinstance(network, torch.nn.Module):
        return {}, math.inf
    rate = matmul_rate(device, resolve_precision(config.engine.precision, device))
    counted = type(network), config.model_dump_json(exclude=NOT_OF_THE_NETWORK), repr(fields)
    if counted not in _counted:
        shapes = fields.shapes or (tuple(fields.shape),)
        _counted[counted] = {shape[1:]: training_flops(network, shape) for shape in shapes}
    return _counted[counted], rate * world_size
