"""Inspecting a data set: `summary` counts and measures; grids of pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import linear_preview
from scoreray.data.fields.limits import is_picture
from scoreray.data.packing.field_pictures import field_pictures
from scoreray.data.packing.field_summary import FieldSummary, field_summaries
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader

GRID_BACKGROUND = 48
FAINT = 0.02  # a standard deviation of 2 or 3 of 255 levels
LOOKED_AT_BYTES = 256 << 20  # of samples that are in memory at once, as float32
GRID_PIXELS = 720  # about how wide a grid of small images is made
LEAST_GAP = 4  # pixels between images: channels that stand side by side in one are seen to belong together
CAPTION_LINES, LINE_PIXELS, LETTER_PIXELS, CAPTION_COLOUR = 2, 13, 6, (225, 225, 225)


@dataclass(frozen=True)
class Summary:
    """What a data set holds; shape, dtype and classes as in its manifest."""

    name: str
    url: str
    num_samples: int
    num_shards: int
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    class_counts: dict[str, int]
    fields: list[FieldSummary]


def summary(samples: SampleReader) -> Summary:
    """What a data set holds, from its manifest and a few samples."""
    manifest = samples.manifest
    return Summary(
        name=manifest.name,
        url=samples.url,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        shape=tuple(manifest.shape),
        dtype=manifest.dtype,
        class_counts=dict(zip(manifest.classes, manifest.class_counts, strict=True)),
        fields=field_summaries(samples),
    )


def spread(manifest: Manifest, most: int) -> range:
    """Numbers of `most` samples, or up to twice as many, from all over the set; of fewer where they are large."""
    most = min(most, max(2, LOOKED_AT_BYTES // (4 * math.prod(manifest.shape))))
    return range(0, manifest.num_samples, max(1, manifest.num_samples // most))


def visible(samples: torch.Tensor, manifest: Manifest) -> torch.Tensor:
    """Samples of the target as `picture_grid` draws them. Images are as they are, and so are arrays of three channels
    that are like images, or a data set of version 2 has (its grey ones too): floats that leave [-1, 1], or hardly
    differ in it, are shown from two standard deviations below the mean to two above. Others go by a colour map
    (`field_pictures`). Latents of pictures are shown by the linear map that was fitted when they were
    encoded. Raises UserError for points, which have no grid."""
    if samples.dtype == torch.uint8 and is_picture(manifest.shape):
        return samples
    target = manifest.target
    if target.encoding is not None and target.encoding.preview:
        return linear_preview(target.encoding.preview, samples.float())
    if len(manifest.shape) < 2:
        raise UserError(
            f"--picture: samples of {manifest.shape[0]} numbers are no pictures, which have a grid; "
            "signals have it packed as [N, channels, length]"
        )
    if not is_picture(manifest.shape) or (manifest.shape[0] == 1 and manifest.version > 2):
        return torch.from_numpy(field_pictures(samples))
    samples = samples.double()
    if float(samples.abs().max()) <= 1 and manifest.sigma_data > FAINT:
        return samples
    return (samples - float(np.mean(manifest.channel_means()))) / (2 * manifest.sigma_data)


def picture_grid(
    images: torch.Tensor | np.ndarray, columns: int | None = None, captions: Sequence[str] = ()
) -> Image.Image:
    """A picture of images [N, C, H, W], C 1 or 3: uint8, or floats in [-1, 1] (others are clipped).

    Small images are enlarged by whole factors with nearest neighbour, so that their pixels are seen as they are.
    `columns`: None makes it about square. `captions`: a text under each image, cut to CAPTION_LINES lines.
    """
    array = images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if not is_picture(array.shape[1:]) or not len(array):
        raise ValueError(f"images of shape {tuple(array.shape)}: [N, C, H, W] with C 1 or 3 is needed")
    if images.dtype not in (torch.uint8, np.dtype(np.uint8)):
        array = np.nan_to_num(array * 127.5 + 127.5, nan=0.0)
    array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    n, _, height, width = array.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    scale = max(1, GRID_PIXELS // (columns * width))
    gap = max(LEAST_GAP, 2 * scale // 3)
    below = CAPTION_LINES * LINE_PIXELS if captions else 0
    across, down = width * scale + gap, height * scale + gap + below
    canvas = np.full((rows * down + gap, columns * across + gap, 3), GRID_BACKGROUND, np.uint8)
    for i, image in enumerate(array):
        large = image.repeat(scale, 1).repeat(scale, 2).transpose(1, 2, 0)
        y, x = gap + i // columns * down, gap + i % columns * across
        canvas[y : y + height * scale, x : x + width * scale] = large  # one channel is spread over three
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), _caption_font(captions)
    for i, caption in enumerate(captions):
        text = "\n".join(
            textwrap.wrap(caption, max(4, across // LETTER_PIXELS), max_lines=CAPTION_LINES, placeholder="...")
        )
        place = (gap + i % columns * across, gap + i // columns * down + height * scale)
        draw.multiline_text(place, text, fill=CAPTION_COLOUR, font=font, spacing=1)
    return picture


def one_below_another(pictures: Sequence[Image.Image]) -> Image.Image:
    """Grids of several sizes in one picture."""
    width = max(one.width for one in pictures)
    whole = Image.new("RGB", (width, sum(one.height for one in pictures)), (GRID_BACKGROUND,) * 3)
    top = 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def _caption_font(captions: Sequence[str]) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own has no letters beyond ASCII; matplotlib's, DejaVu Sans, has those of Europe, Greek, Arabic, ..."""
    if "".join(captions).isascii():
        return ImageFont.load_default(10)
    import matplotlib  # half a second, which other captions need not wait for

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 9)
