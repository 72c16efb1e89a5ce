"""One picture from outside, whatever camera or program made it, as the array that is packed: every step bounded."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from scoreray.data.errors import DataError, UserError

MAX_PIXELS = 1 << 27
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# By content, not by name. Others of Pillow's formats start programs (EPS) or are of no use here.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NOT_READ = (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError, Image.DecompressionBombError)


def open_picture(data: bytes, name: str) -> Image.Image:
    """The picture, turned upright as its EXIF data say. Nothing large is decoded yet. Raises DataError naming it."""
    if not data:
        raise DataError(f"{name}: is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's opinions on sizes and odd chunks; the limit is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
            # A phone's jpg may hold a second picture (a preview, a depth map): the first one is the photograph.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise DataError(f"{name}: an animation or a document of {frames} pictures; keep one of them")
            if image.mode.startswith("I") or image.mode == "F":
                raise DataError(f"{name}: more than 8 bits a channel ({image.mode}); convert it to 8 bits first")
            return ImageOps.exif_transpose(image)
    except NOT_READ as error:
        raise DataError(f"{name}: {_reason(error)}") from error


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA")


def as_array(
    image: Image.Image, shape: tuple[int, ...], image_size: int | None, name: str, *, to_grey: bool = False
) -> np.ndarray:
    """uint8 [H, W, C] for `shape` (C, H, W): transparency is dropped, palettes and CMYK become RGB, colours become
    grey with `to_grey`, and with `image_size` the picture is fitted. Raises DataError, UserError naming it."""
    if shape[0] == 1 and not is_grey(image) and not to_grey:
        raise UserError(
            f"{name}: has colours, but the others are grey; --channels 3 packs all as RGB, --channels 1 all as grey"
        )
    try:
        image = image.convert("L" if shape[0] == 1 else "RGB")
    except NOT_READ as error:
        raise DataError(f"{name}: {_reason(error)}") from error
    if image_size:
        image = fit(image, image_size)
    if image.size != (shape[2], shape[1]):
        raise UserError(
            f"{name}: {image.width} x {image.height} pixels, the first image has {shape[2]} x {shape[1]}; "
            "give --image-size to resize and crop them all"
        )
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side resized to `size` (antialiased bicubic), then cropped at its centre."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"is none of {', '.join(FORMATS)}, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than the limit of {MAX_PIXELS}"
    return f"can't be decoded: {' '.join(str(error).split()) or type(error).__name__}"
