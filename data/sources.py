"""What can be packed: `.npz`, IDX (`.gz` or not) and image folders, each as a Source that is read by sample number."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from scoreray.data.errors import DataError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
NPZ_SAMPLES = ("images", "x", "X", "data", "points", "arr_0")
NPZ_LABELS = ("labels", "y", "label", "targets")


@dataclass(frozen=True)
class Source:
    """Samples to pack. `shape` is (C, H, W) of images (`dtype` uint8), else an array's. `labels` int64 [N] or None.

    Either `array` holds all samples ([N, H, W, C] or [N, ...]) or `files` names them.
    """

    path: str
    num_samples: int
    shape: tuple[int, ...]
    dtype: str
    labels: np.ndarray | None
    classes: list[str]
    fingerprint: str
    image_size: int | None = None
    array: np.ndarray | None = field(default=None, repr=False)
    files: list[str] = field(default_factory=list, repr=False)

    def read(self, number: int) -> np.ndarray:
        """Sample `number`: uint8 [H, W, C] or the float32 array. Raises DataError, UserError naming the file."""
        if self.array is None:
            return _read_image(os.path.join(self.path, self.files[number]), self.shape, self.image_size)
        if self.dtype == "float32":
            return np.ascontiguousarray(self.array[number], np.float32)
        image = self.array[number]
        if self.image_size and image.shape[:2] != (self.image_size, self.image_size):
            squeezed = image[:, :, 0] if image.shape[2] == 1 else image
            image = np.asarray(fit(Image.fromarray(squeezed), self.image_size))
            image = image[:, :, None] if image.ndim == 2 else image
        return image


def open_source(path: str | os.PathLike[str], image_size: int | None = None) -> Source:
    """The source at `path`, by its kind. Raises UserError or DataError with one line that names the file."""
    where = Path(path).expanduser()
    if image_size is not None and not 1 <= image_size <= 8192:
        raise UserError(f"image_size {image_size}: between 1 and 8192 is needed")
    if not where.exists():
        raise UserError(f"{where}: there is no such file or folder to pack")
    if where.is_dir():
        return _open_folder(where, image_size)
    name = where.name.removesuffix(".gz")
    if name.endswith(".npz"):
        return _open_npz(where, image_size)
    if "idx" in name and ("ubyte" in name or name.endswith("idx")):
        return _open_idx(where, image_size)
    raise UserError(
        f"{where}: can't tell what this is; accepted: .npz with 'images' (and 'labels'), IDX (*-idx3-ubyte[.gz]), "
        "or a folder with one subfolder of images a class"
    )


def _open_npz(path: Path, image_size: int | None) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = next((n for n in NPZ_SAMPLES if n in archive), None)
            if name is None:
                raise UserError(f"{path}: holds {', '.join(archive.files) or 'nothing'}; 'images' is needed")
            samples = archive[name]
            label_name = next((n for n in NPZ_LABELS if n in archive), None)
            labels = archive[label_name] if label_name else None
            classes = [str(c) for c in archive["classes"]] if "classes" in archive else []
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{path}: no readable .npz of plain arrays: {error}") from error
    return _of_array(path, samples, labels, classes, image_size)


def _open_idx(path: Path, image_size: int | None) -> Source:
    """MNIST's format. The labels are taken from the file beside it that MNIST's naming gives them."""
    labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = _read_idx(labels_path) if labels_path != path and labels_path.exists() else None
    return _of_array(path, _read_idx(path), labels, [], image_size)


def _read_idx(path: Path) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{rank}I", data, 4)
        dtype = np.dtype(IDX_TYPES[kind])
        if zero or len(data) - 4 - 4 * rank != math.prod(shape) * dtype.itemsize:
            raise ValueError("its length is not what its header says")
        return np.frombuffer(data, dtype, offset=4 + 4 * rank).reshape(shape).astype(dtype.newbyteorder("="))
    except (struct.error, KeyError, ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: no readable IDX file: {error}") from error


def _of_array(
    path: Path, samples: np.ndarray, labels: np.ndarray | None, classes: list[str], image_size: int | None
) -> Source:
    num_samples = len(samples) if samples.ndim else 0
    if num_samples == 0:
        raise UserError(f"{path}: holds no samples")
    if labels is not None:
        if labels.shape != (num_samples,):
            raise UserError(
                f"{path}: {num_samples} samples, but labels of shape {labels.shape}; one a sample is needed"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UserError(f"{path}: labels must be whole numbers from 0, they are {labels.dtype} from {labels.min()}")
        labels = labels.astype(np.int64)
        if classes and int(labels.max()) >= len(classes):
            raise UserError(f"{path}: label {labels.max()}, but only {len(classes)} classes are named")
        classes = classes or [str(c) for c in range(int(labels.max()) + 1)]
    fingerprint = hashlib.sha256(repr((samples.shape, samples.dtype.str, classes)).encode())
    fingerprint.update(np.ascontiguousarray(samples).data)
    fingerprint.update(b"" if labels is None else labels.tobytes())
    if samples.dtype == np.uint8:
        samples = _channels_last(path, samples)
        height, width, channels = samples.shape[1:]
        if image_size is None and height != width:
            raise UserError(f"{path}: images of {height} x {width}; give image_size to crop them to a square")
        shape: tuple[int, ...] = (channels, image_size or height, image_size or width)
        dtype = "uint8"
    elif samples.dtype.kind == "f":
        if samples.ndim < 2 or image_size:
            raise UserError(f"{path}: {samples.dtype} {samples.shape}; floats are packed as [N, D, ...], not resized")
        if not np.isfinite(samples).all():
            raise UserError(
                f"{path}: sample {np.argwhere(~np.isfinite(samples))[0][0]} holds a value that is not finite"
            )
        shape, dtype = samples.shape[1:], "float32"
    else:
        raise UserError(f"{path}: samples are {samples.dtype}; uint8 images or float arrays are packed")
    return Source(
        str(path), num_samples, shape, dtype, labels, classes, fingerprint.hexdigest(), image_size, array=samples
    )


def _channels_last(path: Path, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise UserError(f"{path}: images of shape {images.shape}; [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3")


def _open_folder(path: Path, image_size: int | None) -> Source:
    """Images below `path`. If all lie in subfolders, the first level names the class; else there are no labels."""
    files = sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    if not files:
        raise UserError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    classes: list[str] = []
    labels = None
    if all(os.sep in name for name in files):
        tops, numbers = np.unique([name.split(os.sep, 1)[0] for name in files], return_inverse=True)
        classes, labels = [str(top) for top in tops], numbers.astype(np.int64)
    fingerprint = hashlib.sha256()
    for name in files:
        fingerprint.update(f"{name}\0{os.path.getsize(path / name)}\n".encode())
    first = _open_image(str(path / files[0]))
    channels = 1 if _is_grey(first) else 3
    width, height = (image_size, image_size) if image_size else first.size
    if width != height:
        raise UserError(f"{path / files[0]}: {width} x {height} pixels; give image_size to crop to a square")
    return Source(
        str(path), len(files), (channels, height, width), "uint8", labels, classes, fingerprint.hexdigest(), image_size,
        files=files,
    )  # fmt: skip


def _open_image(path: str) -> Image.Image:
    try:
        image = Image.open(path)
        if image.width * image.height > 1 << 28:
            raise DataError(f"{path}: {image.width} x {image.height} pixels is above the limit of 2^28")
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(f"{path}: more than 8 bits a channel ({image.mode}); convert it to 8 bits first")
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no readable image: {error}") from error


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA")


def _read_image(path: str, shape: tuple[int, ...], image_size: int | None) -> np.ndarray:
    image = _open_image(path)
    if shape[0] == 1 and not _is_grey(image):
        raise UserError(f"{path}: has colours, but the first image of the folder is grey; make them alike")
    try:
        image = image.convert("L" if shape[0] == 1 else "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: no readable image: {error}") from error
    if image_size:
        image = fit(image, image_size)
    if image.size != (shape[2], shape[1]):
        raise UserError(
            f"{path}: {image.width} x {image.height} pixels, the first image has {shape[2]} x {shape[1]}; "
            "give image_size to resize and crop them all"
        )
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side resized to `size` (antialiased bicubic), then cropped at its centre."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
