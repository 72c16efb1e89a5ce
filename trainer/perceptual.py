"""The perceptual term of an autoencoder's loss: how far two pictures' features are apart (Zhang 2018, LPIPS).

Features come from a network that is trained already and named in the config, `package.module:Name` or a file of
TorchScript. Without LPIPS' learned weights of channels: features are scaled to unit length at each place, and their
squared difference is averaged over places and summed over channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.own_code import instance, is_own, line_of
from scoreray.data.storage.store import NotFound, open_store
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective

SUFFIXES = (".pt", ".ts")
SMALLEST = 1e-10  # of a feature's length: below, it has no direction
KEY = "objective.perceptual"


def perceptual_distance(
    objective: AutoencodingObjective, shape: Sequence[int]
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(x, reconstruction) -> distances [B], of samples of `shape` in the model's range; None where the objective names
    no features. They are taken once on random numbers. Raises UserError."""
    name = objective.perceptual
    if name is None:
        return None
    features = _Features(name)
    x = torch.zeros(2, *shape, device="cpu")
    features.distance(x, x)
    return features.distance


class _Features:
    """What takes features, on the device of the samples that it is given; no part of the trained module."""

    def __init__(self, name: str):
        self._name = name
        with torch.device("cpu"):  # also where the trained module is built on the meta device
            self._function: Any = instance(name, KEY) if is_own(name) else _torchscript(name)
        self._device = torch.device("cpu")
        if isinstance(self._function, nn.Module):
            self._function.eval()
            for parameter in self._function.parameters():  # a ScriptModule has no requires_grad_
                parameter.requires_grad_(False)

    def distance(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        if x.device != self._device and isinstance(self._function, nn.Module):
            self._function, self._device = self._function.to(x.device), x.device
        with torch.no_grad():
            wanted = self._of(x)
        found = self._of(reconstruction.to(x.dtype))
        distances = [_apart(a, b) for a, b in zip(wanted, found, strict=True)]
        return torch.stack(distances).sum(0)

    def _of(self, x: Tensor) -> Sequence[Tensor]:
        try:
            found = self._function(x)
        except Exception as error:
            raise UserError(f"{KEY}: {self._name} failed on samples {list(x.shape)}: {line_of(error)}") from error
        maps = found if isinstance(found, list | tuple) else [found]
        wrong = [one for one in maps if not isinstance(one, Tensor) or one.ndim < 2 or len(one) != len(x)]
        if wrong or not maps:
            given = f"{list(wrong[0].shape)}" if wrong and isinstance(wrong[0], Tensor) else f"a {type(found).__name__}"
            raise UserError(
                f"{KEY}: {self._name} gave {given} for samples {list(x.shape)}; features [B, d] or [B, d, ...] are "
                "needed, or a list of them"
            )
        return maps


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance [B] of features [B, d, ...] of unit length along d, the mean over places."""
    a, b = (F.normalize(one, dim=1, eps=SMALLEST) for one in (a, b))
    return (a - b).square().sum(1).reshape(len(a), -1).mean(1)


def _torchscript(url: str) -> nn.Module:
    folder, _, name = url.rpartition("/")
    if Path(name).suffix not in SUFFIXES:
        raise UserError(f"{KEY}: '{url}' is no package.module:Name and no file that ends in {' or '.join(SUFFIXES)}")
    try:
        data = open_store(folder or ("/" if url.startswith("/") else ".")).get(name)
    except NotFound:
        raise UserError(f"{KEY}: {url}: there is no such file") from None
    try:
        return torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-any-return, no-untyped-call]
    except RuntimeError as error:
        raise UserError(f"{KEY}: {url}: no TorchScript module: {line_of(error)}") from None
