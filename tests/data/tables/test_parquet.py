"""Parquet files and folders of the `datasets` library, without that library: every value as it was written."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.sources.field_options import FieldOptions, parse_field_options
from scoreray.data.sources.options import SourceOptions
from scoreray.data.tables.open import open_table, reader_of
from scoreray.data.tables.source import TableSource

N = 50


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(out, "PNG")
    return out.getvalue()


def table(**changes: pa.Array) -> pa.Table:
    """Of every kind of column: a picture, a caption, a latent, tokens, a class, a number, a point."""
    columns = {
        "img": pa.array([{"bytes": png(i), "path": None} for i in range(N)]),
        "text": pa.array([f"caption {i} é" for i in range(N)]),
        "clip": pa.array([np.arange(4, dtype=np.float16) + i for i in range(N)]),
        "t5": pa.array([[[i + j / 8] * 3 for j in range(i % 4)] for i in range(N)], pa.list_(pa.list_(pa.float32()))),
        "label": pa.array([i % 3 for i in range(N)]),
        "weight": pa.array([i / 3 for i in range(N)], pa.float32()),
        "lat": pa.array([float(i) for i in range(N)]),
        "lon": pa.array([float(-i) for i in range(N)]),
        "meta": pa.array([{"cls": f"c{i % 2}", "day": i} for i in range(N)]),
    }
    return pa.table({**columns, **changes})


FIELDS = (
    "image=img",
    "caption=text",
    "clip=clip",
    "t5=t5",
    "cls=label",
    "weight=weight",
    "place=lat+lon",
    "day=meta:day",
)


def opened(path: Path | str, *fields: str, kinds: tuple[str, ...] = (), **options: object) -> TableSource:
    found = open_table(str(path), SourceOptions(**options), parse_field_options(fields, kinds))  # type: ignore[arg-type]
    assert found is not None
    return found


def write(path: Path, what: pa.Table, features: dict[str, object] | None = None) -> Path:
    if features:
        what = what.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(what, path, row_group_size=20)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, what.schema) as writer:
            writer.write_table(what, max_chunksize=20)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, what.schema) as writer:
            writer.write_table(what, max_chunksize=20)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_file_gives_each_field_of_any_rows_in_another_process_too(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", table())
    if suffix == ".feather":
        path = path.rename(tmp_path / "a.arrow")
    source = opened(path, *FIELDS)
    assert [(one.kind, one.shape, one.dtype) for one in source.fields] == [
        ("image", [3, 8, 8], "uint8"), ("text", [1], "uint8"), ("vector", [4], "float16"),
        ("sequence", [1, 3], "float32"), ("class", [], "int64"), ("scalar", [], "float32"), ("vector", [2], "float64"),
        ("scalar", [], "int64"),
    ]  # fmt: skip
    assert source.fields[4].classes == ["0", "1", "2"]
    again = pickle.loads(pickle.dumps(source))
    rows = [41, 3, 3, 20, 0, 49]
    for row, sample in zip(rows, again.read_all(rows), strict=True):
        assert not isinstance(sample, DataError)
        assert (sample["image"] == row).all()
        assert sample["caption"] == f"caption {row} é"
        assert sample["clip"].dtype == np.float16  # type: ignore[union-attr]
        np.testing.assert_array_equal(sample["clip"], np.arange(4) + row)
        assert sample["t5"].shape == (row % 4, 3) or (row % 4 == 0 and sample["t5"].size == 0)  # type: ignore[union-attr]
        assert (sample["cls"], sample["weight"], sample["day"]) == (row % 3, np.float32(row / 3), row)
        np.testing.assert_array_equal(sample["place"], [row, -row])


def test_without_fields_the_picture_and_its_class_are_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.parquet", table()))
    assert [(one.name, one.kind) for one in source.fields] == [("image", "image"), ("label", "class")]
    assert source.left_out == dict.fromkeys(("text", "clip", "t5", "weight", "lat", "lon", "meta"), N)
    assert "--field text=text" in source.notes[0]


def test_fields_that_are_asked_for_come_with_the_picture_and_the_class_unless_others_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table())
    names = [one.name for one in opened(path, "caption=text").fields]
    assert names == ["image", "caption", "label"]
    source = opened(path, "caption=text", "kind=meta:cls", "x=lat+lon", kinds=("kind=class", "x=array"))
    assert [(one.name, one.kind) for one in source.fields] == [("caption", "text"), ("kind", "class"), ("x", "array")]
    with_options = open_table(str(path), SourceOptions(labelled=False), parse_field_options(("caption=text",)))
    assert with_options is not None
    assert [one.name for one in with_options.fields] == ["image", "caption"], "--no-classes"


def test_a_folder_of_the_datasets_library_names_its_classes_pictures_and_arrays(tmp_path: Path) -> None:
    features = {
        "img": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]},
        "clip": {"_type": "Array2D", "shape": [2, 2], "dtype": "float16"},
    }
    grids = pa.array([[[i, 1], [2, 3]] for i in range(N)], pa.list_(pa.list_(pa.float16())))
    write(tmp_path / "set/data-00000-of-00001.arrow", table(clip=grids), features)
    (tmp_path / "set/state.json").write_text("{}")
    source = opened(tmp_path / "set", "image=img", "label=label", "grid=clip")
    assert source.fields[1] == Field(
        "label", "class", [], "int64", "", classes=["cat", "dog", "eel"], class_counts=[0, 0, 0]
    )
    assert (source.fields[2].kind, source.fields[2].shape) == ("array", [2, 2])
    (sample,) = source.read_all([7])
    assert not isinstance(sample, DataError)
    assert (sample["label"], sample["grid"].tolist()) == (1, [[7, 1], [2, 3]])  # type: ignore[union-attr]


def test_files_of_a_folder_follow_each_other_and_splits_are_not_mixed(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"data/train-0000{number}-of-00002.parquet", table(weight=pa.array([number * 100.0] * N)))
    source = opened(tmp_path, "w=weight")
    assert source.num_samples == 2 * N
    assert [sample["w"] for sample in source.read_all([99, 0])] == [100.0, 0.0]  # type: ignore[index]
    write(tmp_path / "data/test-00000-of-00001.parquet", table())
    with pytest.raises(UserError, match=r"splits test, train; give one of them, such as .*/data/test-\*\.parquet"):
        opened(tmp_path, "w=weight")
    assert opened(tmp_path / "data/train-*.parquet", "w=weight").num_samples == 2 * N


def test_pictures_may_be_files_beside_the_table_but_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(N):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(i))
    names = [f"{'./' * (i % 2)}pictures/{i}.png" for i in range(N - 1)] + ["../../etc/passwd"]
    source = opened(write(tmp_path / "a.parquet", table(img=pa.array(names))), "image=img", kinds=("image=image",))
    good, bad = source.read_all([5, N - 1])
    assert (good["image"] == 5).all()  # type: ignore[index]
    assert isinstance(bad, DataError)
    assert "row 49" in str(bad)


def test_words_become_classes_where_the_kind_is_said(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.parquet", table()), "image=img", "kind=meta:cls", kinds=("kind=class",))
    assert source.fields[1].classes == ["c0", "c1"]
    assert next(iter(source.read_all([3])))["kind"] == 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, ("t=txt",), "--field t=txt: .* has no column 'txt'; did you mean 'text'?"),
        ({"day": pa.array([None] * N, pa.timestamp("s"))}, ("d=day",), "of type timestamp.*can't be a field"),
        ({"text": pa.array([None] * N, pa.string())}, ("t=text",), "has no value in the first 20 rows"),
        ({}, ("v=lat+t5",), "can't be joined"),
        ({}, ("cls=clip",), "can't be of kind class: whole numbers from 0, or words, are needed"),
        ({}, ("cls=lon",), "-1.0 is no class"),
        ({"lat": pa.array([0.0] * (N - 1) + [np.inf])}, ("cls=lat",), "inf is no class"),
        ({}, ("note=clip",), "can't be of kind text: text is needed"),
    ],
)
def test_a_column_that_makes_no_field_is_refused(
    tmp_path: Path, changes: dict[str, pa.Array], fields: tuple[str, ...], message: str
) -> None:
    path = write(tmp_path / "a.parquet", table(**changes))
    kinds = tuple(f"{name}={kind}" for name, kind in (("cls", "class"), ("note", "text")) if fields[0].startswith(name))
    with pytest.raises((UserError, DataError), match=message):
        opened(path, *fields, kinds=kinds)


def test_a_file_that_is_not_there_is_the_callers_mistake(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.npy", "*.nc"):
        with pytest.raises(UserError, match="there is no such file"):
            opened(tmp_path / name)


def test_a_sample_that_lacks_a_field_or_has_another_shape_is_named(tmp_path: Path) -> None:
    texts = pa.array([None if i == 33 else "x" for i in range(N)])
    clips = pa.array([[1.0] * (3 if i == 34 else 4) for i in range(N)])
    source = opened(write(tmp_path / "a.parquet", table(text=texts, clip=clips)), "caption=text", "clip=clip")
    _, lacks, differs = source.read_all([32, 33, 34])
    assert "row 33, field 'caption' (--field caption=text): has no value" in str(lacks)
    assert "row 34, field 'clip'" in str(differs)
    assert "--kind clip=sequence" in str(differs)


def test_a_damaged_file_and_one_that_changed_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table())
    source = pickle.loads(pickle.dumps(opened(path, "w=weight")))
    write(path, table(weight=pa.array([1.0] * N)))
    opened(path, "w=weight")  # as another process would see it
    with pytest.raises(UserError, match="is not what it was when the packing began"):
        list(source.read_all([0]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet: can't be read"):
        opened(path, "w=weight")


def test_other_sources_are_no_tables(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert open_table(tmp_path / "a.npz", SourceOptions(), FieldOptions()) is None
    assert reader_of(str(tmp_path)) is None
    assert reader_of(str(tmp_path / "x.tar")) is None
