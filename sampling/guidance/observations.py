"""Pictures, arrays and masks that a request names: one rule for what a value in a file means.

Pictures are read as `scoreray data pack` reads them. What a file does not say is not guessed: values that fit another
convention than the model's are refused with the range that was found.

    pictures, uint8       0 to 255 is black to white, -1 to 1 for the model
    bool                  black and white
    floats                -1 to 1 as the model has them; --value-range LOW,HIGH says what else black and white are
    other integers        only with --value-range
    masks                 two values: 0 (or -1, false) is drawn, 1, 255 or the type's largest (true) is known
    of other models       floats in the units of what the model was trained on, as they are
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.reading.pictures import HEAD_BYTES, IMAGE_SUFFIXES, convert, looks_like_a_picture, open_picture
from scoreray.data.storage.store import NotFound, open_store

MODEL_UNITS = "model"  # the value range of floats that are taken as they are
OVERSHOOT = 1.5  # of floats in [-1, 1]: a measurement, or a sample that is given again, goes a little beyond
NOISE_STDS = 6  # by which noise takes a measurement out of its range
MOST_VALUES = 1 << 28
ARRAYS = (".npy", ".npz")
READ_SUFFIXES = (*IMAGE_SUFFIXES, *ARRAYS)
MAGIC = (b"\x93NUMPY", b"PK\3\4", b"PK\5\6")  # of npy, of npz, of an npz without arrays
NAMES = ("images", "samples")  # of the array of an npz, as `scoreray sample` and the service leave it


@dataclass(frozen=True)
class _File:
    """What a file holds, as it is stored. channels_last: of three dimensions, where both readings would do."""

    url: str
    array: np.ndarray
    is_picture: bool
    channels_last: bool


def parse_value_range(text: str) -> tuple[float, float] | None:
    """What black and white are in a file, None for the model's own units. Raises UserError."""
    if text == MODEL_UNITS:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"--value-range {shortened(text)}: write what black and white are, LOW,HIGH such as 0,1, or 'model'"
        )
    return low, high


def read_observed(
    url: str, shape: Sequence[int], *, pictures: bool, noise_std: float = 0.0, value_range: str | None = None
) -> Tensor:
    """A measurement as float32 of `shape`, in the model's range; one channel is spread over all.

    pictures: whether the model draws pictures, so that values mean brightness. noise_std: of the measurement, which may
    take it out of its range. Raises UserError (another shape, range or kind), DataError (it can't be read).
    """
    file = _read(url, one_channel=shape[0] == 1)
    if not pictures:
        if file.is_picture or file.array.dtype.kind != "f":
            what = "a picture" if file.is_picture else file.array.dtype.name
            raise UserError(
                f"{url}: is {what}, and here are values of shape {list(shape)} in units of their own: give floats, "
                "npy or npz"
            )
        if value_range is not None:
            raise UserError(f"--value-range {value_range}: is for pictures, not for values of shape {list(shape)}")
        return _fit(file, shape, "the measurement")
    return _fit(_in_model_range(file, noise_std, value_range), shape, "the measurement")


def read_mask(url: str, shape: Sequence[int]) -> Tensor:
    """A mask as bool of `shape`, true where the sample is known; one channel is spread over all.

    Raises UserError where it holds other values than two that mean yes and no, or only one of them.
    """
    file = _read(url, one_channel=True)  # of a picture: red on black does not mean that red alone is known
    array = file.array
    _check_finite(file)
    values = np.unique(array)
    top = float(np.iinfo(array.dtype).max) if array.dtype.kind in "iu" else 1.0
    known = next((high for high in (1.0, 255.0, top) if set(values.tolist()) <= {0.0, high}), None)
    if known is None and set(values.tolist()) == {-1.0, 1.0}:
        known = 1.0
    if known is None:
        raise UserError(
            f"{url}: {len(values)} values from {_text(values[0])} to {_text(values[-1])}, and a mask has two: 0 where "
            "the sample is drawn, 1 or 255 where it is known; save it without soft edges, as png or npy"
        )
    mask = _fit(replace(file, array=(array == known).astype(np.float32)), shape, "the mask") > 0
    if bool(mask.all()) or not bool(mask.any()):
        hint = " (transparency is not read)" if file.is_picture else ""
        raise UserError(f"{url}: marks {'all' if mask.all() else 'nothing'} as known{hint}; nothing to inpaint")
    return mask


def read_numbers(url: str) -> Tensor:
    """An npy or npz array of finite numbers as float32, as it is."""
    file = _read(url, one_channel=False)
    if file.is_picture:
        raise UserError(f"{url}: is a picture; a matrix is an npy or npz [m, d]")
    _check_finite(file)
    return torch.from_numpy(file.array.astype(np.float32))


def read_values(url: str, channels: int | None = None) -> np.ndarray:
    """The array of a file as it is stored (it may be empty); of a picture uint8 [C, H, W], greys in as many
    channels as are wanted."""
    file = _read(url, one_channel=channels == 1, may_be_empty=True)
    if not file.is_picture:
        return file.array
    array = file.array.transpose(2, 0, 1)
    return np.broadcast_to(array, (channels or len(array), *array.shape[1:])) if len(array) == 1 else array


def _in_model_range(file: _File, noise_std: float, value_range: str | None) -> _File:
    """A picture's values from -1 to 1. Raises UserError where they are evidently of another range."""
    array, url = file.array, file.url
    _check_finite(file)
    low, high = float(array.min()), float(array.max())
    found = f"{url}: {array.dtype.name} values from {_text(low)} to {_text(high)}"
    if file.is_picture or array.dtype == np.uint8:
        if array.dtype == np.uint8 and not file.is_picture and high == 1 and value_range is None:
            raise UserError(f"{found}: black and white of uint8 are 0 and 255; multiply by 255, or --value-range 0,1")
        bounds: tuple[float, float] | None = (0.0, 255.0) if value_range is None else parse_value_range(value_range)
        if file.is_picture and value_range is not None:
            raise UserError(f"--value-range {value_range}: is for arrays; {url} is a picture, whose range is its own")
    elif array.dtype == bool:
        bounds = (0.0, 1.0)
    elif value_range is not None:
        bounds = parse_value_range(value_range)
    elif array.dtype.kind in "iu":
        raise UserError(f"{found}: say what black and white are with --value-range LOW,HIGH, or save it as uint8")
    else:
        bounds = (-1.0, 1.0)
        top = next((top for top in (1, 255, 65535) if low >= 0 and high <= top), None)
        if top:
            so_bright = " (or --value-range=-1,1 if it is so bright)" if top == 1 else ""
            raise UserError(
                f"{found}: black and white of floats are -1 and 1, and nothing here is below middle grey; say what "
                f"they are, --value-range 0,{top}{so_bright}"
            )
    if bounds is None:
        return file
    values = (array.astype(np.float64) - bounds[0]) / (bounds[1] - bounds[0]) * 2 - 1
    most = OVERSHOOT + NOISE_STDS * noise_std
    if float(np.abs(values).max()) > most:
        raise UserError(
            f"{found}: black and white are {_text(bounds[0])} and {_text(bounds[1])} here; say what else they are with "
            "--value-range LOW,HIGH"
        )
    return replace(file, array=values)


def _fit(file: _File, shape: Sequence[int], what: str) -> Tensor:
    """float32 of `shape` of an array that has it, also with channels last, a leading 1, or one channel for all."""
    array, wanted = file.array, tuple(shape)
    _check_finite(file)
    ways = [array]
    if array.ndim == len(wanted) + 1 and len(array) == 1:
        ways.append(array[0])
    if len(wanted) == 3:
        last = [way.transpose(2, 0, 1) for way in ways if way.ndim == 3]
        ways += last
        ways += [np.broadcast_to(way, wanted) for way in ways if way.shape in (wanted[1:], (1, *wanted[1:]))]
        if last and file.channels_last:  # where both would do, as of 3 x 3 pixels in 3 channels
            ways.insert(0, last[-1])
    fitting = next((way for way in ways if way.shape == wanted), None)
    if fitting is None:
        raise UserError(f"{file.url}: is {list(array.shape)}, and {what} must be {list(wanted)}")
    with np.errstate(over="ignore"):
        values = torch.from_numpy(np.array(fitting, dtype=np.float32, order="C"))
    if not bool(values.isfinite().all()):
        raise UserError(f"{file.url}: holds values that are too large for float32")
    return values


def _check_finite(file: _File) -> None:
    if not bool(np.isfinite(file.array).all()):
        raise UserError(f"{file.url}: holds values that are not finite; mark unknown ones with a mask, not with NaN")


def _read(url: str, *, one_channel: bool, may_be_empty: bool = False) -> _File:
    parent, _, name = url.rpartition("/")
    try:
        data = open_store(parent or ("/" if url.startswith("/") else ".")).get(name)
    except NotFound:
        raise UserError(f"{url}: no such file") from None
    lowered = name.lower()
    if lowered.endswith(ARRAYS):
        array = _array(data, url)
        if not array.size and not may_be_empty:
            raise UserError(f"{url}: an array of shape {list(array.shape)} is empty")
        return _File(url, array, is_picture=False, channels_last=array.dtype == np.uint8)
    if lowered.endswith(IMAGE_SUFFIXES) or looks_like_a_picture(data[:HEAD_BYTES]):
        return _File(url, _pixels(data, url, one_channel), is_picture=True, channels_last=True)
    raise UserError(f"{url}: must end in {', '.join(READ_SUFFIXES)}")


def _pixels(data: bytes, url: str, one_channel: bool) -> np.ndarray:
    """uint8 [H, W, C] as `data pack` makes it of the file: greys in one channel, whatever mode they are saved in."""
    array = np.asarray(convert(open_picture(data, url), 3, url))
    if bool((array == array[..., :1]).all()):
        return array[..., :1]
    if one_channel:
        raise UserError(f"{url}: has colours, and one channel is wanted here; save it as greys")
    return array


def _array(data: bytes, url: str) -> np.ndarray:
    """One array of numbers, never a pickle. Raises DataError, UserError (none, or several that could be meant)."""
    try:
        if not data.startswith(MAGIC):
            raise ValueError("neither npy nor npz")
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            names = [name for name in NAMES if name in loaded.files] or loaded.files
            if not names:
                raise UserError(f"{url}: holds no arrays")
            if len(names) > 1:
                shown = ", ".join(names[:8])
                raise UserError(f"{url}: holds the arrays {shown}; leave one, or call the one that is meant 'images'")
            loaded = loaded[names[0]]
        array = np.asarray(loaded)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{array.dtype} is no number")
    except UserError:
        raise
    except Exception as error:  # a decoder of bytes from outside may raise anything
        raise DataError(f"{url}: can't be read as an array: {' '.join(str(error).split())}") from None
    if array.size > MOST_VALUES:
        raise UserError(f"{url}: an array of shape {list(array.shape)} is too large")
    return array


def _text(value: float) -> str:
    return f"{float(value):.6g}"
