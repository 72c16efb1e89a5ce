"""Image folders with metadata beside the files: rows become fields, and one line for what is wrong with one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.field_options import parse_field_options
from scoreray.data.storage.store import open_store

ASKED = parse_field_options(["text=text", "place=latlon", "score=score", "year=year"], ["year=class"])


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def row(i: int) -> dict[str, Any]:
    return {
        "text": f'a "größe", {i}',
        "latlon": [i, 0.5],
        "score": i if i % 2 else i / 4,
        "year": 2000 + i % 3,
        "url": "x",
    }


def write(folder: Path, kind: str, count: int = 12, classes: bool = False) -> Path:
    names = [f"{'cat' if i % 2 else 'dog'}/{i:02d}.png" if classes else f"{i:02d}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(folder / name)
    below = "./" if kind == "jsonl" else ""
    rows = [{"file_name": f"{below}{name}", **row(i)} for i, name in enumerate(names)]
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        cells = [[f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in one.values()] for one in rows]
        text = "\r\n".join([",".join(rows[0]), *map(",".join, cells)]) + "\r\n"
    (folder / f"metadata.{kind}").write_bytes(text.encode())
    return folder


def check(url: str, manifest: Manifest, count: int) -> None:
    """That every sample has the row that is its picture's."""
    names = ["image", "text", "place", "score", "year"]
    found = SampleReader(url).read_fields(range(count), [FieldRequest(name) for name in names])
    assert manifest.num_samples == count
    pictures = {picture(i).tobytes(): i for i in range(count)}
    for sample in range(count):
        i = pictures.pop(found.fields["image"][sample].permute(1, 2, 0).contiguous().numpy().tobytes())
        text = bytes(found.fields["text"][sample][found.masks["text"][sample]].tolist()).decode()
        assert text == row(i)["text"]
        assert torch.equal(found.fields["place"][sample], torch.tensor(row(i)["latlon"], dtype=torch.float64))
        assert found.fields["score"][sample].item() == row(i)["score"]
        assert found.fields["year"][sample].item() == row(i)["year"]
    assert not pictures


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_metadata_become_fields(tmp_path: Path, kind: str) -> None:
    folder, asked = (
        write(tmp_path / "photos", kind),
        parse_field_options(["text=text", "place=latlon", "score=score", "year=year"], [], ["score=channel"]),
    )
    manifest = pack(folder, tmp_path / "set", fields=asked)
    assert [(one.name, one.kind, one.dtype) for one in manifest.fields] == [
        ("image", "image", "uint8"), ("text", "text", "uint8"), ("place", "vector", "float64"),
        ("score", "scalar", "float64"), ("year", "scalar", "int64"),
    ]  # fmt: skip
    check(str(tmp_path / "set"), manifest, 12)


def test_a_folder_in_s3_packs_to_the_bytes_of_a_local_one(tmp_path: Path, s3_url: str) -> None:
    folder = write(tmp_path / "photos", "jsonl", classes=True)
    remote = open_store(f"{s3_url}/photos")
    for path in folder.rglob("*.*"):
        remote.put(path.relative_to(folder).as_posix(), path.read_bytes())
    made = [pack(source, tmp_path / name, fields=ASKED) for name, source in (("a", folder), ("b", remote.url()))]
    assert made[0] == made[1]
    assert [one.name for one in made[0].fields] == ["image", "text", "place", "score", "year"]  # year is the class
    assert made[0].classes == [str(year) for year in range(2003)]
    with_folders = pack(folder, tmp_path / "c", fields=parse_field_options(["text=text"]))
    assert with_folders.classes == ["cat", "dog"]
    assert with_folders.class_counts == [6, 6]


def test_without_field_metadata_is_left_out_as_ever(tmp_path: Path) -> None:
    assert pack(write(tmp_path / "photos", "jsonl"), tmp_path / "set").version == 2


def test_a_picture_without_a_row_and_a_row_without_a_picture_are_named_or_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", "jsonl")
    Image.fromarray(picture(99)).save(folder / "other.png")
    with pytest.raises(DataError, match=r"other\.png, field 'text' \(--field text=text\): has no value"):
        pack(folder, tmp_path / "set", fields=ASKED)
    (folder / "03.png").unlink()
    manifest = pack(folder, tmp_path / "set", fields=ASKED, skip_bad=2)
    assert (manifest.num_samples, manifest.num_left_out) == (11, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "metadata.jsonl: line 2: is no JSON"),
        ("[1]", "metadata.jsonl: line 2: is list, an object is needed"),
        ('{"text": "x"}', "metadata.jsonl: line 2: has no 'file_name'"),
        ('{"file_name": "00.png"}', "metadata.jsonl: line 2: '00.png' has a row already"),
        ('{"file_name": "../../etc/passwd"}', "'../../etc/passwd' is no path below the table's folder"),
        ('{"file_name": "01.png", "score": "high"}', "01.png, field 'score' (--field score=score): 'high'"),
        (f'{{"file_name": "01.png", "score": {"[" * 100_000}', "metadata.jsonl: line 2: is no JSON: maximum recursion"),
        (f'{{"file_name": "01.png", "score": 1{"0" * 400}}}', "column 'score' of the metadata: int too large"),
    ],
)
def test_what_is_wrong_in_metadata_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path / "photos", "jsonl", 2)
    first = (folder / "metadata.jsonl").read_text().split("\n")[0]
    (folder / "metadata.jsonl").write_text(f"{first}\n{text}\n")
    with pytest.raises((UserError, DataError)) as raised:
        pack(folder, tmp_path / "set", fields=parse_field_options(["score=score"], ["score=scalar"]))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", "jsonl", 2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,,text,\n00.png,a,,b,\n01.png,c,,d,\n")
    with pytest.raises(UserError, match=r"metadata.csv: line 1: two columns are called 'text'; give one another name"):
        pack(folder, tmp_path / "set", fields=parse_field_options(["text=text"]))


def test_fields_of_what_has_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture(0)).save(tmp_path / "photos" / "0.png")
    with pytest.raises(
        UserError, match=r"--field text=text: .*photos \(with no metadata.jsonl or metadata.csv\) has no"
    ):
        pack(tmp_path / "photos", tmp_path / "set", fields=parse_field_options(["text=text"]))
    (tmp_path / "x-idx3-ubyte").write_bytes(io.BytesIO().getvalue())
    with pytest.raises(UserError, match=r"x-idx3-ubyte: --field text=text: images and their classes are all"):
        pack(tmp_path / "x-idx3-ubyte", tmp_path / "set", fields=parse_field_options(["text=text"]))


@pytest.mark.parametrize(
    ("text", "fields", "says"),
    [
        ("[" * 200_000, ["text=text"], "line 1: is no JSON: maximum recursion depth"),
        (r'{"file_name": "00.png", "text": "\ud800"}', ["text=text"], "field 'text' .*is not UTF-8, at character 0"),
        ('{"file_name": "00.png", "year": 1e999}', ["year=year"], "inf can't be of kind class"),
        (
            '{"file_name": "00.png", "text": "a"}',
            ["image=text"],
            "none of the fields is an image, an array, a vector or a scalar",
        ),
        ('{"file_name": "00.png", "text": "%s"}' % ("[" * 100_000), ["score=text:a"], "has no value"),
    ],
)
def test_rows_of_any_json_are_refused_in_one_line(tmp_path: Path, text: str, fields: list[str], says: str) -> None:
    folder = write(tmp_path / "in", "jsonl", count=1)
    (folder / "metadata.jsonl").write_text(text)
    kinds = [f"{name}=class" for name in ("year",) if f"{name}={name}" in fields]
    with pytest.raises((DataError, UserError), match=says) as refused:
        pack(folder, tmp_path / "out", fields=parse_field_options(fields, kinds))
    assert "\n" not in str(refused.value)
