"""Checks of output names before any work begins: a folder or prefix of many files, or one picture."""

from __future__ import annotations

import errno
from pathlib import Path, PurePosixPath

from PIL import Image

from scoreray.data.errors import StorageError, UserError
from scoreray.data.reading.pictures import IMAGE_SUFFIXES

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz", ".zip", ".zst")
FILE_SUFFIXES = (
    *IMAGE_SUFFIXES, *ARCHIVE_SUFFIXES, ".npy", ".npz", ".pt", ".pth", ".ckpt", ".safetensors", ".json", ".yaml",
    ".csv", ".html",
)  # fmt: skip


def suffix_of(url: str) -> str:
    """ ".png" of "a/GRID.png"; none of a name that ends in a slash, which says that it is a folder."""
    return "" if url.endswith("/") else PurePosixPath(url).suffix.lower()


def check_folder(url: str, word: str, hint: str = "") -> None:
    """Raises UserError for a folder or prefix with the name of a file: a path like a/grid.png/000000.png is a mistake.

    word: the option that it was given to. hint: what may have been meant.
    """
    suffix = suffix_of(url)
    if suffix in FILE_SUFFIXES:
        raise UserError(f"{word} {url}: is the name of a {suffix} file, and this makes a folder or prefix{hint}")


def check_picture(path: Path) -> None:
    """Raises UserError where a picture can't be written to `path`, or not in the format that its name says."""
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise UserError(f"--picture {path}: must end in {', '.join(PICTURE_FORMATS)}, which says its format")
    if path.is_dir():
        raise UserError(f"--picture {path}: is a folder; give a file's name")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: its folder is not there")


def write_picture(image: Image.Image, path: Path) -> None:
    """Writes a picture in the format of its name. Raises UserError, or StorageError where there is no room."""
    try:
        image.save(path, PICTURE_FORMATS[path.suffix.lower()])
    except OSError as error:
        kind = StorageError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else UserError
        raise kind(f"--picture {path}: can't be written: {error.strerror or error}") from None
