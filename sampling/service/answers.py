"""Samples as the bytes of an answer: JSON with base64, one PNG sheet, or an npz."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scoreray.sampling.offline.generate import MAX_SHEET, png, png_of_sheet
from scoreray.trainer.step import to_uint8

MediaType = Literal["application/json", "image/png", "application/x-npz"]
MEDIA: tuple[MediaType, ...] = ("application/json", "image/png", "application/x-npz")


def choose_media(accept: str | None) -> MediaType:
    """The medium that an Accept header wants most, JSON where it wants none of ours (RFC 9110, 12.5.1).

    The most specific range that fits a medium says how much it is wanted; among equals the one that is named more
    exactly, then the one that is named first.
    """
    ranges = [_range(position, part) for position, part in enumerate((accept or "").split(","))]
    wanted = []
    for media in MEDIA:
        kinds = (media, media.partition("/")[0] + "/*", "*/*")
        fits = [(kinds.index(kind), position, quality) for kind, position, quality in ranges if kind in kinds]
        if fits and min(fits)[2] > 0:
            breadth, position, quality = min(fits)
            wanted.append((-quality, breadth, position, MEDIA.index(media)))
    return MEDIA[min(wanted)[3]] if wanted else "application/json"


def _range(position: int, part: str) -> tuple[str, int, float]:
    """One range of media, its place, and its quality from 0 to 1; 1 where that is no number."""
    kind, *parameters = [piece.strip().lower() for piece in part.split(";")]
    try:
        quality = float(next((p[2:] for p in parameters if p.startswith("q=")), "1"))
    except ValueError:
        quality = 1.0
    return kind, position, min(1.0, quality) if quality > 0 else 0.0


def encode(samples: Tensor, labels: Sequence[int], media: str, format_: str) -> bytes:
    """Samples [n, ...] in the model's range: the array of `data` as JSON, a PNG sheet, or an npz.

    format_: "png" (uint8 pictures) or "npy" (float32, as the model gives them). In an npz, pictures are `images` uint8
    [n, H, W, C] and others `samples` float32 [n, ...], beside `labels` int64 [n].
    """
    if media == "image/png":
        return png_of_sheet(to_uint8(samples[:MAX_SHEET]))
    if media == "application/x-npz":
        arrays: dict[str, Any] = {"labels": np.asarray(labels, dtype=np.int64)}
        if format_ == "png":
            arrays["images"] = to_uint8(samples).permute(0, 2, 3, 1).numpy()
        else:
            arrays["samples"] = samples.float().numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
    ready = to_uint8(samples) if format_ == "png" else samples.float()
    items = []
    for i, (one, label) in enumerate(zip(ready, labels, strict=True)):
        data = png(one) if format_ == "png" else npy(one)
        items.append({"index": i, "class": None if label < 0 else label, "b64_json": base64.b64encode(data).decode()})
    return json.dumps(items).encode()


def npy(array: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.numpy(), allow_pickle=False)
    return buffer.getvalue()


def preview_sheet(denoised: Tensor) -> str:
    """A sheet of denoised estimates [n, C, H, W] as base64 of a PNG."""
    return base64.b64encode(png_of_sheet(to_uint8(torch.nan_to_num(denoised)))).decode()
