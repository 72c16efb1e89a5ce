"""Previews of a request on the way: denoised estimates of its first samples, as a sheet of pictures or as numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.offline.generate import picture_file, png_of_sheet
from scoreray.sampling.service.answers import as_pictures, can_be_pictures
from scoreray.sampling.service.request import Preview, SampleRequest

PREVIEW_ROWS = 16
MOST_PREVIEW_VALUES = 64  # of one sample that is no picture
STAY_CALLS = 4  # of a row at one level, before it is one that its sampler stays at


@dataclass(frozen=True)
class DenoisedEstimate:
    """Of a request's first rows on the way.  progress: the share of their calls that is made."""

    progress: float
    sigma: float
    denoised: Tensor


class PreviewSender:
    """Gathers the estimates of a request's first rows; sends one whenever another share of their calls is made.

    Its level is the highest one that a row of the sheet was denoised at. It falls from preview to preview, but for
    samplers that call the network many times at one level: after STAY_CALLS there the next share is shown all the same.
    """

    def __init__(self, request: SampleRequest, send: Callable[[DenoisedEstimate], object]) -> None:
        self._previews, self._send = request.previews, send
        self._rows = min(PREVIEW_ROWS, len(request.seeds))
        self._denoised = torch.zeros(self._rows, *request.shape)
        self._levels = [math.inf] * self._rows
        self._total = max(1, self._rows * request.expected_calls)
        self._calls = self._sent = self._calls_then = 0
        self._level_then = math.inf

    def __call__(self, first: int, sigma: float | Tensor, denoised: Tensor) -> None:
        shown = denoised[: max(0, self._rows - first)]
        if not len(shown):
            return
        rows = slice(first, first + len(shown))
        self._denoised[rows] = shown.float().cpu()
        self._levels[rows] = [sigma.max().item() if isinstance(sigma, Tensor) else sigma] * len(shown)
        self._calls += len(shown)
        share, level = min(1.0, self._calls / self._total), max(self._levels)
        count = min(self._previews, int(share * (self._previews + 1)))
        stayed = self._calls - self._calls_then >= STAY_CALLS * self._rows
        if count > self._sent and math.isfinite(level) and (level < self._level_then or stayed):
            self._sent, self._calls_then, self._level_then = count, self._calls, level
            self._send(DenoisedEstimate(share, level, self._denoised.clone()))


def preview_of(estimate: DenoisedEstimate, info: ModelInfo) -> Preview:
    """Estimates as a picture, or as numbers where they are none."""
    denoised = estimate.denoised
    if can_be_pictures(info.sample_shape):
        return Preview(estimate.progress, estimate.sigma, b64_json=_sheet(denoised, info))
    small = denoised[0].numel() <= MOST_PREVIEW_VALUES
    points = info.decoded(denoised).flatten(1).tolist() if small else None
    return Preview(estimate.progress, estimate.sigma, points=points)


def _sheet(denoised: Tensor, info: ModelInfo) -> str:
    """A sheet of denoised estimates [n, ...] as base64 of a PNG; of one, its picture without a frame."""
    pictures = as_pictures(*info.previewed(torch.nan_to_num(denoised)))
    return base64.b64encode(picture_file(pictures[0]) if len(pictures) == 1 else png_of_sheet(pictures)).decode()
