"""Networks that somebody else trained inside EDM's preconditioning: NVlabs' edm, k-diffusion (Karras 2022, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.data.errors import UserError
from scoreray.data.own_code import is_own, line_of, load
from scoreray.trainer.diffusion.condition import AnyCondition, Conditions, as_condition, class_name_of, conditions_of
from scoreray.trainer.diffusion.layers import check_call, require
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.conditioning import values_of


@dataclass(frozen=True)
class PreconditionedNetworkConfig(BaseNetworkConfig):
    """The network F inside c_skip x + c_out F(c_in x, c_noise), which `denoiser.parameterization: edm` puts around it.

    module: package.module:Name of the class, or of a function that makes it, whose code was brought (`--with`).
    arguments: what it is called with.
    calls: its forward is (x, c_noise, class_labels=one-hot or None), all zeros meaning none ("edm"), or (x, sigma,
    class_cond=numbers), num_classes meaning none ("k_diffusion").
    num_classes: 0 of one without classes.
    """

    module: str
    arguments: dict[str, Any]
    calls: Literal["edm", "k_diffusion"] = "edm"
    num_classes: int = 0
    kind: Literal["preconditioned"] = field(default="preconditioned", kw_only=True)
    wrapped_prefix: ClassVar[str] = "model."

    def __post_init__(self) -> None:
        require(is_own(self.module), "module", self.module, "write package.module:Name")
        checks.at_least("network", 0, num_classes=self.num_classes)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> PreconditionedNetwork:
        """Raises UserError where the code was not brought or refuses the arguments, or conditions do not fit."""
        return PreconditionedNetwork(self, tuple(image_shape), conditions_of(conditions))


class PreconditionedNetwork(nn.Module):
    """network(x [B, ...], c_noise [B], condition or None) -> x's shape and dtype; at most one condition, a class."""

    def __init__(self, config: PreconditionedNetworkConfig, shape: tuple[int, ...], conditions: Conditions):
        super().__init__()
        self.settings, self.shape, self.conditions = config, shape, conditions
        self.label = class_name_of(conditions)
        known = conditions[self.label].num_classes if self.label is not None else 0
        if len(conditions) > 1 or (conditions and self.label is None) or known > config.num_classes:
            takes = f"one class condition of up to {config.num_classes} classes" if config.num_classes else "none"
            raise UserError(f"data.conditions: {', '.join(conditions)}; network.module {config.module} takes {takes}")
        make = load(config.module, "network.module")
        try:
            made = make(**config.arguments)
        except (Exception, SystemExit) as error:  # somebody else's code: whatever it raises is reported as its refusal
            raise UserError(f"network.arguments: {config.module} refuses them: {line_of(error)}") from None
        if not isinstance(made, nn.Module):
            raise UserError(f"network.module: {config.module} made a {type(made).__name__}, no torch.nn.Module")
        self.model = made

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        check_call(x, c_noise, tuple(x.shape[1:]) == self.shape, str(self.shape))
        count = self.settings.num_classes
        labels = c_noise.new_full((x.shape[0],), -1).long()
        if self.label is not None:
            given = as_condition(condition, self.conditions)
            labels, _ = values_of(self.label, self.conditions[self.label], given, c_noise)
        if self.settings.calls == "k_diffusion":
            arguments = {"class_cond": labels.where(labels >= 0, count)} if count else {}
            return self.model(x, (4 * c_noise).exp(), **arguments).to(x.dtype)
        one_hot = F.one_hot(labels + 1, 1 + count)[:, 1:].to(x.dtype) if count else None
        return self.model(x, c_noise, class_labels=one_hot).to(x.dtype)
