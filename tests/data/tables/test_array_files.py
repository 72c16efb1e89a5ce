"""Files of arrays (.npy, .npz, HDF5, NetCDF, Zarr), here and behind a remote store: every value bit for bit."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import zarr

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import read_samples
from scoreray.data.sources.field_options import parse_field_options
from scoreray.data.sources.options import SourceOptions
from scoreray.data.sources.source import open_source
from scoreray.data.storage.store import PathStore
from scoreray.data.tables import array_files, array_formats
from scoreray.data.tables.files import open_file
from scoreray.data.tables.open import open_table
from scoreray.data.tables.source import TableSource

N = 37
LATENTS = np.random.default_rng(0).normal(size=(N, 4, 16, 16)).astype(np.float16)
WIND = np.random.default_rng(1).normal(size=(N, 6, 8)).astype(np.float32)
CLASSES = (np.arange(N) % 5).astype(np.int32)


def opened(path: Path, *fields: str, kinds: tuple[str, ...] = (), **options: object) -> TableSource:
    found = open_table(str(path), SourceOptions(**options), parse_field_options(fields, kinds))  # type: ignore[arg-type]
    assert found is not None
    return pickle.loads(pickle.dumps(found))


def samples(source: TableSource, *rows: int) -> list[dict[str, np.ndarray]]:
    found = list(source.read_all(rows))
    assert not any(isinstance(one, DataError) for one in found), found
    return found  # type: ignore[return-value]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"a{kind}"
    if kind == ".npz":
        np.savez(path, latents=LATENTS, cls=CLASSES)
    elif kind == ".small.npz":
        np.savez_compressed(path, latents=LATENTS, cls=CLASSES)
    elif kind == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("latents", data=LATENTS, chunks=(10, 4, 16, 16), compression="gzip")
            file["cls"] = CLASSES
    else:
        group = zarr.open_group(path, mode="w")
        group.create_array("latents", shape=LATENTS.shape, dtype=LATENTS.dtype, chunks=(8, 4, 16, 16))[:] = LATENTS
        group.create_array("cls", shape=CLASSES.shape, dtype=CLASSES.dtype, chunks=CLASSES.shape)[:] = CLASSES
    return path


@pytest.mark.parametrize("kind", [".npz", ".small.npz", ".h5", ".zarr"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_arrays_of_a_file_are_read_by_rows(
    tmp_path: Path, kind: str, is_remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`is_remote`: as if the folder were a store that gives bytes by ranges."""
    path = write(tmp_path, kind)
    monkeypatch.setattr(PathStore, "is_remote", is_remote)
    monkeypatch.setattr(array_files, "WINDOW_BYTES", 1 << 12)
    monkeypatch.setattr(array_files, "MOST_BYTES", 1 << 12)
    source = opened(path, "x=latents", "cls=cls")
    assert [(one.kind, one.shape, one.dtype) for one in source.fields] == [
        ("array", [4, 16, 16], "float16"), ("class", [], "int64"),
    ]  # fmt: skip
    rows = [36, 0, 5, 5, 20]
    for row, sample in zip(rows, samples(source, *rows), strict=True):
        assert sample["x"].tobytes() == LATENTS[row].tobytes()
        assert sample["cls"] == row % 5


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64", "float16", "float32", "float64", ">f4"])
def test_an_npy_keeps_its_type_and_is_mapped_not_read(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(2).integers(0, 100, (N, 3, 5)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    source = opened(tmp_path / "a.npy")
    assert (source.fields[0].name, source.fields[0].kind) == ("array", "array")
    assert source.fields[0].dtype == np.dtype(dtype).newbyteorder("=").name
    np.testing.assert_array_equal(samples(source, 11)[0]["array"], array[11])
    mapped = array_formats.arrays_of(PathStore(str(tmp_path)), "a.npy")["array"].data
    assert isinstance(mapped, np.memmap)


def test_uint8_arrays_of_a_shape_of_pictures_are_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(3).integers(0, 256, (N, 3, 8, 8), np.uint8)
    np.save(tmp_path / "a.npy", images)
    source = opened(tmp_path / "a.npy")
    assert (source.fields[0].name, source.fields[0].kind, source.fields[0].shape) == ("image", "image", [3, 8, 8])
    np.testing.assert_array_equal(samples(source, 2)[0]["image"], images[2].transpose(1, 2, 0))
    assert opened(tmp_path / "a.npy", image_size=4).fields[0].shape == [3, 4, 4]


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        ("NT", (N, 40), lambda x: x[:, None]),
        ("NC", (N, 40), lambda x: x),
        ("NTC", (N, 40, 2), lambda x: x.transpose(0, 2, 1)),
        ("NCT", (N, 40, 2), lambda x: x),
        ("NHW", (N, 6, 8), lambda x: x[:, None]),
        ("NCHW", (N, 8, 8, 3), lambda x: x),
        ("NDHW", (N, 2, 3, 4), lambda x: x[:, None]),
        ("NDHWC", (N, 2, 3, 4, 5), lambda x: x.transpose(0, 4, 1, 2, 3)),
    ],
)
def test_a_layout_names_the_axes_of_npy_and_npz(
    tmp_path: Path, layout: Any, shape: tuple[int, ...], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    array = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array)
    source = opened(tmp_path / "a.npy", layout=layout)
    archive = open_source(tmp_path / "a.npz", SourceOptions(layout=layout))
    assert source.fields[0].shape == list(archive.shape) == list(expected(array).shape[1:])
    np.testing.assert_array_equal(samples(source, 7)[0]["array"], expected(array)[7])
    np.testing.assert_array_equal(archive.read(7), expected(array)[7])
    assert not source.notes
    assert not archive.notes


def test_points_that_might_be_signals_are_reported_and_a_layout_of_none_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", wave=np.ones((N, 40)), place=np.ones((N, 2)), deep=np.ones((N, 2, 3)))
    np.save(tmp_path / "a.npy", np.ones((N, 40)))
    (note,) = opened(tmp_path / "a.npy").notes
    assert note.endswith("a.npy: samples are points of 40 numbers; --layout NT packs signals [1, 40]")
    with pytest.raises(UserError, match=r"--layout NT is for arrays of 2 axes, and none .* --kind NAME=array makes"):
        opened(tmp_path / "a.npz", "wave=wave", "place=place", layout="NT")
    both = opened(tmp_path / "a.npz", "wave=wave", "place=place", kinds=("wave=array",), layout="NT")
    assert [(one.kind, one.shape) for one in both.fields] == [("array", [1, 40]), ("vector", [2])]
    with pytest.raises(UserError, match=r"--field x=wave\+deep: .* can't be joined"):
        opened(tmp_path / "a.npz", "x=wave+deep", kinds=("x=array",), layout="NC")
    with pytest.raises(UserError, match="columns are joined along the first axis, the channels, and these have none"):
        opened(tmp_path / "a.npz", "x=wave+wave", kinds=("x=array",), layout="NT")


@pytest.mark.parametrize("kind", [".npz", ".small.npz", ".h5", ".zarr"])
def test_without_field_the_only_array_is_taken_whatever_its_name(tmp_path: Path, kind: str) -> None:
    source = opened(write(tmp_path, kind))
    assert [(one.name, one.kind, one.shape, one.dtype) for one in source.fields] == [
        ("array", "array", [4, 16, 16], "float16"), ("label", "class", [], "int64"),
    ]  # fmt: skip
    assert samples(source, 3)[0]["array"].tobytes() == LATENTS[3].tobytes()


@pytest.mark.parametrize("name", ["images", "x", "hours"])
def test_integers_and_numbers_alone_are_packed(tmp_path: Path, name: str) -> None:
    shape = (N,) if name == "hours" else (N, 5)
    array = np.random.default_rng(6).integers(-9, 9, shape)
    np.savez(tmp_path / "a.npz", **{name: array})
    manifest = pack(tmp_path / "a.npz", tmp_path / "set")
    assert (manifest.target.kind, manifest.target.dtype) == ("scalar" if name == "hours" else "array", "int64")
    assert manifest.shape == list(shape[1:] or [1])
    assert manifest.sigma_data == pytest.approx(array.std())
    found = read_samples(str(tmp_path / "set"), range(N)).numpy().reshape(N, -1)
    assert sorted(found.tolist()) == sorted(array.reshape(N, -1).tolist())


def netcdf(path: Path) -> Path:
    """As weather centres write it: coordinates, values packed in 16 bits, a value that is missing."""
    packed = np.arange(N * 48, dtype=np.int16).reshape(N, 6, 8)
    with h5py.File(path, "w") as file:
        file["time"], file["lat"], file["lon"] = np.arange(N), np.arange(6.0), np.arange(8.0)
        for name in ("time", "lat", "lon"):
            file[name].make_scale(name)
        for name, data in (("u", WIND), ("v", 2 * WIND), ("t", packed)):
            file[name] = data
            for axis, scale in enumerate(("time", "lat", "lon")):
                file[name].dims[axis].attach_scale(file[scale])
        file["t"].attrs.update({"scale_factor": 0.5, "add_offset": 10.0, "_FillValue": np.int16(7)})
    return path


def test_netcdf_grids_get_a_channel_are_joined_and_unpacked(tmp_path: Path) -> None:
    source = opened(netcdf(tmp_path / "a.nc"), "wind=u+v", "t=t", "hour=time")
    assert [(one.kind, one.shape, one.dtype) for one in source.fields] == [
        ("array", [2, 6, 8], "float32"), ("array", [1, 6, 8], "float32"), ("scalar", [], "int64"),
    ]  # fmt: skip
    first, other = samples(source, 0, 9)
    np.testing.assert_array_equal(other["wind"], np.stack([WIND[9], 2 * WIND[9]]))
    np.testing.assert_array_equal(other["t"].ravel(), np.arange(9 * 48, 10 * 48) * 0.5 + 10)
    assert np.flatnonzero(np.isnan(first["t"])).tolist() == [7]  # `_FillValue`; packing names it, as any NaN
    assert other["hour"] == 9
    assert source.left_out == {"lat": N, "lon": N}
    with pytest.raises(UserError, match="has 6 rows, and there are 37 samples"):
        opened(tmp_path / "a.nc", "lat=lat")


def test_a_second_grid_of_a_file_has_a_channel_too(tmp_path: Path) -> None:
    with scipy.io.netcdf_file(tmp_path / "a.nc", "w") as file:
        for name, length in (("time", N), ("coarse_y", 6), ("coarse_x", 8), ("level", 6), ("copy", 8)):
            file.createDimension(name, length)
        file.createVariable("grid", "f", ("time", "coarse_y", "coarse_x"))[:] = WIND
        file.createVariable("profiles", "f", ("time", "level", "copy"))[:] = WIND
    source = opened(tmp_path / "a.nc", "grid=grid", "profiles=profiles")
    assert [one.shape for one in source.fields] == [[1, 6, 8], [6, 8]]


def test_files_that_a_pattern_names_follow_each_other(tmp_path: Path) -> None:
    for year in (2001, 2002):
        with scipy.io.netcdf_file(tmp_path / f"{year}.nc", "w") as file:
            for name, length in (("time", N), ("lat", 6), ("lon", 8)):
                file.createDimension(name, length)
            file.createVariable("u", "f", ("time", "lat", "lon"))[:] = WIND + year
    source = opened(tmp_path / "*.nc")
    assert (source.num_samples, source.fields[0].shape) == (2 * N, [1, 6, 8])
    np.testing.assert_array_equal(samples(source, N + 3, 3)[0]["array"][0], WIND[3] + np.float32(2002))
    np.testing.assert_array_equal(samples(source, N + 3, 3)[1]["array"][0], WIND[3] + np.float32(2001))


def test_text_of_hdf5_and_channels_that_come_last(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("caption", data=[f"é {i}" for i in range(N)], dtype=h5py.string_dtype())
        file["deep/x"] = LATENTS.transpose(0, 2, 3, 1)
    source = opened(tmp_path / "a.h5", "x=deep/x", "text=caption")
    (sample,) = samples(source, 4)
    assert sample["text"] == "é 4"
    np.testing.assert_array_equal(sample["x"], LATENTS[4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((), "say which columns are packed: --field NAME=COLUMN; it has"),
        (("x=w",), "has no column 'w'"),
        (("a=u",), "may be .C, H, W. or .H, W, C."),
    ],
)
def test_what_can_not_be_packed_is_one_line(tmp_path: Path, fields: tuple[str, ...], message: str) -> None:
    np.savez(tmp_path / "a.npz", u=np.zeros((N, 64, 48, 5)), v=np.zeros((N, 3)))
    with pytest.raises(UserError, match=message):
        open_table(
            str(tmp_path / "a.npz"), SourceOptions(), parse_field_options(fields or (), ("array=array",) * (not fields))
        )


def test_objects_and_files_of_another_format_are_never_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}, {}], object), allow_pickle=True)
    with pytest.raises(UserError, match="holds Python objects"):
        opened(tmp_path / "a.npy")
    (tmp_path / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(DataError, match=r"b\.h5: can't be read"):
        opened(tmp_path / "b.h5")
    (tmp_path / "c.nc").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"c\.nc: is none of"):
        opened(tmp_path / "c.nc")


@pytest.mark.parametrize(("kind", "package"), [(".h5", "h5py"), (".zarr", "zarr")])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"a{kind}: .* needs {package}, which is not installed: pip install 'zarr>=3' 'h5py>=3.10'"
    ):
        opened(path, "x=latents")


def test_a_remote_file_is_read_by_ranges_with_one_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(4).integers(0, 256, 10_000, np.uint8).tobytes()
    (tmp_path / "a").write_bytes(data)
    store = type("Remote", (PathStore,), {})(str(tmp_path))
    monkeypatch.setattr(PathStore, "is_remote", True)
    with open_file(store, "a", 64) as file:
        assert file.seek(-100, 2) == 9_900
        assert file.read() == data[-100:]
        file.seek(5)
        assert file.read(300) == data[5:305]
        assert file.read1(10) == data[305:315]
