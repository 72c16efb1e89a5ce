"""Images in a folder or prefix: which files are pictures, their classes, their common shape, and what is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from scoreray.data.classes import in_order
from scoreray.data.errors import DataError, StorageError, UserError
from scoreray.data.reading.pictures import HEAD_BYTES, IMAGE_SUFFIXES, is_grey, looks_like_a_picture, open_picture
from scoreray.data.sources.identity import content_marks
from scoreray.data.sources.listing import Listing, kinds_line, list_below, shown, some_of, suffix_of
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.interface import NotAFile
from scoreray.data.storage.store import Store
from scoreray.data.threads import map_in_threads

GET_THREADS = 16  # files that are fetched from a remote store at once
LOOKED_AT = 32  # images of a folder that are looked at for colours


@dataclass(frozen=True)
class ImageFolder:
    """files: sorted names of the pictures.  shape: (C, H, W).  labels: int64 [N] or None.  marks: by which each file is
    recognised (`content_marks`).  unreadable: those of `files` that are broken links or no files, and why.  left_out:
    other files, counted by kind.  notes: lines about them for a person."""

    files: list[str]
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    classes: list[str]
    marks: dict[str, str] = field(repr=False)
    unreadable: dict[str, str] = field(repr=False)
    left_out: dict[str, int]
    notes: tuple[str, ...]


def read_image_folder(store: Store, options: SourceOptions) -> ImageFolder:
    """If all images are in subfolders, the first level names the class. Raises UserError, DataError, StorageError."""
    listing = list_below(store)
    pictures = _pictures(store, list(listing.files))
    sizes = {name: size for name, size in listing.files.items() if name in pictures}
    left_out = Counter(suffix_of(name) or "no suffix" for name in listing.files if name not in sizes)
    unreadable = _unreadable(store.url(), listing, left_out)
    if not sizes:
        others = f"; it holds {kinds_line(left_out)}" if left_out else ""
        raise UserError(f"{store.url()}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}), and no tars{others}")
    files = sorted([*sizes, *unreadable])
    classes, labels = _classes_of(store, files) if options.labelled else ([], None)
    shape = _shape_of(store, list(sizes), options)
    marks = {**content_marks(store, sizes), **unreadable}
    notes = _notes(store.url(), listing, left_out, classes)
    return ImageFolder(files, shape, labels, classes, marks, unreadable, dict(left_out), notes)


def _unreadable(url: str, listing: Listing, left_out: Counter[str]) -> dict[str, str]:
    """What is called like a picture and can't be one, and why; what else is no file is counted in `left_out`. Raises
    DataError for a broken link that may have led to a class."""
    found = {}
    for name, to in listing.broken.items():
        found[name] = f"is a broken link, to {shown(to)}"
        if not name.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(
                f"{shown(url, name)}: {found[name]}; restore what it leads to, as it may be a folder of images, or "
                "remove it"
            )
    for name, kind in listing.special.items():
        if name.lower().endswith(IMAGE_SUFFIXES):
            found[name] = f"is {kind}, no file"
        else:
            left_out[kind.rpartition(" ")[2]] += 1
    return found


def _pictures(store: Store, names: list[str]) -> set[str]:
    """Of these files, those that are pictures by their suffix or, where they have none, by their first bytes."""
    unnamed = [name for name in names if not suffix_of(name)]

    def is_one(number: int) -> bool:
        try:
            return looks_like_a_picture(store.get(unnamed[number], 0, HEAD_BYTES))
        except StorageError:  # gone, not to be read, or no file: left out, as others that are no pictures
            return False

    found = (
        map_in_threads(GET_THREADS, is_one, range(len(unnamed)))
        if store.is_remote
        else map(is_one, range(len(unnamed)))
    )
    by_content = {name for name, picture in zip(unnamed, found, strict=True) if picture}
    return by_content | {name for name in names if name.lower().endswith(IMAGE_SUFFIXES)}


def _notes(url: str, listing: Listing, left_out: Counter[str], classes: list[str]) -> tuple[str, ...]:
    """Lines about what is in the folder and not packed."""
    empty, notes = sorted(set(listing.folders) - set(classes)), []
    if left_out:
        notes.append(f"{left_out.total():,} files that are no images are left out ({kinds_line(left_out)})")
    if classes and empty:
        notes.append(f"{len(empty):,} folders hold no images and become no class: {some_of(empty)}")
    if listing.loops:
        notes.append(f"{len(listing.loops):,} links to a folder above them are not followed: {some_of(listing.loops)}")
    return tuple(f"{url}: {note}" for note in notes)


def _classes_of(store: Store, files: list[str]) -> tuple[list[str], np.ndarray | None]:
    loose = [name for name in files if "/" not in name]
    if len(loose) == len(files):
        return [], None
    if loose:
        raise UserError(
            f"{store.url()}: {len(loose)} images are beside the folders of the classes "
            f"({shown(store.url(), loose[0])}); move them into one, or --no-classes packs all without classes"
        )
    tops = [name.split("/", 1)[0] for name in files]
    classes = in_order(tops)
    check_classes(store.url(), classes)
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[top] for top in tops], np.int64)


def check_classes(path: str, classes: list[str]) -> None:
    for name in classes:
        if not name.isprintable() or not 0 < len(name) <= 255:  # bytes that are not UTF-8 are not printable
            raise UserError(f"{path}: {ascii(name)[:300]} can't be the name of a class; rename it, or --no-classes")


def _shape_of(store: Store, files: list[str], options: SourceOptions) -> tuple[int, int, int]:
    """(C, H, W) of the images in a folder, from some of them: grey only if all of these are. Raises DataError when
    none of these can be read, UserError when a size is needed."""
    some = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(LOOKED_AT, len(files))).astype(int))]
    images, problems = [], []
    for name in some:
        try:
            images.append((name, open_picture(store.get(name), shown(store.url(), name))))
        except (DataError, NotAFile) as error:
            problems.append(error)
    if not images:
        raise problems[0]
    channels = options.channels or (1 if all(is_grey(image) for _, image in images) else 3)
    name, first = images[0]
    width, height = (fitting.width, fitting.height) if (fitting := options.fitting) else first.size
    if not fitting and width != height:
        raise UserError(f"{shown(store.url(), name)}: {width} x {height} pixels; give --image-size to crop to a square")
    return channels, height, width
