"""One training step of a config that names code of somebody else's, on zeros, before a run starts.

What its parts raise or give is then a line in a second, and not a failure of every worker after Ray's start.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scoreray.data.errors import ScorerayError, UserError
from scoreray.data.own_code import line_of, own_kinds, own_mistake
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.diffusion.condition import AnyCondition, Conditions, conditions_of
from scoreray.trainer.diffusion.condition_shapes import example_condition
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.flops import training_flops
from scoreray.trainer.networks.network import num_parameters
from scoreray.trainer.objectives.teacher import Teacher
from scoreray.trainer.step import AutoencoderModule, MachineModule, RunModule, TrainingModule, build_training_module

ROWS = 2  # so that [B, 1] in the place of [B] shows
MOST_PARAMETERS = 20e6  # of a network that is run: 160 MB with their gradients, and 0.2 s to fill them
MOST_FLOPS = 5e10  # of training on one sample: a second on a core or two


@dataclass(frozen=True)
class _StandIn(BaseNetworkConfig):
    """In the place of a network that is ours, or too large: the other parts don't know the difference."""

    kind: str = "stand-in"

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> nn.Module:
        return _Scaled(conditions_of(conditions))


class _Scaled(nn.Module):
    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.conditions, self.scale = conditions, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        return self.scale * x


def dry_run(config: Config, fields: RunFields, meta: RunModule) -> str:
    """One step on the CPU, if the config names code of somebody else's. Returns a line where its network is too large
    for that and was left out, else "".

    meta: the config's module on the meta device. Raises UserError.
    """
    stored = config.model_dump(mode="json")
    if not own_kinds(stored) or isinstance(meta, MachineModule):
        return ""
    note = ""
    if isinstance(meta, AutoencoderModule):
        if not own_kinds(stored["network"]):  # what its perceptual term names was called when it was built
            return ""
        if not (note := _too_large(meta.denoiser, fields.shape)):
            _try_step(config, fields, stored)
        return note
    if not own_kinds(stored["network"]) or (note := _too_large(meta.denoiser, fields.shape)):
        whole = replace(config.optimizer, frozen=())
        config = config.model_copy(update={"network": _StandIn(), "optimizer": whole, "lora": None})
    _try_step(config, fields, stored)
    return note


def _try_step(config: Config, fields: RunFields, stored: dict[str, Any]) -> None:
    """Raises UserError where a step fails, which names the part of the `stored` config whose code it was."""
    try:
        with torch.random.fork_rng(devices=[]):
            _step(config, fields)
    except (Exception, SystemExit) as error:
        if isinstance(error, ScorerayError):
            raise
        named = f"{', '.join(own_kinds(stored))}: a training step on zeros failed: {line_of(error)}"
        raise own_mistake(error, stored) or UserError(named) from error


def _step(config: Config, fields: RunFields) -> None:
    module = build_training_module(config, replace(fields, features=None))  # what they would add is ours
    if isinstance(module, TrainingModule) and getattr(config.objective, "needs_teacher", False):
        module.teacher = Teacher(copy.deepcopy(module.denoiser))  # whose weights are not read yet
    channels, *grid = fields.shape
    stored = 2 * channels if fields.target.holds_moments else channels
    images, given = torch.zeros(ROWS, stored, *grid), example_condition(fields.conditions, ROWS)
    source = {"source": torch.zeros(ROWS, *fields.shape)} if fields.source is not None else {}
    loss, sigma = module(images, given, torch.arange(ROWS), **source)
    if getattr(config.objective, "has_noise_levels", False) and not bool(((sigma > 0) & sigma.isfinite()).all()):
        kind = getattr(config.objective, "sigma_sampling").kind  # noqa: B009
        raise UserError(f"sigma_sampling: kind '{kind}' gave {sigma.tolist()}; noise levels above 0 are needed")
    if not loss.requires_grad:
        raise UserError("the loss of a training step has no gradient: network, objective and weighting must make it of "
                        "the network's parameters")  # fmt: skip
    loss.mean().backward()


def _too_large(denoiser: nn.Module, shape: Sequence[int]) -> str:
    network = denoiser.network
    assert isinstance(network, nn.Module)
    parameters = num_parameters(network)
    # Where they can't be counted, those of a network whose every weight meets every place of a sample's grid.
    work = training_flops(network, shape) or 6 * parameters * math.prod(shape[1:])
    if parameters <= MOST_PARAMETERS and work <= MOST_FLOPS:
        return ""
    return (
        f"network: not run before the start, for its size ({parameters:,} parameters, {work:.1g} FLOPs a sample): what "
        "only a call shows is found by the first step"
    )
