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

from scoreray.data.fields.normalisation import to_uint8
from scoreray.data.packing.field_pictures import field_pictures
from scoreray.sampling.offline.generate import MAX_SHEET, picture_file, png_of_sheet

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


def can_be_pictures(shape: Sequence[int]) -> bool:
    """Whether samples of a shape are pictures, or fields that a colour map makes pictures of: not points."""
    return len(shape) > 1


def as_pictures(values: Tensor, are_pictures: bool) -> Tensor:
    """Values as `ModelInfo.decoded` has them [n, ...] -> uint8 [n, C, H, W]: pictures, which are from -1 to 1, or other
    fields by a colour map, one scale for all."""
    return to_uint8(values) if are_pictures else torch.from_numpy(field_pictures(values))


def encode(samples: Tensor, labels: Sequence[int], media: str, format_: str = "png") -> bytes:
    """The array of `data` as JSON, a PNG sheet, or an npz of pictures uint8 [n, C, H, W] or values float32 [n, ...].

    format_: of each picture in JSON, png, jpeg or webp.
    In an npz, pictures are `images` [n, H, W, C] and others `samples` [n, ...], beside `labels` int64 [n].
    """
    pictures = samples.dtype == torch.uint8
    if media == "image/png":
        return png_of_sheet(samples[:MAX_SHEET])
    if media == "application/x-npz":
        arrays: dict[str, Any] = {"labels": np.asarray(labels, dtype=np.int64)}
        if pictures:
            arrays["images"] = samples.permute(0, 2, 3, 1).numpy()
        else:
            arrays["samples"] = samples.numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
    items = []
    for i, (one, label) in enumerate(zip(samples, labels, strict=True)):
        data = picture_file(one, format_) if pictures else npy(one)
        items.append({"index": i, "class": None if label < 0 else label, "b64_json": base64.b64encode(data).decode()})
    return json.dumps(items).encode()


def npy(array: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.numpy(), allow_pickle=False)
    return buffer.getvalue()
