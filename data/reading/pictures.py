"""Decoding one untrusted picture, whatever camera or program made it, into the array that is packed, within limits."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps

from scoreray.data.errors import DataError, UserError

MAX_PIXELS = 1 << 27
# By content, not by name. Others of Pillow's formats start programs (EPS) or are of no use here.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif"
)  # fmt: skip
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEAD_BYTES = 32  # enough of a file to recognise a picture


@dataclass(frozen=True)
class Fitting:
    """Pictures are resized to cover `width` x `height` and cropped at their centre. One that had to be enlarged more
    than `max_enlarge` times is refused."""

    width: int
    height: int
    max_enlarge: float = math.inf


def looks_like_a_picture(head: bytes) -> bool:
    """Whether a file whose first HEAD_BYTES these are has one of the FORMATS, whatever its name is."""
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace())
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
    )


def open_picture(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture, decoded, and turned upright as its EXIF data say. Raises DataError naming it."""
    if not data:
        raise DataError(f"{name}: is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's opinions on sizes and odd chunks; the limit is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise DataError(f"{name}: {image.width} x {image.height} pixels, the limit is {max_pixels}")
            frames = _num_pictures(image)
            if frames > 1:
                raise DataError(f"{name}: an animation or a document of {frames} pictures; keep one of them")
            bits = _bits_per_channel(image, data)
            if bits > 8:
                raise DataError(
                    f"{name}: more than 8 bits a channel ({image.mode}): {bits}; convert it to 8 bits first"
                )
            image.load()  # now: what it finds damaged must not be lost where a failing search for a tag is no error
            turn = _UPRIGHT.get(_orientation(image))
            return image if turn is None else image.transpose(turn)
    except DataError:
        raise
    except Exception as error:  # a decoder of bytes from outside may raise anything
        raise DataError(f"{name}: {_reason(error)}") from error


def plain_format(data: bytes) -> Literal["png", "jpg"] | None:
    """png or jpg where such a decoder, which knows of pixels alone, gives what `open_picture` gives: grey or RGB of 8
    bits, upright, without transparency, undamaged. None for others and for what can't be opened."""
    if usual := _usual_format(data):
        return usual
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
            if image.mode not in ("L", "RGB") or "transparency" in image.info or _num_pictures(image) > 1:
                return None
            if image.format == "PNG":
                image.verify()  # its checksums, which the plain decoder passes over: flipped bits are other pixels
                is_plain = data[24] == 8 and not any(name in data for name in _TURNED_PNG)
                return "png" if is_plain else None
            return "jpg" if _orientation(image) not in _UPRIGHT else None
    except Exception:  # a parser of bytes from outside may raise anything
        return None


def _usual_format(data: bytes) -> Literal["png", "jpg"] | None:
    """`plain_format` of most files, from their chunks or segments alone: 4 us, where Pillow takes 45 (tars without a
    manifest are looked at in every epoch: 28 x 28 png took 110 us a sample in all, and 64 without Pillow)."""
    if data[:3] == b"\xff\xd8\xff":
        at, is_plain = 2, False
        while data[at : at + 1] == b"\xff" and (size := int.from_bytes(data[at + 2 : at + 4])) >= 2:
            if data[at + 1] == _SCAN:
                return "jpg" if is_plain else None
            if data[at + 1] in _FRAMES:
                is_plain = data[at + 4 : at + 5] == b"\x08" and data[at + 9 : at + 10] in (b"\1", b"\3")
            elif data[at + 1] not in _USUAL_SEGMENTS:  # EXIF, colours as Adobe has them, more pictures
                return None
            at += 2 + size
        return None
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[24:26] not in (b"\x08\x00", b"\x08\x02"):
        return None
    at, view = 8, memoryview(data)
    while (kind := data[at + 4 : at + 8]) in _USUAL_CHUNKS:
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return None
        if kind == b"IEND":
            return "png"
        at = end + 4
    return None


_FRAMES, _SCAN = (0xC0, 0xC1, 0xC2), 0xDA  # baseline, extended, progressive; the pixels begin
_USUAL_SEGMENTS = (0xE0, 0xDB, 0xC4, 0xDD, 0xFE)  # JFIF, quantization, Huffman tables, restarts, comments
_USUAL_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs", b"tIME")
_TURNED_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # what a turn may be written in, at either end


def _num_pictures(image: Image.Image) -> int:
    # A phone's jpg may hold a second picture (a preview, a depth map): the first one is the photograph.
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def _bits_per_channel(image: ImageFile.ImageFile, data: bytes) -> int:
    """What the file has, where Pillow may drop the low ones without a word. 32 for floats."""
    if image.mode in ("F", "I"):
        return 32 if image.format != "PPM" else 16
    if image.format == "PNG":
        return data[24]  # of the header, which is always the first
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
    if image.format == "PPM" and image.tile[0].codec_name == "ppm":
        return int(image.tile[0].args[1]).bit_length()  # type: ignore[index]
    if image.format == "AVIF" and (at := data.find(b"pixi")) >= 0:
        return max(data[at + 9 : at + 9 + data[at + 8]], default=8)
    return 16 if image.mode.startswith("I;16") else 8


def _orientation(image: Image.Image) -> int:
    """The EXIF tag of a camera that was turned, 1 for upright. What else the EXIF data hold, malformed or not, is of
    no concern here: `ImageOps.exif_transpose` writes all of it again, and fails on what it can't write."""
    exif = image.info.get("exif")
    if isinstance(exif, bytes) and (found := orientation_in(exif)) is not None:
        return found
    try:  # a TIFF's own directory, a PNG's raw profile, XMP
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # no viewer finds a turn in such bytes either
        return 1


def orientation_in(exif: bytes) -> int | None:
    """The orientation tag of EXIF data, None where there is none to be found. Pillow's parser stops at the first tag
    whose value is outside the data; this one looks at no other tag's value (Exif 2.3, 4.6.2)."""
    data = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    try:
        if order is not None:
            (start,) = struct.unpack_from(f"{order}I", data, 4)
            (num_tags,) = struct.unpack_from(f"{order}H", data, start)
            for at in range(start + 2, start + 2 + 12 * num_tags, 12):
                tag, kind, count = struct.unpack_from(f"{order}HHI", data, at)
                if tag == ORIENTATION and count and kind in _WHOLE_NUMBERS:
                    return int(struct.unpack_from(order + _WHOLE_NUMBERS[kind], data, at + 8)[0])
    except struct.error:  # it is cut
        pass
    return None


_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}  # of the types that a tag may have


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA")


def as_array(
    image: Image.Image, shape: tuple[int, ...], fitting: Fitting | None, name: str, *, to_grey: bool = False
) -> np.ndarray:
    """uint8 [H, W, C] for `shape` (C, H, W): transparency is dropped, palettes and CMYK become RGB, colours become
    grey with `to_grey`, and with `fitting` the picture is fitted. Raises DataError, UserError naming it."""
    if shape[0] == 1 and not is_grey(image) and not to_grey:
        raise UserError(
            f"{name}: has colours, but the others are grey; --channels 3 packs all as RGB, --channels 1 all as grey"
        )
    image = convert(image, shape[0], name)
    if fitting:
        image = fit(image, fitting, name)
    if image.size != (shape[2], shape[1]):
        raise UserError(
            f"{name}: {image.width} x {image.height} pixels, the first image has {shape[2]} x {shape[1]}; "
            "give --image-size to resize and crop them all"
        )
    return with_channels(image)


def fitted_pixels(image: np.ndarray, fitting: Fitting | None, name: str) -> np.ndarray:
    """uint8 [H, W, C], fitted. Raises DataError naming it."""
    if fitting is None or image.shape[:2] == (fitting.height, fitting.width):
        return image
    return with_channels(fit(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), fitting, name))


def with_channels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a grey or RGB picture."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def convert(image: Image.Image, num_channels: int, name: str) -> Image.Image:
    """Grey (1) or RGB (3) of any mode: transparency is dropped, palettes and CMYK become RGB. Raises DataError."""
    try:
        return image.convert("L" if num_channels == 1 else "RGB")
    except Exception as error:  # a decoder of bytes from outside may raise anything
        raise DataError(f"{name}: {_reason(error)}") from error


def fit(image: Image.Image, fitting: Fitting, name: str) -> Image.Image:
    """The image resized to cover the size (antialiased bicubic), then cropped at its centre. Raises DataError."""
    enlarged = max(fitting.width / image.width, fitting.height / image.height)
    if enlarged > fitting.max_enlarge:
        raise DataError(
            f"{name}: {image.width} x {image.height} pixels would be enlarged {enlarged:.2f} times to "
            f"{fitting.width} x {fitting.height}, --max-enlarge is {fitting.max_enlarge:g}"
        )
    return ImageOps.fit(image, (fitting.width, fitting.height), Image.Resampling.BICUBIC)


def picture_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of a picture that stands upright, from its header alone. Raises DataError naming it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.format == "PNG" and any(name in data for name in _TURNED_PNG):
                image.load()  # what follows the pixels is read with them
            turned = _orientation(image) in _TURNED_BY_90
    except Exception as error:  # a decoder of bytes from outside may raise anything
        raise DataError(f"{name}: {_reason(error)}") from error
    return image.size[::-1] if turned else image.size


_TURNED_BY_90 = (5, 6, 7, 8)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"is none of {', '.join(FORMATS)}, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than the limit of {MAX_PIXELS}"
    return f"can't be decoded: {' '.join(str(error).split()) or type(error).__name__}"
