"""Formats of files of named arrays, and what each is read by: numpy, h5py, SciPy, Zarr. Nothing is read whole.

Zarr and HDF5 (with it NetCDF-4) are read by their own libraries, an extra (`data/extras.py`).
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from scoreray.data.errors import DataError, UserError
from scoreray.data.extras import check_installed
from scoreray.data.sources.arrays import check_memory, npy_header
from scoreray.data.sources.listing import shown
from scoreray.data.storage.store import Store
from scoreray.data.tables.files import open_file

LATITUDES = ("lat", "latitude", "y", "rlat", "south_north", "nlat")
LONGITUDES = ("lon", "longitude", "x", "rlon", "west_east", "nlon")


@dataclass(frozen=True)
class Variable:
    """An array of a file. `data`: what is sliced by rows, [N, ...].  dims: names of the axes, where the file has them.
    chunk: rows that are unpacked together.  scale, offset, fill: as NetCDF's conventions pack values (CF 1.11, 8.1):
    what is stored times scale plus offset; `fill` stands for a value that is missing.  owner: what has to live as long
    as the data."""

    data: Any
    dims: tuple[str, ...] = ()
    chunk: int = 1
    scale: float | None = None
    offset: float = 0.0
    fill: float | None = None
    owner: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.float64)) * self.data.dtype.itemsize

    @property
    def is_grid(self) -> bool:
        """Whether a sample is one value at each place of a map, [lat, lon], and so lacks an axis of channels."""
        return len(self.dims) == 3 and _names(self.dims[1], LATITUDES) and _names(self.dims[2], LONGITUDES)

    def rows(self, start: int, stop: int) -> np.ndarray:
        found = np.asarray(self.data[start:stop])
        if found.dtype.kind in "iufb" and not found.dtype.isnative:
            found = found.astype(found.dtype.newbyteorder("="))
        missing = None if self.fill is None else found == self.fill
        if self.scale is not None:
            small = found.dtype.kind in "iu" and found.dtype.itemsize <= 2  # a float32 holds each of its values
            found = (found.astype(np.float64) * self.scale + self.offset).astype(np.float32 if small else np.float64)
        if missing is not None and missing.any():
            if found.dtype.kind != "f":
                raise DataError(f"row {start + int(np.argwhere(missing)[0][0])}: a value is missing (_FillValue)")
            found = np.where(missing, np.array(np.nan, found.dtype), found)
        return found[:, None] if self.is_grid else found


def _names(dimension: str, axes: Sequence[str]) -> bool:
    """Whether a dimension is one of these axes, also as one of several grids of a file has it: `coarse_y`, `lat_2`."""
    name = dimension.lower()
    return name in axes or any(part in axes for part in name.split("_"))


OpenArrays = Callable[[Store, str], Mapping[str, Variable]]
"""The arrays of the object with a key, of Zarr of the folder; they may be read as long as the process lives."""


@lru_cache(maxsize=8)
def arrays_of(store: Store, name: str) -> Mapping[str, Variable]:
    if not name:
        return _zarr(store)
    head = store.get(name, 0, 8)
    for magic, read in READERS.items():
        if head.startswith(magic):
            return read(store, name)
    raise UserError(f"{shown(store.url(name))}: is none of .npy, .npz, HDF5, NetCDF and Zarr, whatever its name says")


def _npy(store: Store, name: str) -> Mapping[str, Variable]:
    with open_file(store, name, 1 << 16) as file:
        return {"array": Variable(_mapped(store, name, file))}


def _mapped(store: Store, name: str, file: Any) -> Any:
    """The array whose .npy header `file` is at: mapped into memory, or of a remote store read by ranges."""
    shape, fortran, dtype = npy_header(file)
    if dtype.hasobject:
        raise UserError(f"{shown(store.url(name))}: holds Python objects, which are not read; save plain arrays")
    if not store.is_remote:
        order: Literal["F", "C"] = "F" if fortran else "C"
        return np.memmap(
            f"{store.root}/{name}", np.dtype(dtype), mode="r", offset=file.tell(), shape=shape, order=order
        )
    if fortran and len(shape) > 1:
        raise UserError(
            f"{shown(store.url(name))}: has its last axis first (Fortran order); save np.ascontiguousarray(x)"
        )
    return _Ranged(store, name, file.tell(), tuple(shape), dtype)


@dataclass(frozen=True)
class _Ranged:
    """Rows of an array in C order, from byte `offset` of an object."""

    store: Store
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        start, stop, _ = rows.indices(self.shape[0])
        data = self.store.get(self.name, self.offset + start * row_bytes, self.offset + stop * row_bytes)
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def _npz(store: Store, name: str) -> Mapping[str, Variable]:
    """Arrays that are stored (np.savez) are read where they are; compressed ones are unpacked, each once."""
    found = {}
    with open_file(store, name, 1 << 16) as file, zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        check_memory(shown(store.url(name)), sum(e.file_size for e in entries if e.compress_type != zipfile.ZIP_STORED))
        for entry in entries:
            key = entry.filename.removesuffix(".npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset)
                header = file.read(30)  # PKWARE APPNOTE 4.3.7: the lengths of the name and of what follows it
                file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
                found[key] = Variable(_mapped(store, name, file))
            else:
                with archive.open(entry) as member:
                    found[key] = Variable(np.lib.format.read_array(member, allow_pickle=False))
    return found


def _hdf5(store: Store, name: str) -> Mapping[str, Variable]:
    check_installed("arrays", f"{shown(store.url(name))}: HDF5", "h5py")
    import h5py

    opened = h5py.File(open_file(store, name) if store.is_remote else f"{store.root}/{name}", "r")
    found: dict[str, Variable] = {}

    def visit(path: str, one: Any) -> None:
        if isinstance(one, h5py.Dataset) and one.dtype.kind in "biufSOV" and one.size:
            dims = tuple(str(axis[0].name).rpartition("/")[2] if len(axis) else axis.label for axis in one.dims)
            data = one.asstr() if h5py.check_string_dtype(one.dtype) else one
            data = _Strings(data, one) if data is not one else one
            found[path] = Variable(data, dims, one.chunks[0] if one.chunks else 1, **_packing(one.attrs))

    opened.visititems(visit)
    return found


@dataclass(frozen=True)
class _Strings:
    """Text of an HDF5 dataset, as str."""

    texts: Any
    stored: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(object)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self.texts[rows], object)


def _netcdf3(store: Store, name: str) -> Mapping[str, Variable]:
    if store.is_remote:
        raise UserError(
            f"{shown(store.url(name))}: NetCDF of version 3 is read from a disk; copy it, or make NetCDF-4 of it"
        )
    check_installed("arrays", f"{shown(store.url(name))}: NetCDF of version 3", "scipy")
    from scipy.io import netcdf_file

    # SciPy warns at the process's end that arrays still refer to the file, which is how it is read
    warnings.filterwarnings("ignore", "Cannot close a netcdf_file opened with mmap=True", RuntimeWarning)
    opened = netcdf_file(f"{store.root}/{name}", "r", mmap=True)
    return {
        key: Variable(one.data, tuple(one.dimensions), **_packing(vars(one).get("_attributes", {})), owner=opened)
        for key, one in opened.variables.items()
    }


def _zarr(store: Store) -> Mapping[str, Variable]:
    check_installed("arrays", f"{store.url()}: Zarr", "zarr")
    import zarr

    from scoreray.data.tables.zarr_store import ZarrStore

    opened = zarr.open(ZarrStore(store), mode="r")
    arrays = {"array": opened} if isinstance(opened, zarr.Array) else dict(opened.members(max_depth=None))
    return {
        key: Variable(one, _zarr_dims(one), one.chunks[0] if one.chunks else 1, **_packing(one.attrs))
        for key, one in arrays.items()
        if isinstance(one, zarr.Array)
    }


def _zarr_dims(array: Any) -> tuple[str, ...]:
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return tuple(str(name) for name in names)


def _packing(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """How a variable's values are packed, by its attributes."""

    def number(name: str) -> float | None:
        value = attributes.get(name)
        return None if value is None else float(np.ravel(value)[0])

    missing = number("_FillValue") if number("_FillValue") is not None else number("missing_value")
    scale, offset = number("scale_factor"), number("add_offset")
    packed = scale is not None or offset is not None
    return {"scale": (1.0 if scale is None else scale) if packed else None, "offset": offset or 0.0, "fill": missing}


READERS: dict[bytes, OpenArrays] = {
    b"\x93NUMPY": _npy,
    b"PK": _npz,
    b"\x89HDF": _hdf5,
    b"CDF": _netcdf3,
}
"""What a file of each format begins with."""
