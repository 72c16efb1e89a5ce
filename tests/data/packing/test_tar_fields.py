"""Tars with several members a sample, as img2dataset writes them: in place and made new, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch

from scoreray.cluster.verbs.pack import pack_with_bar
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.data.reading.stream import Stream
from scoreray.data.sources.field_options import FieldOptions, parse_field_options

ASKED = ["caption=txt", "t5=t5.npy", "cls=json:label", "place=json:at.latlon", "score=json:score", "title=json:title"]
FIELDS = parse_field_options(ASKED)


def tar(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def sample(i: int) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    about = {"label": i % 3, "at": {"latlon": [i, i / 4]}, "score": i, "title": f"Nr {i}", "url": "x", "sha256": "y"}
    return {
        "jpg": simplejpeg.encode_jpeg(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), 95, "RGB", "444"),
        "txt": f"größe {i}" * (i % 3),
        "json": about,
        "t5.npy": rng.normal(size=(i % 4, 5)).astype(np.float16),
        "wav": b"RIFF",
    }


def encoded(value: Any) -> bytes:
    if isinstance(value, np.ndarray | np.generic):
        return npy(value)
    return (
        value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else json.dumps(value).encode()
    )


def write(folder: Path, samples: list[dict[str, Any]], per_tar: int = 20) -> Path:
    folder.mkdir()
    for start in range(0, len(samples), per_tar):
        members = [
            (f"{start + i:05d}.{kind}", encoded(value))
            for i, one in enumerate(samples[start : start + per_tar])
            for kind, value in one.items()
        ]
        (folder / f"{start // per_tar:05d}.tar").write_bytes(tar(*members))
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("img2dataset") / "tars", [sample(i) for i in range(50)])


@pytest.mark.parametrize("how", ["in place", "kept", "new pictures"])
def test_every_field_of_every_sample_comes_back(tars: Path, tmp_path: Path, how: str) -> None:
    source = shutil.copytree(tars, tmp_path / "tars")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    url, left_out = source if how == "in place" else tmp_path / "set", Counter[str]()
    options: dict[str, Any] = {"image_size": 8} if how == "new pictures" else {}
    manifest, _ = pack_with_bar(str(source), str(url), workers=1, fields=FIELDS, left_out=left_out, **options)
    assert {path.name: path.read_bytes() for path in source.glob("*.tar")} == before
    assert [one.name for one in manifest.fields] == ["image", "caption", "t5", "cls", "place", "score", "title"]
    assert [one.kind for one in manifest.fields] == ["image", "text", "sequence", "class", "vector", "scalar", "text"]
    assert left_out == {".wav": 50, ".json.url": 50, ".json.sha256": 50}
    assert verify(str(url)) == []
    stream = Stream(
        str(url), global_batch_size=10, rank=0, world_size=1, seed=0,
        fields=[FieldRequest(one.name) for one in manifest.fields],
    )  # fmt: skip
    seen = 0
    for batch, _ in zip(stream, range(5), strict=False):
        for row, number in enumerate(batch.index.tolist()):
            wanted, about = sample(number), sample(number)["json"]
            caption, length = wanted["txt"].encode(), len(wanted["t5.npy"])
            assert bytes(batch.fields["caption"][row][batch.masks["caption"][row]].tolist()) == caption
            assert batch.masks["t5"][row].sum() == length
            assert torch.equal(batch.fields["t5"][row, :length], torch.from_numpy(wanted["t5.npy"]))
            assert batch.fields["cls"][row] == about["label"]
            assert batch.fields["place"][row].tolist() == about["at"]["latlon"]
            assert batch.fields["score"][row].tolist() == [about["score"]]
            assert bytes(batch.fields["title"][row][batch.masks["title"][row]].tolist()) == about["title"].encode()
            if how != "new pictures":
                picture = simplejpeg.decode_jpeg(wanted["jpg"], "RGB")
                assert (batch.fields["image"][row].numpy() == picture.transpose(2, 0, 1)).all()
            seen += 1
    assert seen == 50
    stream.close()
    again = pack(source, url, fields=FIELDS, **options)  # recognised
    assert again == manifest


def test_without_field_the_same_tars_are_pictures_and_classes_as_ever(tars: Path, tmp_path: Path) -> None:
    manifest = pack(shutil.copytree(tars, tmp_path / "tars"), tmp_path / "tars")
    assert manifest.version == 2
    assert manifest.class_counts == [17, 17, 16]


def test_latents_of_any_type_are_a_target_without_a_picture(tmp_path: Path) -> None:
    latents = [np.random.default_rng(i).normal(size=(4, 2, 2)) for i in range(6)]
    half = write(tmp_path / "half", [{"npy": one.astype(np.float16), "txt": str(i)} for i, one in enumerate(latents)])
    manifest = pack(half, half)
    assert (manifest.version, manifest.target.dtype, manifest.shape) == (3, "float16", [4, 2, 2])
    named = write(tmp_path / "named", [{"vae.npy": one, "txt": str(i)} for i, one in enumerate(latents)])
    manifest = pack(named, named, fields=parse_field_options(["latent=vae.npy", "text=txt"], [], ["latent=channel"]))
    assert [(one.name, one.kind, one.dtype) for one in manifest.fields] == [
        ("latent", "array", "float64"), ("text", "text", "uint8")
    ]  # fmt: skip
    assert verify(str(named)) == []
    assert manifest.target.std == pytest.approx(np.stack(latents).std((0, 2, 3)).tolist())


def test_an_image_that_is_named_takes_the_place_of_the_samples_own(tmp_path: Path) -> None:
    folder, left_out = write(tmp_path / "tars", [sample(i) for i in range(4)]), Counter[str]()
    asked = parse_field_options(["photo=jpg", "depth=t5.npy"], ["depth=sequence"])
    manifest, _ = pack_with_bar(str(folder), str(folder), workers=1, fields=asked, left_out=left_out)
    assert [one.name for one in manifest.fields] == ["photo", "depth", "label"]
    assert left_out[".txt"] == 4


def refused(folder: Path, samples: list[dict[str, Any]], fields: FieldOptions, **options: Any) -> str:
    with pytest.raises((UserError, DataError)) as raised:
        pack(write(folder / "tars", samples), folder / "tars", fields=fields, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_sample_that_lacks_a_field_is_named_or_left_out(tmp_path: Path) -> None:
    samples = [sample(i) for i in range(30)]
    del samples[23]["txt"]
    said = refused(tmp_path, samples, FIELDS)
    assert "00001.tar: byte " in said
    assert "sample '00023' has no .txt (--field caption=txt)" in said
    assert pack(tmp_path / "tars", tmp_path / "tars", fields=FIELDS, skip_bad=1).num_samples == 29


@pytest.mark.parametrize(
    ("asked", "kinds", "changed", "message"),
    [
        (["t5=clip.npy"], [], {}, "did you mean 'n.npy'? accepted: jpg, json, n.npy, t5.npy, txt, wav"),
        (["a=json:at"], [], {}, "--field a=json:at: holds dicts; name what is in them: --field a=json:at.KEY"),
        (["a=json:at.lat"], [], {}, "the JSON has no 'at.lat'"),
        (["a=json:at.lan"], [], {}, "the JSON has no 'at.lan'; did you mean"),
        (["a=txt:x"], [], {}, "--field a=txt:x: a path is within JSON; .txt is none"),
        (["a=wav"], [], {}, "--field a=wav: .wav is of no kind that is read"),
        (["image=txt"], [], {}, "'image' is the name of the samples' own image, array or class"),
        (["c=json:title"], ["c=class"], {}, "'Nr 0' is no class (--field c=json:title)"),
        (["t5=t5.npy"], [], {"t5.npy": np.full((2, 5), np.nan, np.float16)}, "field 't5': nan at [0, 0]"),
        (["t5=t5.npy"], [], {"t5.npy": np.zeros((2, 4), np.float16)}, "holds float16 (2, 4)"),
        (["caption=txt"], [], {"txt": b"\xff"}, "is no UTF-8"),
        (["s=json:score"], [], {"json": {"score": None}}, "'score' is null (--field s=json:score)"),
        (["s=json:score"], [], {"json": {"score": "high"}}, "'high' is no number (--field s=json:score)"),
        (["s=json:score"], [], {"json": {"score": 10**400}}, "int too large to convert to float"),
        (["cls=json:label"], [], {"json": {"label": float("inf")}}, "inf is no class (--field cls=json:label)"),
        (["cls=json:label"], [], {"json": {"label": float("nan")}}, "nan is no class"),
        (["cls=json:label"], [], {"json": {"label": "9" * 5000}}, "00010.json"),
        (["n=n.npy"], [], {"n.npy": np.float32(1.5)}, ": 1.5 is no int32 (--field n=n.npy)"),
        (["t5=t5.npy"], ["x=text"], {}, "--kind x=text: "),
    ],
)
def test_what_makes_no_field_is_one_line(
    tmp_path: Path, asked: list[str], kinds: list[str], changed: dict[str, Any], message: str
) -> None:
    samples = [sample(i) | {"n.npy": np.int32(i)} for i in range(12)]
    samples[10] |= changed
    assert message in refused(tmp_path, samples, parse_field_options(asked, kinds))


@pytest.mark.parametrize("asked", ["t5=clip.npy", "a=json:at.lan", "a=jsn:label"])
def test_a_name_that_no_sample_has_is_the_callers_mistake_and_a_sample_without_it_the_datas(
    tmp_path: Path, asked: str
) -> None:
    samples, fields = [sample(i) for i in range(12)], parse_field_options([asked])
    with pytest.raises(UserError, match=r"00000\.tar: byte \d+.* has no "):
        pack(write(tmp_path / "tars", samples), tmp_path / "tars", fields=fields)
    samples[5] |= {"clip.npy": np.zeros(2), "json": {"at": {"lan": 1}}, "jsn": b"1"}
    with pytest.raises(DataError, match=r"byte \d+.* has no "):
        pack(write(tmp_path / "others", samples), tmp_path / "others", fields=fields)


def test_what_img2dataset_writes_is_packed_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files: a tar, a parquet file of the same rows and counts for each shard; keys of shard and sample; JSON in
    four spaces with the exif as text in it (img2dataset 1.45, its writer and downloader)."""
    folder = tmp_path / "laion"
    folder.mkdir()
    for shard in range(2):
        rows, members = list[dict[str, Any]](), list[tuple[str, bytes]]()
        for i in range(3):
            jpg, key = sample(3 * shard + i)["jpg"], f"{shard:05d}{i:04d}"
            about = {
                "url": f"https://x/{key}.jpg", "caption": f"größe {key}", "key": key, "status": "success",
                "error_message": None, "width": 12, "height": 8, "original_width": 800 + i, "original_height": 600,
                "exif": '{"Image Orientation": "Horizontal (normal)"}', "sha256": hashlib.sha256(jpg).hexdigest(),
            }  # fmt: skip
            members += [(f"{key}.jpg", jpg), (f"{key}.json", json.dumps(about, indent=4).encode())]
            members += [(f"{key}.txt", about["caption"].encode())]
            rows.append(about)
        (folder / f"{shard:05d}.tar").write_bytes(tar(*members))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 3, "successes": 3}, indent=4))
    fields = parse_field_options(["caption=txt", "width=json:original_width", "address=json:url"])
    manifest, _ = pack_with_bar(str(folder), str(folder), workers=1, fields=fields)
    said = capsys.readouterr().err
    assert "4 files beside the tars are left out (2 .json, 2 .parquet)" in said
    assert "; --field NAME=json:caption takes one" in said, "caption is a field's name already"
    assert [(one.name, one.kind) for one in manifest.fields] == [
        ("image", "image"), ("caption", "text"), ("width", "scalar"), ("address", "text"),
    ]  # fmt: skip
    assert verify(str(folder)) == []
    found = SampleReader(str(folder)).read_fields([4], [FieldRequest("caption"), FieldRequest("width")])
    assert bytes(found.fields["caption"][0].tolist()).decode() == "größe 000010001"
    assert found.fields["width"].tolist() == [[801.0]]


def test_names_with_dots_keep_their_own_captions(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    members = [(f"img_0.{i:02d}.{kind}", encoded(sample(i)[kind])) for i in range(4) for kind in ("jpg", "txt")]
    (tmp_path / "tars" / "0.tar").write_bytes(tar(*members))
    manifest = pack(tmp_path / "tars", tmp_path / "tars", fields=parse_field_options(["caption=txt"]))
    assert manifest.num_samples == 4
    assert Manifest.at(str(tmp_path / "tars")).members == ["jpg", "txt"]


@pytest.mark.parametrize(
    ("number", "broken"),
    [(0, {"json": {"a": "x"}}), (3, {"json": {"a": "x"}}), (3, {"json": b"{"}), (3, {"jpg": b"?"}), (3, {"json": {}})],
)
def test_a_broken_sample_among_the_first_ones_is_named_and_can_be_left_out(
    tmp_path: Path, number: int, broken: dict[str, Any]
) -> None:
    samples = [{"jpg": sample(i)["jpg"], "json": {"a": i / 2}} for i in range(20)]
    samples[number] |= broken
    asked = parse_field_options(["a=json:a", "photo=jpg"])
    with pytest.raises(DataError, match=rf"00000\.tar: byte \d+: (sample )?'{number:05d}"):
        pack(write(tmp_path / "tars", samples), tmp_path / "tars", fields=asked)
    manifest, skipped = pack_with_bar(
        str(tmp_path / "tars"), str(tmp_path / "tars"), workers=1, fields=asked, skip_bad=1
    )
    assert (manifest.num_samples, len(skipped)) == (19, 1)
    assert f"{number:05d}" in skipped[0]
    assert {one.name: one.kind for one in manifest.fields} == {"a": "scalar", "photo": "image"}


def test_an_array_of_another_shape_is_compared_with_the_first_samples(tmp_path: Path) -> None:
    samples = [{"jpg": sample(i)["jpg"], "json": {"at": [i, 0.5]}} for i in range(12)]
    samples[10]["json"]["at"] = [1, 2, 3]
    said = refused(tmp_path, samples, parse_field_options(["at=json:at"]))
    assert said.endswith("holds float64 (3,), the first samples have float64 (2,)")
