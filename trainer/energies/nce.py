"""Noise-contrastive estimation: an energy and its log-normaliser from a classifier of data and noise (Gutmann 2010).

With G = ln p_model - ln p_noise the probability that a value is of the data is sigmoid(G - ln nu), nu values of noise
for each of the data. That classifier is best where p_model is the data's density: so ln Z is a parameter like any
other, and comes out as what normalises the energy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def noise_contrastive_loss(of_data: Tensor, of_noise: Tensor) -> Tensor:
    """The logistic loss [B] of ln p_model - ln p_noise at a sample, of_data [B], and at its noise, of_noise [B, nu]."""
    log_ratio = math.log(of_noise.shape[1])
    return F.softplus(log_ratio - of_data) + F.softplus(of_noise - log_ratio).sum(1)


class LogPartition(nn.Module):
    """ln Z of an energy without noise levels, as a parameter [1] (DeepSpeed can't share out a scalar)."""

    def __init__(self, initial: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([initial]))

    def forward(self, energy: Tensor) -> Tensor:
        """ln p = -E - ln Z, of energies of any shape."""
        return -energy - self.value.to(energy.dtype)
