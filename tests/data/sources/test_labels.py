"""Labels that come with samples are found where most people keep them; what is left out is named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from scoreray.data.errors import UserError
from scoreray.data.sources.source import SourceOptions, open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.arange(6) % 3
NUMBERS = ["0", "1", "2"]
WORDS = np.array(["cat", "dog", "owl"])
# (arrays of an .npz, the labels that it has, names of its classes, arrays that are left out)
LABELLED: dict[str, tuple[dict[str, np.ndarray], object, object, object]] = {
    "savez": ({"arr_0": IMAGES, "arr_1": LABELS}, LABELS, NUMBERS, []),
    "arr_1 of floats": ({"arr_0": IMAGES, "arr_1": LABELS / 2}, None, [], ["arr_1"]),
    "arr_1 of another length": ({"arr_0": IMAGES, "arr_1": LABELS[:5], "y": LABELS}, LABELS, NUMBERS, ["arr_1"]),
    "fine and coarse": ({"images": IMAGES, "fine_labels": LABELS, "coarse_labels": LABELS // 2}, LABELS, NUMBERS,
                        ["coarse_labels"]),
    "coarse alone": ({"images": IMAGES, "coarse_labels": LABELS}, LABELS, NUMBERS, []),
    "keras": ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:2], "y_test": LABELS[:2]}, LABELS,
              NUMBERS, ["x_test", "y_test"]),
    "keras test": ({"x_test": IMAGES, "y_test": LABELS}, LABELS, NUMBERS, []),
    "medmnist": ({"train_images": IMAGES, "val_images": IMAGES, "train_labels": LABELS[:, None]}, LABELS,
                 NUMBERS, ["val_images"]),
    "another case": ({"X": IMAGES, "Y": LABELS.astype(np.uint8)}, LABELS, NUMBERS, []),
    "names": ({"images": IMAGES, "labels": WORDS[LABELS]}, LABELS, ["cat", "dog", "owl"], []),
    "bytes": ({"images": IMAGES, "labels": WORDS[LABELS].astype("S")}, LABELS, ["cat", "dog", "owl"], []),
    "names that are numbers": ({"images": IMAGES, "y": np.array(["10", "9"])[LABELS % 2]}, 1 - LABELS % 2,
                               ["9", "10"], []),
    "classes of bytes": ({"images": IMAGES, "labels": LABELS, "classes": WORDS.astype("S")}, LABELS,
                         ["cat", "dog", "owl"], []),
    "names in the order of classes": ({"images": IMAGES, "labels": WORDS[LABELS], "classes": WORDS[::-1]}, 2 - LABELS,
                                      ["owl", "dog", "cat"], []),
    "none": ({"images": IMAGES, "mask": IMAGES, "id": np.arange(6)}, None, [], ["id", "mask"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_an_npz_are_found_by_their_usual_names(name: str, tmp_path: Path) -> None:
    arrays, labels, classes, left_out = LABELLED[name]
    np.savez(tmp_path / "x.npz", **arrays)
    source = open_source(tmp_path / "x.npz")
    assert (None if source.labels is None else source.labels.tolist()) == (None if labels is None else list(labels))
    assert (source.classes, sorted(source.left_out)) == (classes, left_out)
    assert ("arrays that are left out: " + ", ".join(left_out) in "".join(source.notes)) == bool(left_out)
    assert ("labels are looked for as labels, label, y" in "".join(source.notes)) == (labels is None)
    assert np.array_equal(source.read(3), IMAGES[3])
    without = open_source(tmp_path / "x.npz", SourceOptions(labelled=False))
    assert (without.labels, without.classes) == (None, [])


WRONG_LABELS = {
    "classes of numbers": (
        {"classes": LABELS},
        r"'classes' is int64 \(6,\): names are needed, as text; call it 'labels'",
    ),
    "classes without labels": ({"classes": WORDS}, "names 3 classes, but no labels .* or give --no-classes"),
    "an unknown name": ({"labels": WORDS[LABELS], "classes": WORDS[:2]}, "label 'owl' is not among its 2 names"),
    "a name twice": ({"labels": WORDS[LABELS], "classes": WORDS[[0, 1, 2, 0]]}, "a name comes twice in its 4 names"),
    "one-hot": ({"labels": np.eye(6)}, r"labels of shape \(6, 6\): one a sample is needed; --no-classes packs"),
    "floats": ({"labels": LABELS / 2}, "labels must be whole numbers from 0"),
    "not UTF-8": ({"labels": np.array([b"\xff"] * 6)}, "which is not UTF-8"),
    "too few": ({"labels": LABELS[:5]}, "6 samples, but labels"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_what_can_not_be_labels_is_refused_not_lost(name: str, tmp_path: Path) -> None:
    arrays, message = WRONG_LABELS[name]
    np.savez(tmp_path / "x.npz", images=IMAGES, **arrays)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.npz")
    assert open_source(tmp_path / "x.npz", SourceOptions(labelled=False)).labels is None


def idx(path: Path, array: np.ndarray, code: int = 8) -> None:
    data = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


NIST = np.stack([LABELS, *[np.full(6, 9)] * 7], 1).astype(">i4")


@pytest.mark.parametrize("images", ["", ".gz"])
@pytest.mark.parametrize("labels", ["", ".gz"])
@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "t10k-images.idx3-ubyte", "emnist-letters-test-images-idx3-ubyte",
             "images-idx3-ubyte", "qmnist-train-images-idx3-ubyte"]
)  # fmt: skip
def test_labels_beside_an_idx_file_are_found_zipped_or_not(name: str, images: str, labels: str, tmp_path: Path) -> None:
    idx(tmp_path / f"{name}{images}", IMAGES[..., 0])
    of_images = name.replace("images", "labels")
    if "qmnist" in name:
        idx(tmp_path / f"{of_images.replace('idx3-ubyte', 'idx2-int')}{labels}", NIST, 12)
    else:
        idx(tmp_path / f"{of_images.replace('idx3', 'idx1')}{labels}", LABELS.astype(np.uint8))
    idx(tmp_path / "other-labels-idx1-ubyte", np.zeros(6, np.uint8))
    source = open_source(tmp_path / f"{name}{images}")
    assert source.labels is not None
    assert source.labels.tolist() == LABELS.tolist()
    assert ("the first column is the class" in "".join(source.notes)) == ("qmnist" in name)
    assert open_source(tmp_path / f"{name}{images}", SourceOptions(labelled=False)).labels is None


def test_idx_images_without_labels_say_where_they_were_looked_for(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", IMAGES[..., 0])
    idx(tmp_path / "x-idx3-ubyte", IMAGES[..., 0])
    (note,) = open_source(tmp_path / "train-images-idx3-ubyte").notes
    assert note.endswith(": no labels beside it (train-labels-idx1-ubyte, .gz or not): packed without classes")
    assert open_source(tmp_path / "x-idx3-ubyte").notes == ()
