"""Members of tars that somebody else's function reads: arrays of new tars, which are read without it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.field_options import parse_field_options

DECODERS = """
import numpy as np

def halves(data):
    return np.frombuffer(data, np.uint8).reshape(1, 2, 2).astype(np.float32) / 2

def fails(data):
    raise KeyError("header")

def objects(data):
    return [None, {}]
"""


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Six samples of a member `dcm` of 4 bytes and a class."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for number in range(6):
            for extension, data in (("dcm", bytes([number] * 4)), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return tmp_path / "tars"


def test_new_tars_hold_what_the_function_made_and_are_read_without_it(
    own_package: Callable[..., Path], tars: Path, tmp_path: Path
) -> None:
    folder = own_package("theirs", read=DECODERS)
    fields = parse_field_options(["scan=dcm"], decoders=["dcm=theirs.read:halves"])
    manifest = pack(tars, tmp_path / "packed", fields=fields)
    found = {one.name: (one.kind, one.shape, one.dtype) for one in manifest.fields}
    assert found["scan"] == ("array", [1, 2, 2], "float32")
    assert pack(tars, tmp_path / "packed", fields=fields) == manifest
    (folder / "read.py").unlink()
    read = SampleReader(str(tmp_path / "packed")).read_fields(np.arange(6), [FieldRequest("scan")])
    assert sorted(read.fields["scan"][:, 0, 0, 0].tolist()) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("theirs.read:fails", DataError, "--decoder theirs.read:fails: KeyError: 'header'"),
        ("theirs.read:objects", DataError, "gave object; an array of numbers is needed"),
        ("theirs.read:absent", UserError, "theirs.read has no 'absent'"),
        ("os:system", UserError, "'os:system' is code of somebody else's"),
    ],
)
def test_a_function_that_can_not_read_is_one_line(
    own_package: Callable[..., Path], tars: Path, tmp_path: Path, kind: str, error: type[Exception], message: str
) -> None:
    own_package("theirs", read=DECODERS)
    with pytest.raises(error, match=message) as refused:
        pack(tars, tmp_path / "packed", fields=parse_field_options(["scan=dcm"], decoders=[f"dcm={kind}"]))
    assert "\n" not in str(refused.value)


def test_decoders_are_for_members_of_tars_that_become_fields(
    own_package: Callable[..., Path], tars: Path, tmp_path: Path
) -> None:
    own_package("theirs", read=DECODERS)
    for words, message in ((["png=theirs.read:halves"], "--field NAME=png is needed"), (["dcm=halves"], "EXT=package")):
        with pytest.raises(UserError, match=message):
            parse_field_options(["scan=dcm"], decoders=words)
    fields = parse_field_options(["scan=dcm"], decoders=["dcm=theirs.read:halves"])
    with pytest.raises(UserError, match="new tars need another URL"):
        pack(tars, tars, fields=fields)
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 2, 2), np.float32))
    with pytest.raises(UserError, match="is for members of tars"):
        pack(tmp_path / "x.npy", tmp_path / "other", fields=fields)
