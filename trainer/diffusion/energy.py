"""Energies read out of any network, and their gradients with second-order derivatives.

A network f(x, c_noise, condition) -> [B, ...] becomes a scalar e(x) per sample; F = -grad e then stands where a
plain network's output would, and the score is the gradient of an energy (Salimans & Ho 2021; Du 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.trainer.diffusion.condition import AnyCondition


def _dot(x: Tensor, output: Tensor) -> Tensor:
    return x * output


def _residual(x: Tensor, output: Tensor) -> Tensor:
    return (x - output) ** 2 / 2


def _norm(x: Tensor, output: Tensor) -> Tensor:
    return output**2 / 2


# Summed over a sample's dimensions: x . f(x), |x - f(x)|^2 / 2, |f(x)|^2 / 2 (a half makes their gradients unit-sized).
READOUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dot": _dot, "residual": _residual, "norm": _norm}


def energy(
    network: nn.Module | Callable[..., Tensor], readout: str, x: Tensor, c_noise: Tensor, condition: AnyCondition
) -> Tensor:
    """e(x) of each sample: x [B, ...] -> [B], summed in float32 or wider. Raises UserError on an unknown readout."""
    read = checks.choose("energy readout", readout, READOUTS)
    wide = torch.promote_types(x.dtype, torch.float32)
    return read(x.to(wide), network(x, c_noise, condition).to(wide)).flatten(1).sum(1)


def conservative_output(
    network: nn.Module | Callable[..., Tensor],
    readout: str,
    x: Tensor,
    c_noise: Tensor,
    condition: AnyCondition,
    create_graph: bool,
) -> Tensor:
    """F = -grad_x e(x), [B, ...] like x. With `create_graph` it can be differentiated again, as training needs.

    Works under no_grad and inference_mode too. Attention needs a second derivative (`layers.allow_double_backward`).
    """
    with torch.inference_mode(False), torch.enable_grad():
        if x.is_inference() or not x.requires_grad:
            x, c_noise = x.clone().requires_grad_(), c_noise.clone()
            condition = None if condition is None else condition.clone()
        total = energy(network, readout, x, c_noise, condition).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=create_graph)
    return -gradient
