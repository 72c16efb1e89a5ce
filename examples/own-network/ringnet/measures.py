"""A metric, a scorer and a feature extractor for `scoreray evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def radius_error(samples: Tensor, reference: Tensor) -> Mapping[str, float]:
    """`--metrics ringnet.measures:radius_error`: how far apart the mean radii are; the first number is the value."""
    radius, wanted = (rows.flatten(1).norm(dim=1).mean() for rows in (samples, reference))
    return {"radius_error": abs(float(radius - wanted)), "radius": float(radius)}


def on_ring(samples: Tensor, requested: Mapping[str, Sequence[Any]]) -> Mapping[str, Tensor]:
    """`--metrics match --scorer ringnet.measures:on_ring`: 1 for each sample near the ring that was requested."""
    radii = samples.flatten(1).norm(dim=1)
    wanted = [float(str(name).removeprefix("radius ")) for name in requested["label"]]
    return {"on_ring": ((radii - radii.new_tensor(wanted)).abs() < 0.25).float()}


def polar(samples: Tensor) -> Tensor:
    """`--extractor ringnet.measures:polar`: features [B, 2] of samples [B, ...], by which fid and others compare."""
    x, y = samples.flatten(1).float().unbind(1)
    radius = torch.hypot(x, y)
    return torch.stack([radius, x / radius.clamp(min=1e-6)], dim=1)
