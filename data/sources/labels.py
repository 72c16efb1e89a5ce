"""Labels that come with samples, as most people keep them: arrays of an .npz, a file beside an IDX file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scoreray.data.classes import in_order
from scoreray.data.errors import UserError
from scoreray.data.storage.paths import explained

# Arrays that hold samples, the first that is there, and the labels that belong to each alone. In any case of letters.
SAMPLES: dict[str, tuple[str, ...]] = {
    "images": (),
    "image": (),
    "imgs": (),
    "x": (),
    "data": (),
    "samples": (),
    "points": (),
    "x_train": ("y_train",),  # Keras
    "train_images": ("train_labels",),  # MedMNIST
    "x_test": ("y_test",),
    "test_images": ("test_labels",),
    "arr_0": ("arr_1",),  # np.savez(file, x, y), as guided-diffusion writes samples
}
LABELS = (
    "labels", "label", "y", "targets", "target", "class_labels", "class_label", "class_ids", "class_id", "label_ids",
    "label_id", "cls", "fine_labels", "fine_label", "y_train", "train_labels", "coarse_labels", "coarse_label",
)  # fmt: skip
CLASSES = ("classes", "class_names", "label_names")
NIST_COLUMNS = 8  # of a label in QMNIST: the class is the first, then writer, form, ...


@dataclass(frozen=True)
class Arrays:
    """What an archive holds: samples, labels and names of classes where there are any, and names of other arrays."""

    samples: np.ndarray
    labels: np.ndarray | None
    classes: np.ndarray | None
    left_out: tuple[str, ...]


def samples_name(names: Sequence[str]) -> str | None:
    """The first of these names that samples usually have."""
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[name] for name in SAMPLES if name in by_name), None)


def choose_arrays(archive: Mapping[str, np.ndarray], names: Sequence[str], labelled: bool) -> Arrays | None:
    """The arrays of an archive by their usual names; None where none is called as samples are. Others are not read.

    `arr_1` is a name that says nothing: it holds labels if it looks like them. One that is called labels and does not
    look like them is taken if there is no other, so that it is refused and not lost.
    """
    by_name, chosen = {name.lower(): name for name in reversed(names)}, samples_name(names)
    if chosen is None:
        return None
    samples, labels, taken = archive[chosen], None, {chosen}
    for name in (*SAMPLES[chosen.lower()], *LABELS) if labelled else ():
        if name in by_name and (labels is None or not _look_like_labels(labels, samples)):
            found = archive[by_name[name]]
            if _look_like_labels(found, samples) or (labels is None and name != "arr_1"):
                labels, taken = found, {chosen, by_name[name]}
    classes = next((by_name[name] for name in CLASSES if name in by_name), None) if labelled else None
    left_out = tuple(sorted(set(names) - taken - {classes}))
    return Arrays(samples, labels, None if classes is None else archive[classes], left_out)


def _look_like_labels(labels: np.ndarray, samples: np.ndarray) -> bool:
    return labels.dtype.kind in "iuUS" and labels.shape in (samples.shape[:1], (*samples.shape[:1], 1))


def as_numbers(
    path: Path, labels: np.ndarray | None, classes: np.ndarray | None
) -> tuple[np.ndarray | None, list[str]]:
    """(labels as whole numbers where they are names, names of classes). Raises UserError naming the file."""
    names = [] if classes is None else _names(path, "classes", classes)
    if labels is None:
        if names:
            raise UserError(
                f"{path}: names {len(names)} classes, but no labels ({', '.join(LABELS[:4])}, ...) say which sample "
                "is of which; call them 'labels' if they are one for each sample, or give --no-classes"
            )
        return None, []
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(
            f"{path}: labels of shape {labels.shape}: one a sample is needed; --no-classes packs without classes"
        )
    if labels.dtype.kind not in "US":
        return labels, names
    words = _names(path, "labels", labels)
    names = names or in_order(words)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = next((word for word in words if word not in numbers), None)
    if unknown is not None or len(numbers) < len(names):
        what = f"label {ascii(unknown)[:80]} is not among" if len(numbers) == len(names) else "a name comes twice in"
        raise UserError(f"{path}: {what} its {len(names)} names of classes")
    return np.array([numbers[word] for word in words], np.int64), names


def _names(path: Path, what: str, array: np.ndarray) -> list[str]:
    if array.dtype.kind not in "US" or array.ndim != 1:
        raise UserError(
            f"{path}: '{what}' is {array.dtype} {array.shape}: names are needed, as text; call it 'labels' if it holds "
            "a class for each sample"
        )
    try:
        return [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: '{what}' holds {ascii(error.object)[:80]}, which is not UTF-8") from None


IMAGES_FILE = re.compile(r"(?P<head>.*)images(?P<middle>.*)idx3(?P<tail>.*)")


def beside_idx(images: Path) -> tuple[Path | None, str]:
    """(the file with the labels of an IDX file of images, what it would be called): MNIST's naming, `.gz` or not,
    whatever its type; "" for images whose own name says nothing."""
    named = IMAGES_FILE.fullmatch(images.name)
    if not named:
        return None, ""
    start = f"{named['head']}labels{named['middle']}idx"
    pattern = re.compile(re.escape(start) + r"(?P<axes>[12])[-.]?(ubyte|byte|short|int)?(?P<zipped>\.gz)?")
    is_zipped = ".gz" if images.name.endswith(".gz") else None
    with explained(images.parent):
        beside = [file.name for file in images.parent.iterdir()]
    found = [match for name in beside if (match := pattern.fullmatch(name))]
    found.sort(key=lambda match: (match["axes"], match["zipped"] != is_zipped, match.string))
    return (images.with_name(found[0].string) if found else None), f"{start}1-ubyte"


def of_nist(labels: np.ndarray) -> np.ndarray:
    """Classes of the labels in an IDX file: QMNIST's have eight columns, of which the first is the class."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == NIST_COLUMNS else labels
