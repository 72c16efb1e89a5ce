"""Langevin chains of a fixed number of steps with given noise: of a density, and of it given a noisier sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


def langevin_chain(
    score: Score, x: Tensor, step_size: Tensor | float, noises: Tensor, noise_scale: float = 1.0
) -> Tensor:
    """x after one step x + e score(x) + noise_scale sqrt(2 e) z for each z of noises [B, K, ...]; without gradient.

    step_size e: a number, or a tensor that broadcasts against x [B, ...]. noise_scale 1 is Langevin's own.
    """
    e = torch.as_tensor(step_size, dtype=x.dtype, device=x.device)
    x = x.detach()
    for z in noises.unbind(1):
        x = x + e * score(x).detach() + noise_scale * (2 * e).sqrt() * z
    return x


def recovery_chain(score: Score, noisier: Tensor, added: Tensor, step_size: float, noises: Tensor) -> Tensor:
    """Langevin dynamics of p(x | noisier), noisier = x + added z, from `noisier` itself (Gao 2021); without gradient.

    Its score is score(x) + (noisier - x) / added^2. The second term is stepped exactly, with the score held (an
    Ornstein-Uhlenbeck process about noisier + added^2 score, over a time of step_size added^2): where noise was added
    in small steps the score hardly changes, and the variance has a small part of the error that an Euler step leaves.
    added broadcasts against noisier [B, ...]; noises [B, K, ...], one a step.
    """
    kept, x = math.exp(-step_size), noisier.detach()
    spread = added * math.sqrt(1 - kept**2)
    for z in noises.unbind(1):
        x = kept * x + (1 - kept) * (noisier + added**2 * score(x).detach()) + spread * z
    return x
