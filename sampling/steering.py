"""Words of a request that bend what is drawn, as wrappers of the denoiser: guidance, inpainting, inverse problems.

`steered` makes the denoiser that a request asks for. Everything in a request is a word, a number or a URL, so that it
can travel; what a URL names is read where the samples are drawn.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from scoreray.data.decode import decode, look
from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.manifest import FORMATS
from scoreray.data.store import NotFound, open_store
from scoreray.sampling.guidance import Autoguidance, ClassifierFree, Denoise, Interval
from scoreray.sampling.inverse import LinearInverse, Operator, average_pool, gray, mask, matrix
from scoreray.sampling.load import LoadedDenoiser, load
from scoreray.trainer.step import to_unit_range

Method = Literal["projection", "jacobian"]
MAX_GUIDANCE = 100  # beyond it, on either side, samples are noise or not finite


@dataclass(frozen=True)
class Guidance:
    """What samples are led towards: with `weight` from a weaker estimate to the model's own (1: the model alone).

    The weaker one is the model without a class (classifier-free), or with `checkpoint` another model, or with `ema` the
    same (or that) model at another EMA length (autoguidance). `interval`: noise levels (low, high) between which it
    acts; None for all.
    """

    weight: float = 1.0
    checkpoint: str | None = None
    ema: str | None = None
    interval: tuple[float, float] | None = None

    @property
    def auto(self) -> bool:
        return self.checkpoint is not None or self.ema is not None

    def __post_init__(self) -> None:
        if not -MAX_GUIDANCE <= self.weight <= MAX_GUIDANCE:
            raise UserError(
                f"guidance weight {self.weight}: must be in [{-MAX_GUIDANCE:g}, {MAX_GUIDANCE:g}]; 1 is none, above 1 "
                "strengthens it"
            )
        if self.weight == 1 and (self.auto or self.interval is not None):
            what = "--autoguide" if self.checkpoint else "--guide-ema" if self.ema else "--interval"
            raise UserError(f"{what} does nothing at guidance 1; give --guidance a weight such as 2")
        if self.interval is not None:
            low, high = self.interval
            if not 0 <= low < high:
                raise UserError(f"--interval {low:g},{high:g}: must be two noise levels, 0 <= low < high")


@dataclass(frozen=True)
class Measurement:
    """What is known of each sample: `observed` (a URL of a png, jpg, npy or npz) is `operator` of it, plus noise.

    operator: "inpaint" with the URL of a `mask` (bright where the sample is known), "superresolution=FACTOR", "gray",
    or "matrix=URL" of an npy [m, d]. noise_std: of the measurement, for data in [-1, 1]. method: of `LinearInverse`.
    """

    operator: str
    observed: str
    mask: str | None = None
    noise_std: float = 0.0
    method: Method = "projection"

    def __post_init__(self) -> None:
        name, _, value = self.operator.partition("=")
        if name not in OPERATORS:
            raise UserError(f"unknown operator '{name}': {nearest(name, OPERATORS)}")
        if (name in TAKES_VALUE) != bool(value):
            raise UserError(f"operator '{self.operator}': write {OPERATORS[name]}")
        if (name == "inpaint") != (self.mask is not None):
            raise UserError("--mask goes with --inpaint, and --inpaint needs it: a picture, bright where known")
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise UserError(f"--noise-std {self.noise_std}: must be a finite number, 0 or above")
        if self.method not in get_args(Method):
            raise UserError(f"--inverse-method '{self.method}': {nearest(self.method, get_args(Method))}")


OPERATORS = {
    "inpaint": "inpaint",
    "superresolution": "superresolution=FACTOR, such as superresolution=4",
    "gray": "gray",
    "matrix": "matrix=FILE, an npy [m, d]",
}
TAKES_VALUE = ("superresolution", "matrix")


def measurement_of(
    inpaint: str | None,
    mask: str | None,
    inverse: str | None,
    measurement: str | None,
    noise_std: float,
    method: str,
) -> Measurement | None:
    """What the words of a command line say is known of the samples. Raises UserError where they do not go together."""
    if inpaint is not None and inverse is not None:
        raise UserError("--inpaint and --inverse: one measurement at a time; leave one of them out")
    if inpaint is not None:
        if measurement is not None:
            raise UserError("--measurement goes with --inverse; --inpaint names its picture itself")
        return Measurement("inpaint", inpaint, mask, noise_std, cast(Method, method))
    if inverse is not None:
        if inverse.partition("=")[0] == "inpaint":
            raise UserError("--inverse inpaint: write --inpaint IMAGE --mask MASK")
        if measurement is None:
            raise UserError("--inverse needs --measurement FILE, what was measured")
        return Measurement(inverse, measurement, mask, noise_std, cast(Method, method))
    lone = {
        "--mask": mask is not None,
        "--measurement": measurement is not None,
        "--noise-std": noise_std != 0,
        "--inverse-method": method != "projection",
    }
    given = [name for name, there in lone.items() if there]
    if given:
        raise UserError(f"{', '.join(given)}: nothing is measured; give --inpaint IMAGE or --inverse OPERATOR")
    return None


def steered(denoiser: LoadedDenoiser, guidance: Guidance, measurement: Measurement | None = None) -> Denoise:
    """The denoiser that samples under `guidance` and given `measurement`; `denoiser` itself where neither says more.

    Raises UserError where they do not fit the model, DataError and StorageError where a file can't be read.
    """
    bent: Denoise = denoiser
    if guidance.weight != 1:
        bent = _guided(denoiser, guidance)
        if guidance.interval is not None:
            bent = Interval(bent, denoiser, *guidance.interval)
    return bent if measurement is None else _measured(denoiser, bent, measurement)


def _guided(denoiser: LoadedDenoiser, guidance: Guidance) -> Denoise:
    if not guidance.auto:
        return ClassifierFree(denoiser, guidance.weight)
    info, device = denoiser.info, next(denoiser.parameters()).device
    url = guidance.checkpoint or info.url
    weak = load(url, guidance.ema, device)
    if weak.info.image_shape != info.image_shape:
        raise UserError(
            f"--autoguide {url}: draws samples of shape {list(weak.info.image_shape)}, this model "
            f"{list(info.image_shape)}; a guide must be trained on the same data"
        )
    if weak.info.classes and weak.info.classes != info.classes:
        raise UserError(f"--autoguide {url}: knows other classes than this model; take a guide of the same data")
    if (weak.info.url, weak.info.ema) == (info.url, info.ema):
        raise UserError(
            f"--autoguide {url}: is this very model at EMA {info.ema}; take an earlier checkpoint or --guide-ema"
        )
    return Autoguidance(denoiser, weak, guidance.weight)


def _measured(denoiser: LoadedDenoiser, bent: Denoise, measurement: Measurement) -> Denoise:
    shape, device = denoiser.info.image_shape, next(denoiser.parameters()).device
    operator = _operator(measurement, shape, device)
    expected = tuple(operator.apply(torch.zeros(1, *shape, device=device)).shape[1:])
    observed = read_array(measurement.observed, expected, "the measurement").to(device)
    return LinearInverse(bent, operator, observed, measurement.noise_std, denoiser.sigma_data, measurement.method)


def _operator(measurement: Measurement, shape: tuple[int, ...], device: torch.device) -> Operator:
    name, _, value = measurement.operator.partition("=")
    if name == "matrix":
        size = math.prod(shape)
        rows = read_numbers(value)
        if rows.ndim != 2 or rows.shape[1] != size or rows.shape[0] > size:
            raise UserError(f"{value}: is {list(rows.shape)}, and this model needs [m, {size}], m at most {size}")
        flat = matrix(rows.to(device))
        return Operator(lambda x: flat.apply(x.flatten(1)), lambda y: flat.transpose(y).view(-1, *shape), flat.solve)
    if len(shape) != 3:
        raise UserError(f"'{name}' is for images, and this model draws samples of shape {list(shape)}; use matrix=FILE")
    if name == "superresolution":
        factor = int(value) if value.isdigit() else 0
        if factor < 2 or shape[1] % factor or shape[2] % factor:
            raise UserError(f"superresolution={value}: the factor must be 2 or more and divide {shape[1]} x {shape[2]}")
        return average_pool(factor)
    if name == "gray":
        if shape[0] != 3:
            raise UserError(f"gray: this model's images have {shape[0]} channel, which needs no colour")
        return gray(shape[0])
    assert measurement.mask is not None
    known = read_array(measurement.mask, shape, "the mask").to(device) > 0
    if bool(known.all()) or not bool(known.any()):
        raise UserError(f"{measurement.mask}: marks {'all' if known.all() else 'nothing'} as known; nothing to inpaint")
    return mask(known)


def read_array(url: str, shape: tuple[int, ...], what: str) -> Tensor:
    """A picture or an array as float32 of `shape`, pictures and bytes in [-1, 1], bool as -1 and 1, one channel spread
    over all. Raises UserError where it is of another shape, DataError where it can't be read."""
    values = _read(url)
    if values.dtype == torch.bool:
        values = values.float() * 2 - 1
    values = to_unit_range(values).float()
    if len(shape) == 3 and values.ndim == 2:
        values = values[None]
    if len(shape) == 3 and values.shape == (1, *shape[1:]):
        values = values.expand(shape)
    if tuple(values.shape) != tuple(shape):
        raise UserError(f"{url}: is {list(values.shape)}, and {what} must be {list(shape)}")
    if not bool(values.isfinite().all()):
        raise UserError(f"{url}: holds values that are not finite; mark unknown ones with a mask, not with NaN")
    return values


def read_numbers(url: str) -> Tensor:
    """An npy or npz array as float32."""
    return _read(url).float()


def _read(url: str) -> Tensor:
    """uint8 pictures as [C, H, W]; other arrays as they are."""
    parent, _, name = url.rpartition("/")
    try:
        data = open_store(parent or ".").get(name)
    except NotFound:
        raise UserError(f"{url}: no such file") from None
    for ending, read in READERS.items():
        if url.lower().endswith(ending):
            return torch.from_numpy(np.array(read(data, url)))
    raise UserError(f"{url}: must end in {', '.join(READERS)}")


def _picture(code: int) -> Callable[[bytes, str], np.ndarray]:
    def read(data: bytes, url: str) -> np.ndarray:
        try:
            shape, dtype = look(data, code)
        except DataError as error:
            raise DataError(f"{url}: {error}") from None
        return decode(data, code, shape, np.dtype(dtype), lambda: url).transpose(2, 0, 1)

    return read


def _numbers(data: bytes, url: str) -> np.ndarray:
    """One array of numbers, never a pickle. uint8 pictures have channels last, as `scoreray sample` leaves them."""
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            name = "images" if "images" in loaded.files else loaded.files[0]
            loaded = loaded[name]
        array = np.asarray(loaded)
        if not (array.dtype == bool or np.issubdtype(array.dtype, np.number)) or np.iscomplexobj(array):
            raise ValueError(f"{array.dtype} is no number")
    except (ValueError, OSError, IndexError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{url}: can't be read as an array: {' '.join(str(error).split())}") from None
    if array.dtype == np.uint8 and array.ndim == 4 and len(array) == 1:
        array = array[0]
    return array.transpose(2, 0, 1) if array.dtype == np.uint8 and array.ndim == 3 else array


READERS: dict[str, Callable[[bytes, str], np.ndarray]] = {
    ".png": _picture(FORMATS["png"]),
    ".jpg": _picture(FORMATS["jpg"]),
    ".jpeg": _picture(FORMATS["jpg"]),
    ".npy": _numbers,
    ".npz": _numbers,
}
