"""Decoding a tar member into an array: pictures and npy without pickle, nothing else, and never above a size.

Stock readers dispatch on the member's name and unpickle some; here the format comes from the verified index, and what
a decoder may return (shape, type) is known beforehand from the manifest.
"""

from __future__ import annotations

import functools
import io
import math
import struct
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import MAX_CLASSES
from scoreray.data.fields.limits import check_label
from scoreray.data.fields.png_rows import Members, png_rows, pyspng
from scoreray.data.fields.record_layout import FORMATS

MAX_PIXELS = 1 << 25


def decode(data: bytes, code: int, shape: tuple[int, ...], dtype: np.dtype, name: Callable[[], str]) -> np.ndarray:
    """The sample as the manifest describes it: images as [H, W, C] uint8 (C last), arrays in `shape`.

    Args:
      code: of the format (record_layout.FORMATS).
      shape: (C, H, W) of images with `dtype` uint8, else the array's.
      name: what to call the sample in an error.

    Raises DataError, naming the sample, when the bytes are damaged or hold another shape, type or format.
    """
    out = np.empty((*shape[1:], shape[0]) if dtype == np.uint8 else shape, dtype)
    decode_into(out, data, code, name)
    return out


def decode_into(out: np.ndarray, data: bytes, code: int, name: Callable[[], str], is_image: bool | None = None) -> None:
    """As decode(), into `out`: [H, W, C] uint8 or the array, contiguous. is_image: None says that what is uint8 is."""
    is_image = out.dtype == np.uint8 if is_image is None else is_image
    try:
        array = (_DECODERS if is_image else _ARRAY_DECODERS)[code](data, out)
    except DataError as error:
        raise DataError(f"{name()}: {error}") from error
    except Exception as error:  # a decoder of untrusted bytes may raise anything
        raise DataError(f"{name()}: {_reason(error)}") from error
    if array is out:
        return
    if is_image and array.shape == (*out.shape[:-1], 1) and out.shape[-1] == 3:
        array = np.broadcast_to(array, out.shape)  # a grey picture among others in colour
    if array.shape != out.shape or array.dtype != out.dtype:
        raise DataError(f"{name()}: holds {array.dtype} {array.shape}, the manifest says {out.dtype} {out.shape}")
    out[...] = array


def decode_rows(
    members: Sequence[bytes | None], codes: np.ndarray, out: np.ndarray, is_image: bool | None = None
) -> list[int]:
    """Decodes member i, of format codes[i], into out[i] (as decode_into() does), at next to the decoders' own cost.

    One by one through webdataset's chain, as other members go (allowlist.py), a 28 x 28 png costs 13.1 us instead of
    10.8 and a 56 x 56 jpg 30.5 instead of 26.5: 15% and 11% of all that the stream spends on a sample.

    Returns the rows that it left out, for decode_into(): what is missing, damaged or not of the usual kind.
    """
    of_format = _ROWS if (out.dtype == np.uint8 if is_image is None else is_image) else _ARRAY_ROWS
    if len(codes) and (codes == codes[0]).all():
        return of_format.get(int(codes[0]), _no_rows)(enumerate(members), out)
    left = []
    for code in np.unique(codes).tolist():
        rows = np.flatnonzero(codes == code).tolist()
        left += of_format.get(code, _no_rows)(((row, members[row]) for row in rows), out)
    return sorted(left)


def decode_as_found(data: bytes, code: int) -> np.ndarray:
    """A sample of which nothing is known yet: uint8 [H, W, 1 or 3] or float32. Raises DataError, without a name."""
    try:
        array = _DECODERS[code](data, None)
    except DataError:
        raise
    except Exception as error:  # a decoder of untrusted bytes may raise anything
        raise DataError(_reason(error)) from error
    if (array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (1, 3)) or (
        array.dtype == np.float32 and array.ndim
    ):
        return array
    stored = (
        array.transpose(2, 0, 1) if code == FORMATS["npy"] and array.dtype == np.uint8 and array.ndim == 3 else array
    )
    raise DataError(f"is {array.dtype} {stored.shape}; uint8 [1 or 3, H, W], or float32 of any shape, is needed")


def _reason(error: BaseException) -> str:
    return f"can't be decoded: {' '.join(str(error).split()) or type(error).__name__}"


# A decoder is given what to decode into, or None when nothing is known of the sample yet; it returns that or an array.


def _png(data: bytes, out: np.ndarray | None) -> np.ndarray:
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n":
        raise DataError("is no png")
    width, height = struct.unpack(">II", data[16:24])
    _check_size(width, height, out)
    if pyspng is None:
        return _pillow(data, "PNG")
    array = pyspng.load(data)
    return array[:, :, None] if array.ndim == 2 else array


def _jpg(data: bytes, out: np.ndarray | None) -> np.ndarray:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, out)
    if out is None:
        return simplejpeg.decode_jpeg(data, colorspace="GRAY" if colours == "Gray" else "RGB")
    if out.ndim != 3 or out.dtype != np.uint8 or out.shape[2] not in (1, 3):
        raise DataError(f"is a jpg, the manifest says {out.dtype} {out.shape}")
    simplejpeg.decode_jpeg(data, colorspace="GRAY" if out.shape[2] == 1 else "RGB", buffer=out)
    return out


def _npy(data: bytes, out: np.ndarray | None) -> np.ndarray:
    array = npy_array(data)
    return array.transpose(1, 2, 0) if array.dtype == np.uint8 and array.ndim == 3 else array


def npy_array(data: bytes) -> np.ndarray:
    """The array of an `.npy`: plain numbers in C order, a view of the bytes. Raises DataError, ValueError."""
    head = data[: 10 + int.from_bytes(data[8:10], "little")]
    found, fortran, dtype = _read_npy_head(head)
    if dtype.hasobject or fortran or math.prod(found) * dtype.itemsize != len(data) - len(head):
        raise DataError("an npy of plain numbers in C order, as long as its header says, is needed")
    return np.frombuffer(data, dtype, offset=len(head)).reshape(found)


# NumPy writes a header in 20 us and reads one, as Python source, in 25, more than most arrays' values take: members of
# the same shape have the same one.


@functools.lru_cache(maxsize=1024)  # sequences have one for each length
def _read_npy_head(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, type). Raises DataError, ValueError."""
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise DataError(f"npy version {version}, (1, 0) is read")
    try:
        return np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy evaluates it as a Python literal, and may raise what the tokenizer does
        raise DataError(f"its header is no npy's: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=1024)
def npy_head(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes of an `.npy` of version (1, 0) before its values in C order."""
    file, descr = io.BytesIO(), np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def raw_array(data: bytes, out: np.ndarray) -> np.ndarray:
    """The values of `out`'s type and shape, in C order, that are all there is. Raises DataError."""
    if len(data) != out.nbytes:
        raise DataError(f"is {len(data)} bytes, the manifest says {out.dtype} {out.shape}: {out.nbytes}")
    return np.frombuffer(data, out.dtype).reshape(out.shape)


def _picture(data: bytes, out: np.ndarray | None) -> np.ndarray:
    from scoreray.data.reading.pictures import is_grey, open_picture

    try:
        image = open_picture(data, "", MAX_PIXELS)
    except DataError as error:
        raise DataError(str(error).removeprefix(": ")) from error  # the caller has the name
    array = np.asarray(image.convert("L" if is_grey(image) else "RGB"))
    return array[:, :, None] if array.ndim == 2 else array


def _pillow(data: bytes, format: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=[format]) as image:
        array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _check_size(width: int, height: int, out: np.ndarray | None) -> None:
    """Before a pixel is decoded: a header of a few bytes may announce any number of them."""
    if out is not None and (height, width) != out.shape[:2]:
        raise DataError(f"is {width} x {height} pixels, the manifest says {' x '.join(map(str, out.shape[1::-1]))}")
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels, the limit is {MAX_PIXELS}")


_DECODERS: dict[int, Callable[[bytes, np.ndarray | None], np.ndarray]] = {
    FORMATS["png"]: _png,
    FORMATS["jpg"]: _jpg,
    FORMATS["npy"]: _npy,
    FORMATS["picture"]: _picture,
}
_ARRAY_DECODERS = _DECODERS | {FORMATS["npy"]: lambda data, out: npy_array(data), FORMATS["raw"]: raw_array}


# The same for many members. The usual header is compared as a whole, before a decoder sees the bytes; what has another
# one (colours to be converted, interlacing, another shape) or fails is left to the decoders above, which say why.


def _png_rows(members: Members, out: np.ndarray) -> list[int]:
    is_picture = out.dtype == np.uint8 and out.ndim == 4 and out.shape[3] in (1, 3)
    if is_picture and 0 < out.shape[1] * out.shape[2] <= MAX_PIXELS:
        return png_rows(members, out)
    return _no_rows(members, out)


def _jpg_rows(members: Members, out: np.ndarray) -> list[int]:
    if out.dtype != np.uint8 or out.ndim != 4 or out.shape[3] not in (1, 3):
        return [row for row, _ in members]
    load, colours, shape, left = simplejpeg.decode_jpeg, "GRAY" if out.shape[3] == 1 else "RGB", out.shape[1:], []
    for row, member in members:
        try:  # nothing is decoded that is larger than the buffer; a smaller one shows in the shape
            if load(member, colours, buffer=out[row]).shape == shape:
                continue
        except Exception:
            pass
        left.append(row)
    return left


def _npy_rows(members: Members, out: np.ndarray) -> list[int]:
    return _plain_rows(members, out, npy_head(out.dtype, out.shape[1:]))


def _plain_rows(members: Members, out: np.ndarray, head: bytes = b"") -> list[int]:
    """Of members that are `head` and then the values; by memoryviews, as arrays of each member take 0.8 us more."""
    begin, size, left = len(head), math.prod(out.shape[1:]) * out.dtype.itemsize, []
    values = out.data.cast("B")
    for row, member in members:
        if member is not None and len(member) == begin + size and member[:begin] == head:
            values[row * size : (row + 1) * size] = memoryview(member)[begin:]
        else:
            left.append(row)
    return left


def _no_rows(members: Members, out: np.ndarray) -> list[int]:
    return [row for row, _ in members]


_ROWS: dict[int, Callable[[Members, np.ndarray], list[int]]] = {FORMATS["png"]: _png_rows, FORMATS["jpg"]: _jpg_rows}
_ARRAY_ROWS: dict[int, Callable[[Members, np.ndarray], list[int]]] = {
    FORMATS["npy"]: _npy_rows,
    FORMATS["raw"]: _plain_rows,
}


def decode_class(data: bytes) -> int:
    """The class number of a `.cls` member. Raises DataError, without a name."""
    text = data[:32].strip()
    if len(data) > 32 or not text.isdigit():
        raise DataError(f"{data[:32]!r} is no class number (0 to {MAX_CLASSES - 1})")
    try:
        check_label(int(text), "")
    except UserError as error:
        raise DataError(str(error).removeprefix(": ")) from None
    return int(text)
