"""Arrays of every layout, scale and size: read as meant, described by channel, or refused before the work begins."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.fields.field import MAX_CLASSES
from scoreray.data.fields.limits import MAX_AXES, MAX_AXIS, MAX_VALUES
from scoreray.data.packing.pack import pack
from scoreray.data.packing.shards import encode
from scoreray.data.packing.verify import verify
from scoreray.data.reading.decode import decode_class
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.sources.layout import layout_of
from scoreray.data.sources.source import SourceOptions, open_source


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def saved(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


LAYOUTS = {
    (3, 32, 32): "NCHW", (32, 32, 3): "NHWC", (1, 28, 28): "NCHW", (28, 28, 1): "NHWC", (4, 64, 48): "NCHW",
    (64, 48, 4): "NHWC", (16, 32, 32): "NCHW", (32, 32, 16): "NHWC", (5, 64, 64): "NCHW", (64, 64, 5): "NHWC",
    (5, 32, 64): "NCHW", (512, 4, 4): "NCHW", (3, 3, 3): "NCHW", (32, 32, 32): "NCHW", (2, 8, 2): "NCHW",
    (64, 48, 5): None, (69, 32, 64): None, (32, 32, 64): None,
}  # fmt: skip


@pytest.mark.parametrize("shape", LAYOUTS)
def test_the_channels_of_float_arrays_are_found_or_asked_for(shape: tuple[int, ...], tmp_path: Path) -> None:
    assert layout_of(shape) == LAYOUTS[shape]
    array = floats(2, *shape)
    source = saved(tmp_path, images=array)
    first, last = array, array.transpose(0, 3, 1, 2)
    if LAYOUTS[shape] is None:
        with pytest.raises(UserError, match=r"may be \[C, H, W\] or \[H, W, C\]; say which: --layout NCHW or NHWC"):
            pack(source, tmp_path / "out")
    else:
        found = open_source(source)
        expected = first if LAYOUTS[shape] == "NCHW" else last
        assert found.shape == expected.shape[1:]
        assert bool(found.notes) == (LAYOUTS[shape] == "NHWC"), "what is turned is reported"
        assert all((found.read(i) == expected[i]).all() for i in range(2))
    for layout, expected in (("NCHW", first), ("NHWC", last)):
        assert (open_source(source, SourceOptions(layout=layout)).read(1) == expected[1]).all()


def test_packed_channels_last_floats_are_read_back_channels_first(tmp_path: Path) -> None:
    array = floats(6, 8, 8, 3)
    manifest = pack(saved(tmp_path, images=array), tmp_path / "out")
    assert manifest.shape == [3, 8, 8]
    found = read_samples(str(tmp_path / "out"), range(6)).numpy()
    assert sorted(a.tobytes() for a in found) == sorted(
        np.ascontiguousarray(a.transpose(2, 0, 1)).tobytes() for a in array
    )


def test_a_layout_that_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--layout HWC: .*accepted: NC, NCDHW, NCHW, NCT, "):
        SourceOptions(layout="HWC")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--layout NHWC is for arrays of 4 axes, this has 3"):
        pack(saved(tmp_path, images=floats(4, 8, 8)), tmp_path / "out", layout="NHWC")
    with pytest.raises(UserError, match=r"images of shape .* \(--layout NCHW\)"):
        pack(saved(tmp_path, images=images()), tmp_path / "out", layout="NCHW")


def test_arrays_in_tars_with_channels_last_are_refused_unless_they_are_said_to_be_first(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "0.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i}", "npy": encode(floats(8, 8, 3, seed=i), "npy")})
    with pytest.raises(UserError, match=r"0\.tar: '0\.npy': an array of 8 x 8 x 3 with its channels last"):
        pack(tmp_path / "tars", tmp_path / "tars")
    assert pack(tmp_path / "tars", tmp_path / "tars", layout="NCHW").shape == [8, 8, 3]


def test_mean_and_std_are_those_of_each_channel(tmp_path: Path) -> None:
    stds = np.array([0.001, 0.1, 1, 30, 0]).reshape(5, 1, 1)
    means = np.array([0.0, 3, 100, 1000, 7]).reshape(5, 1, 1)
    array = (floats(40, 5, 6, 6) * stds + means).astype(np.float32)
    manifest = pack(saved(tmp_path, data=array), tmp_path / "out", samples_per_shard=7)
    wide = array.astype(np.float64)
    assert manifest.mean == pytest.approx(wide.mean((0, 2, 3)), rel=1e-9)
    assert manifest.std == pytest.approx(wide.std((0, 2, 3)), rel=1e-6)
    assert manifest.std[4] == 0, "a constant has no spread from rounding"
    assert manifest.sigma_data == pytest.approx(wide.std(), rel=1e-9)
    vectors = pack(saved(tmp_path, data=floats(40, 3)), tmp_path / "vectors")
    assert (len(vectors.mean), len(vectors.std)) == (3, 3)
    pictures = pack(saved(tmp_path, images=images(9)), tmp_path / "pictures")
    assert pictures.std == pytest.approx((images(9) / 127.5).std((0, 1, 2)), rel=1e-9)


def test_a_manifest_without_std_is_still_read(tmp_path: Path) -> None:
    manifest = pack(saved(tmp_path, images=images()), tmp_path / "out")
    lines = [line for line in manifest.to_json().splitlines() if not line.startswith(' "std"')]
    body = "\n".join(lines[:-2])
    old = f'{body}\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'
    assert "std" not in json.loads(old)
    assert Manifest.from_json(old).std == []
    assert Manifest.from_json(old).mean == manifest.mean


LIMITS: dict[str, tuple[dict[str, object], str]] = {
    "axes": ({"x": floats(4, 1, 1, 1, 1, 1, 2, 2)}, f"samples of 7 axes .*; 1 to {MAX_AXES} are accepted"),
    "no axis": ({"x": floats(4)}, "samples of 0 axes"),
    "long axis": ({"x": np.zeros((2, MAX_AXIS + 1), np.float16)}, r"1048577; each axis may have 1 to 1,048,576"),
    "values": ({"x": np.broadcast_to(np.float16(0), (1, 16, 1 << 20, 17))}, f"the limit is {MAX_VALUES:,}"),
    "empty axis": ({"x": floats(4, 3, 0, 0)}, "samples of 3 x 0 x 0; each axis may have 1 to"),
    "empty images": ({"x": np.zeros((4, 0, 0, 3), np.uint8)}, "samples of 0 x 0 x 3; each axis may have 1 to"),
    "large labels": ({"x": images(), "labels": [1440764, 1443537, 0, 1]}, "class 1443537, the limit is 999999"),
    "time stamps": ({"x": images(), "labels": [0, 1, 1_700_000_000, 2]}, "class 1700000000, the limit is 999999"),
    "unsigned": ({"x": images(), "labels": np.array([0, 1, 2**64 - 1, 2], np.uint64)}, "class 18446744073709551615"),
    "negative": ({"x": images(), "labels": [0, -1, 1, 2]}, "whole numbers from 0, they are int64, from -1"),
    "fractions": ({"x": images(), "labels": [0, 1.0, 1, 2]}, "whole numbers from 0, they are float64"),
    "truth": ({"x": images(), "labels": [True, False, True, True]}, "whole numbers from 0, they are bool"),
    "infinite": ({"x": np.array([[0], [np.inf]])}, "sample 1 holds a value that is not finite"),
    "too large": ({"x": np.array([[0], [0], [1e300]])}, r"sample 2 holds a value above the largest float32: 1e\+300"),
    "complex": ({"x": np.zeros((4, 8), complex)}, "samples are complex128; uint8 images or float arrays"),
    "channels": ({"x": floats(4, 3, 8, 8), "--": {"channels": 1}}, "floats are packed as they are"),
    "name": ({"x": images(), "--": {"name": "n" * 300}}, r"--name 'n{40}\.\.\.': 300 characters, at most 255"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIMITS)
def test_what_no_manifest_can_hold_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    arrays, message = dict(LIMITS[what][0]), LIMITS[what][1]
    options = arrays.pop("--", {})
    if what == "values":  # half a gigabyte is not written for this
        from scoreray.data.fields.limits import check_shape

        with pytest.raises(UserError, match=message):
            check_shape("x", arrays["x"].shape[1:])  # type: ignore[attr-defined]
        return
    with pytest.raises(UserError, match=message) as caught:
        pack(saved(tmp_path, **arrays), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_large_array_of_few_channels_is_within_the_limits(tmp_path: Path) -> None:
    manifest = pack(saved(tmp_path, images=floats(2, 3, 600, 600)), tmp_path / "out")
    assert len(manifest.mean) == 3
    assert verify(str(tmp_path / "out")) == []


@pytest.mark.parametrize("in_place", [True, False])
def test_a_class_of_a_tar_has_the_same_limit_wherever_it_is_packed(in_place: bool, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    assert decode_class(b"999999") == MAX_CLASSES - 1
    for label in (MAX_CLASSES, 1_440_764, 1_700_000_000):
        with webdataset.TarWriter(str(tmp_path / "tars" / "0.tar")) as writer:
            for i in range(2):
                writer.write({"__key__": f"{i}", "png": encode(images()[i], "png"), "cls": label})
        target = tmp_path / ("tars" if in_place else f"out{label}")
        with pytest.raises(DataError, match=rf"0\.tar: byte \d+: '0\.cls': class {label}, the limit is 999999"):
            pack(tmp_path / "tars", target, image_size=None if in_place else 8)


def test_a_value_that_is_not_finite_in_a_tar_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    arrays = [floats(6, seed=i) for i in range(5)]
    arrays[3][2] = np.nan
    with webdataset.TarWriter(str(tmp_path / "tars" / "0.tar")) as writer:
        for i, array in enumerate(arrays):
            writer.write({"__key__": f"{i}", "npy": encode(array, "npy")})
    with pytest.raises(DataError, match=r"0\.tar: byte \d+: '3\.npy': holds a value that is not finite"):
        pack(tmp_path / "tars", tmp_path / "tars")
    manifest = pack(tmp_path / "tars", tmp_path / "tars", skip_bad=1)
    assert manifest.num_samples == 4
    assert manifest.mean == pytest.approx(np.delete(np.stack(arrays), 3, 0).astype(float).mean(0), rel=1e-9)


def test_idx_is_unzipped_by_what_it_is_not_by_its_name(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)
    plain = struct.pack(">HBBIII", 0, 8, 3, 6, 4, 4) + pictures.tobytes()
    for name, data in (("zipped-idx3-ubyte", gzip.compress(plain)), ("plain-idx3-ubyte.gz", plain)):
        (tmp_path / name).write_bytes(data)
        assert (open_source(tmp_path / name).read(5)[:, :, 0] == pictures[5]).all()


DTYPES = ["u1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", "g", "c8", "?", "S3", "U2", "M8[s]", ">f4", ">u1"]


@settings(max_examples=150, deadline=5000, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8]), max_size=8),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30, 1e39, np.nan, np.inf]),
    labels=st.none() | st.lists(st.sampled_from([0, 1, -1, 999_999, 10**6, 2**63, 0.5]), max_size=3),
    fortran=st.booleans(),
)
def test_arrays_of_any_kind_are_packed_and_read_back_or_refused_in_a_line(
    dtype: str, shape: list[int], scale: float, labels: list[float] | None, fortran: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    with np.errstate(all="ignore"):
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        array = (values * scale if np.dtype(dtype).kind in "fc" else values).astype(dtype)
    arrays = {"images": np.asfortranarray(array) if fortran else array}
    if labels is not None:
        arrays["labels"] = np.array(labels)
    refused = ""
    try:
        manifest = pack(saved(folder, **arrays), folder / "out")
    except ScorerayError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert not (folder / "out" / "manifest.json").exists()
        return
    assert Manifest.from_json(manifest.to_json()) == manifest
    found = read_samples(str(folder / "out"), range(manifest.num_samples)).numpy()
    assert np.isfinite(found).all()
    assert np.sort(found.ravel()) == pytest.approx(np.sort(array.astype(found.dtype).ravel()))
