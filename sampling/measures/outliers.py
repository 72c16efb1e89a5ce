"""Out-of-distribution p-values: samples ranked by a statistic of their likelihood among a model's own samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["typicality", "likelihood", "ratio"]


@dataclass(frozen=True)
class OutOfDistribution:
    """p_values [n]: the share of the model's own samples that are as far out, counting itself: uniform on average where
    the samples are the model's. ks, ks_p_value: the two-sample Kolmogorov-Smirnov test of the statistic, which holds
    however few of its own samples there are, as p-values that share them do not."""

    p_values: Tensor
    ks: float
    ks_p_value: float


def out_of_distribution(
    nats: Tensor, background: Tensor, own_nats: Tensor, own_background: Tensor, statistic: Statistic = "typicality"
) -> OutOfDistribution:
    """nats, background [n]: log-likelihoods of samples under the model and under a background; own_*: [m] of its own.

    "likelihood": low likelihood is far out. "typicality": likelihood far from the mean of the model's own, on either
    side, as in many dimensions samples of another law can be likelier than all of its own (Nalisnick 2019). "ratio":
    likelihood less that of the background, a model of what all data share, low is far out (Ren 2019).
    """
    from scipy.stats import ks_2samp

    if statistic == "ratio":
        there, own = nats - background, own_nats - own_background
    elif statistic == "typicality":
        there, own = -(nats - own_nats.mean()).abs(), -(own_nats - own_nats.mean()).abs()
    else:
        there, own = nats, own_nats
    as_far = torch.searchsorted(own.sort().values, there, right=True)
    found = ks_2samp(there.numpy(), own.numpy())
    return OutOfDistribution((as_far + 1).double() / (len(own) + 1), float(found.statistic), float(found.pvalue))
