"""What is a sample in a tar that somebody else made: its image as a folder's would be read, its class, and the rest."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scoreray.cluster.verbs.pack import pack_with_bar
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.tar_samples import TarSamples
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.reading.stream import Stream
from scoreray.data.reading.tars import Tape
from scoreray.data.sources.source import open_source
from scoreray.data.storage.store import open_store


def picture(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PNG = encoded(picture(0))


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def packed(folder: Path, *members: tuple[str, bytes], **options: object) -> Manifest:
    """The data set of one tar with these members, indexed in place."""
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(tar_bytes(*members))
    manifest = pack(folder, folder, **options)
    assert verify(str(folder)) == []
    return manifest


def found_in(*members: tuple[str, bytes], labelled: bool = True) -> tuple[dict[str, int | str], dict[str, int]]:
    """(label or problem by key, what is unused) of a tar."""
    data = tar_bytes(*members)
    samples = TarSamples(Tape(lambda start, end: data[start:end], len(data)), labelled)
    return {sample.key: sample.problem or sample.label for sample in samples}, dict(samples.left_out)


def names(*names: str) -> list[tuple[str, bytes]]:
    """Members of these names; one that says a class says 1."""
    return [(name, b"1" if name.lower().endswith(("cls", "cls.txt")) else PNG) for name in names]


NAMES = {
    "plain": (["a/1.png", "a/1.cls", "a/2.png"], {"a/1": 1, "a/2": -1}, {}),
    "in a folder called .": (["./1.png", "./1.cls"], {"1": 1}, {}),
    "upper case": (["1.PNG", "1.CLS", "2.JPeG"], {"1": 1, "2": -1}, {}),
    "more than one picture": (["cat.png", "cat.1.png", "cat.2.png", "dog.1.png", "dog.png"], {"cat": -1, "dog": -1},
                              {".1.png": 2, ".2.png": 1}),
    "a mask": (["1.jpg", "1.seg.png", "1.cls", "1.emb.npy"], {"1": 1}, {".seg.png": 1, ".emb.npy": 1}),
    "numbers with a point": (["img_0.05.png", "img_0.05.cls", "img_0.1.png", "img_1.png"],
                             {"img_0.05": 1, "img_0.1": -1, "img_1": -1}, {}),
    "such numbers in any order": (["0.5.png", "1.5.png", "0.25.png", "0.75.cls.txt", "0.75.png"],
                                  {"0.5": -1, "1.5": -1, "0.25": -1, "0.75": 1}, {}),
    "frames": (["f.0001.png", "f.0002.png", "f.0003.png"], {f"f.000{i}": -1 for i in (1, 2, 3)}, {}),
    "one picture with a name": (["1.rgb.png", "1.cls", "2.rgb.png", "2.cls"], {"1.rgb": 1, "2.rgb": 1}, {}),
    "apple's": (["._1.png", "1.png", "._1.cls", "1.cls", "__MACOSX/._1.png", ".DS_Store"], {"1": 1},
                {"hidden file": 4}),
    "others": (["1.png", "1.txt", "1.boxes.json", "1", "2.png", "2.txt"], {"1": -1, "2": -1},
               {".txt": 2, ".boxes.json": 1, "no suffix": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_grouped_into_samples(name: str) -> None:
    members, samples, left_out = NAMES[name]
    assert found_in(*names(*members)) == (samples, left_out)


def test_pictures_that_share_a_class_need_a_name_for_one_of_them() -> None:
    samples, _ = found_in(*names("1.left.png", "1.right.png", "1.cls"))
    named = "byte 512: sample '1' has no image of its own, but '1.left.png', '1.right.png'; one of them needs the name"
    assert samples == {"1": f"{named} '1.png'"}
    assert "has two images (.png, .jpg); keep one" in str(found_in(*names("1.png", "1.jpg"))[0]["1"])
    both = str(found_in(*names("1.jpg", "1.npy"))[0]["1"])
    assert both.endswith("or pack them as fields: scoreray data pack SOURCE URL --field image=jpg --field array=npy")
    assert "sample '1' has no image (png, jpg" in str(found_in(*names("1.cls"))[0]["1"])


def test_many_frames_of_one_name_are_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoreray.data.packing.tar_samples.MAX_HELD_BYTES", 3 * len(PNG))
    frames = [f"f.{i:04d}.{kind}" for i in range(20) for kind in ("png", "cls")]
    assert found_in(*names(*frames)) == ({f"f.{i:04d}": 1 for i in range(20)}, {})
    others = [f"f.{i:04d}.png" for i in range(20)]
    assert found_in(*names("f.png", *others, "f.cls")) == ({"f": 1}, {f".{i:04d}.png": 1 for i in range(20)})
    with pytest.raises(DataError, match=r"sample 'f' has over \d+ bytes of images"):
        found_in(*names(*(f"f.{i}.png" for i in range(9)), "f.cls", "f.9.png"), ("f.txt", b"x"), *names("f.cls.txt"))


def js(**fields: object) -> bytes:
    return json.dumps(fields).encode()


LABELS = {
    "cls": ([("cls", b"2")], 2, {}),
    "with a line's end": ([("cls", b"2\n")], 2, {}),
    "cls.txt": ([("cls.txt", b"2")], 2, {}),
    "label": ([("label", b"2")], 2, {}),
    "class": ([("class", b"2")], 2, {}),
    "target": ([("target.txt", b"2")], 2, {}),
    "json label": ([("json", js(label=2))], 2, {}),
    "json class": ([("json", js(caption="a cat", **{"class": 2}))], 2, {".json.caption": 1}),
    "json of a float": ([("json", js(label=2.0))], 2, {}),
    "json of digits": ([("json", js(label="2"))], 2, {}),
    "json with a name beside": ([("json", js(label="cat", class_id=2))], 2, {".json.label": 1}),
    "json none": ([("json", js(label=None))], -1, {".json": 1}),
    "json -1": ([("json", js(label=-1))], -1, {}),
    "json of boxes": ([("json", js(label=[1, 2]))], -1, {".json": 1}),
    "json of a flag": ([("json", js(label=True))], -1, {".json": 1}),
    "json list": ([("json", b"[1]")], -1, {".json": 1}),
    "no json": ([("json", b"{" * 100_000)], -1, {".json": 1}),
    "json of a huge number": ([("json", b'{"label": ' + b"9" * 5000 + b"}")], -1, {".json": 1}),
    "two that agree": ([("cls", b"2"), ("json", js(label=2))], 2, {}),
    "two that differ": ([("json", js(label=1)), ("cls", b"2")], 2, {".json": 1}),
    "fine and coarse": ([("cls", b"2"), ("label", b"0")], 2, {".label": 1}),
    "a caption": ([("txt", b"a cat"), ("caption", b"a cat")], -1, {".txt": 1, ".caption": 1}),
}


@pytest.mark.parametrize("name", LABELS)
def test_the_class_of_a_sample_is_read_where_people_write_it(name: str, tmp_path: Path) -> None:
    members, label, left_out = LABELS[name]
    sample = [("0.png", PNG), *((f"0.{kind}", data) for kind, data in members)]
    assert found_in(*sample) == ({"0": label}, left_out)
    manifest = packed(tmp_path / "t", *sample, ("1.png", encoded(picture(1))))
    assert manifest.class_counts == ([] if label < 0 else [0, 0, 1])
    assert found_in(*sample, labelled=False)[0] == {"0": -1}
    assert packed(tmp_path / "u", *sample, ("1.png", encoded(picture(1))), labelled=False).classes == []


@pytest.mark.parametrize(
    ("kind", "data"), [("cls", b"cat"), ("label", b"-3"), ("cls.txt", "²".encode()), ("json", js(label="cat")),
                       ("json", js(label=1_000_000)), ("json", js(label=10**30)), ("class", b"")]
)  # fmt: skip
def test_a_class_that_is_no_number_is_refused_not_lost(kind: str, data: bytes, tmp_path: Path) -> None:
    sample = [("0.png", PNG), (f"0.{kind}", data), ("1.png", encoded(picture(1))), ("2.png", encoded(picture(2)))]
    with pytest.raises(DataError, match=rf"0\.tar: byte \d+: '0\.{kind}'.*; --no-classes packs without classes"):
        packed(tmp_path / "t", *sample)
    assert packed(tmp_path / "t", *sample, skip_bad=1).num_samples == 2
    assert packed(tmp_path / "u", *sample, labelled=False).num_samples == 3


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").mkdir()
    for tar in range(2):
        members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", encoded(picture(i))),
                   ("txt", b"a cat"), ("json", js(label=1, caption="x")), (f"kind-{tar}-{i}", b""))]  # fmt: skip
        (tmp_path / "t" / f"{tar}.tar").write_bytes(tar_bytes(*members))
    pack_with_bar(str(tmp_path / "t"), str(tmp_path / "t"), workers=1)
    said = (
        "left out, as no field reads it: 6 .json.caption, 6 .txt, 1 .kind-0-0, 1 .kind-0-1, 1 .kind-0-2, 3 other kinds"
    )
    assert said in capsys.readouterr().err
    pack_with_bar(str(tmp_path / "t"), str(tmp_path / "new"), workers=1, image_size=4)
    assert said in capsys.readouterr().err
    assert Manifest.load(open_store(tmp_path / "new")).class_counts == [0, 6]


def test_files_beside_tars_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0.parquet", "0_stats.json", ".hidden", "notes"):
        (tmp_path / name).write_text("x")
    packed(tmp_path, ("0.png", PNG), ("1.png", encoded(picture(1))))
    pack_with_bar(str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}-new"), workers=1, image_size=4)
    said = "3 files beside the tars are left out (1 .json, 1 .parquet, 1 no suffix)"
    assert said in capsys.readouterr().err, "and not the manifest and index that are there now"


def test_a_png_with_flipped_bits_is_refused_where_its_pixels_could_be_others(tmp_path: Path) -> None:
    """The fast decoder passes over checksums; once indexed, digests hold."""
    for at in range(40, len(PNG) - 12, 7):
        damaged = bytearray(PNG)
        damaged[at] ^= 1
        with pytest.raises(DataError, match=r"0\.tar: byte \d+: '1\.png': "):
            packed(tmp_path / f"{at}", ("0.png", encoded(picture(1))), ("1.png", bytes(damaged)))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


DEEP = np.random.default_rng(0).integers(0, 1 << 16, (8, 8), np.uint16)
BASE = picture(7)
KINDS: dict[str, tuple[str, bytes]] = {
    "rgb": ("png", encoded(BASE)),
    "rgba": ("png", encoded(BASE.convert("RGBA"))),
    "transparent colour": ("png", encoded(BASE, transparency=(0, 0, 0))),
    "palette": ("png", encoded(BASE.quantize(16))),
    "palette with transparency": ("png", encoded(BASE.quantize(16), transparency=0)),
    "grey": ("png", encoded(BASE.convert("L"))),
    "grey with alpha": ("png", encoded(BASE.convert("LA"))),
    "bits": ("png", encoded(BASE.convert("1"))),
    "turned png": ("png", encoded(BASE, exif=turned(6))),
    "jpg": ("jpg", encoded(BASE, "JPEG", quality=95)),
    "grey jpg": ("jpeg", encoded(BASE.convert("L"), "JPEG")),
    "cmyk jpg": ("jpg", encoded(BASE.convert("CMYK"), "JPEG")),
    **{f"turned jpg {i}": ("jpg", encoded(BASE, "JPEG", quality=95, exif=turned(i))) for i in range(1, 9)},
    "a jpg called png": ("png", encoded(BASE, "JPEG", quality=95)),
    "webp": ("webp", encoded(BASE, "WEBP", lossless=True)),
    "bmp": ("bmp", encoded(BASE, "BMP")),
    "gif": ("gif", encoded(BASE, "GIF")),
    "tiff": ("tif", encoded(BASE, "TIFF")),
    "ppm": ("ppm", encoded(BASE, "PPM")),
    "avif": ("avif", encoded(BASE, "AVIF", quality=100)),
}


def test_every_kind_of_picture_is_what_a_folder_of_them_gives(tmp_path: Path) -> None:
    """Turned upright, without transparency, grey among colours as RGB: read in place, in a run, and by verify."""
    (tmp_path / "folder").mkdir()
    members = []
    for i, (kind, data) in enumerate(KINDS.values()):
        members.append((f"{i:02d}.{kind}", data))
        (tmp_path / "folder" / f"{i:02d}.{kind}").write_bytes(data)
    source = open_source(tmp_path / "folder")
    expected = [source.read(i).transpose(2, 0, 1).astype(int) for i in range(len(KINDS))]
    manifest = packed(tmp_path / "t", *members)
    assert manifest.shape == [3, 8, 8]
    inside = read_samples(str(tmp_path / "t"), range(len(KINDS))).numpy().astype(int)
    with Stream(str(tmp_path / "t"), global_batch_size=len(KINDS), rank=0, world_size=1, seed=0) as stream:
        batch = next(stream)
    streamed = dict(zip(batch.index.tolist(), batch.images.numpy().astype(int), strict=True))
    for i, name in enumerate(KINDS):
        bound = 3 if "jpg" in name else 0  # another decoder
        assert np.abs(inside[i] - expected[i]).max() <= bound, name
        assert (streamed[i] == inside[i]).all(), name
    assert manifest.mean == pytest.approx((inside.mean((0, 2, 3)) / 127.5 - 1).tolist(), abs=1e-6)
    assert manifest.sigma_data == pytest.approx((inside / 127.5).std(), rel=1e-6)


@pytest.mark.parametrize("colours_in", [0, 3, 5, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_or_rgb_is_decided_by_all_samples(colours_in: int, kind: str, tmp_path: Path) -> None:
    """Nine samples in three tars, all grey but one; none is lost as grey, and nine grey ones are no RGB."""
    folder = tmp_path / "t"
    for colours in (colours_in, None):
        folder.mkdir()
        images = [picture(i) if i == colours else picture(i).convert("L") for i in range(9)]
        for tar in range(3):
            members = [(f"{i}.{'png' if kind == 'PNG' else 'jpg'}", encoded(images[i], kind, quality=95))
                       for i in range(3 * tar, 3 * tar + 3)]  # fmt: skip
            (folder / f"{tar}.tar").write_bytes(tar_bytes(*members))
        manifest = pack(folder, folder)
        assert manifest.shape == [1 if colours is None else 3, 8, 8]
        assert verify(str(folder)) == []
        values = read_samples(str(folder), range(9)).numpy()
        for i, image in enumerate(images):
            seen = Image.open(io.BytesIO(encoded(image, kind, quality=95))).convert("L" if colours is None else "RGB")
            difference = values[i].transpose(1, 2, 0).squeeze() - np.asarray(seen).astype(int)
            assert np.abs(difference).max() <= (0 if kind == "PNG" else 3), "another decoder"
        assert manifest.mean == pytest.approx((values.mean((0, 2, 3)) / 127.5 - 1).tolist())
        assert manifest.sigma_data == pytest.approx((values / 127.5).std())
        folder = tmp_path / "grey"


def deep_png() -> bytes:
    """An RGB png of 16 bits, which Pillow reads as 8 without a word (and can't write)."""
    import struct
    import zlib

    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in DEEP)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP_PICTURES = {
    "png": deep_png(),
    "grey.png": encoded(Image.fromarray(DEEP)),
    "ppm": b"P6 8 8 65535\n" + np.repeat(DEEP, 3).astype(">u2").tobytes(),
    "pgm": b"P5 8 8 1023\n" + (DEEP % 1024).astype(">u2").tobytes(),
    "tif": encoded(Image.fromarray(DEEP), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP_PICTURES)
def test_more_than_8_bits_stop_a_pack_by_any_way_in(name: str, tmp_path: Path) -> None:
    kind, good = name.rpartition(".")[2], [(f"{i}.png", encoded(picture(i))) for i in range(2)]
    (tmp_path / "in").mkdir()
    for good_name, data in good:
        (tmp_path / "in" / good_name).write_bytes(data)
    (tmp_path / "in" / f"9.{kind}").write_bytes(DEEP_PICTURES[name])
    with pytest.raises(DataError, match=r"more than 8 bits a channel .* convert it to 8 bits first"):
        pack(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=r"more than 8 bits a channel .* convert it to 8 bits first"):
        packed(tmp_path / "t", *good, (f"9.{kind}", DEEP_PICTURES[name]))
    with pytest.raises(DataError, match=r"more than 8 bits a channel .* convert it to 8 bits first"):
        pack(tmp_path / "t", tmp_path / "new", image_size=4)
    assert packed(tmp_path / "t", *good, (f"9.{kind}", DEEP_PICTURES[name]), skip_bad=1).num_samples == 2


@pytest.mark.parametrize("where", ["first", "whole first tar", "last"])
def test_skip_bad_leaves_out_the_first_sample_too(where: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    bad, good = ("0.png", PNG[:-30]), [(f"{i}.png", encoded(picture(i))) for i in range(1, 4)]
    first = {"first": [bad, good[0]], "whole first tar": [bad], "last": [good[0], ("9.png", PNG[:-30])]}[where]
    (tmp_path / "t" / "0.tar").write_bytes(tar_bytes(*first))
    (tmp_path / "t" / "1.tar").write_bytes(tar_bytes(*good[1:]))
    with pytest.raises(DataError, match=r"0\.tar: byte \d+: '[09]\.png': can't be decoded"):
        pack(tmp_path / "t", tmp_path / "t")
    assert pack(tmp_path / "t", tmp_path / "t", skip_bad=1).num_samples == (2 if where == "whole first tar" else 3)
    assert pack(tmp_path / "t", tmp_path / "new", image_size=4, skip_bad=1).shape == [3, 4, 4]


part = st.sampled_from(["a", "b", "0", "1", "05", "png", "cls", "txt", "json", "jpg", "npy", "seg", "", "._x", "é"])
member_names = (
    st.lists(part, min_size=1, max_size=4).map(".".join).filter(lambda name: name not in ("", ".", "..", "..."))
)


@settings(max_examples=400, derandomize=True)
@given(st.lists(member_names, max_size=8, unique=True))
def test_any_names_become_samples_or_one_line_and_every_member_is_accounted_for(found: list[str]) -> None:
    members = names(*(f"d/{name}" for name in found))
    samples, left_out, refusal = {}, {}, ""
    try:
        samples, left_out = found_in(*members, labelled=False)
    except DataError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert not refusal or "comes twice" in refusal
    good = [key for key, label in samples.items() if isinstance(label, int)]
    if not refusal and len(good) == len(samples):
        assert len(members) == len(good) + sum(left_out.values())


def test_tars_named_in_brace_notation_are_indexed_where_they_are(s3_url: str) -> None:
    store = open_store(s3_url)
    for number in range(4):
        store.put(f"x-{number}.tar", tar_bytes(("a.png", encoded(picture(number))), ("a.cls", b"%d" % number)))
    manifest = pack(f"{s3_url}/x-{{0..2}}.tar", s3_url)
    assert [shard.name for shard in manifest.shards] == ["x-0.tar", "x-1.tar", "x-2.tar"]
    assert verify(s3_url) == []
    assert read_samples(s3_url, range(3)).shape == (3, 3, 8, 8)
    with pytest.raises(UserError, match=r"scoreray data pack 's3://.*/x-\{0..2\}.tar' s3://"):
        pack(f"{s3_url}/x-{{0..2}}.tar", f"{s3_url}-elsewhere")
    with pytest.raises(UserError, match=r"x-4.tar: there is no such tar; 4 of the 5"):
        pack(f"{s3_url}/x-{{0..4}}.tar", s3_url)
    store.put("more/x-4.tar", store.get("x-3.tar"))
    with pytest.raises(UserError, match=r"names tars of 2 folders"):
        pack(f"{s3_url}/{{x-3,more/x-4}}.tar", s3_url)
