"""Folders, arrays and names as strangers have them: read as meant, or refused in one line that names them."""

from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
import socket
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scoreray.data.errors import DataError, ScorerayError, StorageError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.verify import verify
from scoreray.data.reading.pictures import open_picture, orientation_in
from scoreray.data.reading.samples import read_samples
from scoreray.data.sources.source import SourceOptions, open_source
from scoreray.data.storage.store import open_store


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth, so that a jpg of it is near it."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def kinds(folder: Path) -> dict[str, Path]:
    """One file of each kind that a camera, a scanner or a web page makes."""
    base, paths = picture(1, 36, 36), {}

    def save(name: str, image: Image.Image, **options: object) -> None:
        paths[name] = folder / "a" / name
        image.save(paths[name], **options)

    (folder / "a").mkdir(parents=True)
    save("rgb.png", base)
    save("rgba.png", base.convert("RGBA"))
    save("palette.png", base.quantize(256))
    save("palette-alpha.png", base.quantize(255), transparency=0)
    save("grey.png", base.convert("L"))
    save("grey-alpha.png", base.convert("LA"))
    save("bits.png", base.convert("1"))
    save("rgb.jpg", base, quality=95)
    save("cmyk.jpg", base.convert("CMYK"), quality=95)
    save("still.gif", base)
    save("rgb.webp", base, quality=95)
    save("rgb.bmp", base)
    save("rgb.tiff", base)
    save("rgb.ppm", base)
    save("UPPER.PNG", base, format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    save("turned.jpg", base.transpose(Image.Transpose.ROTATE_90), quality=95, exif=exif)
    save("phone.jpg", base, format="MPO", save_all=True, append_images=[base.resize((8, 6))], quality=95)
    return paths


def test_every_kind_of_picture_becomes_the_rgb_image_that_one_sees(tmp_path: Path) -> None:
    expected = np.asarray(picture(1, 36, 36)).astype(int)
    grey = np.asarray(picture(1, 36, 36).convert("L")).astype(int)[..., None]
    for name, path in kinds(tmp_path / "in").items():
        (found,) = open_source(path.parent, SourceOptions()).read_all([sorted(os.listdir(path.parent)).index(name)])
        assert isinstance(found, dict), found
        image = found["image"]
        assert image.shape == (36, 36, 3)
        reference = grey if name.startswith(("grey", "bits")) else expected
        if name != "bits.png":  # dithered
            assert np.abs(image - reference).mean() < 8, name


def exif(*tags: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF data of these tags: (tag, type, count, its four bytes)."""
    head = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    entries = (struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    return head + b"".join(entries) + bytes(4)


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
MALFORMED = {
    "a number as text": (0x011A, 2, 3, b"72\0\0"),
    "text as a fraction": (0x0131, 5, 1, struct.pack("<I", 8)),
    "a value that is stored outside": (0x010E, 2, 5000, b"\xff" * 4),
    "a type that there is not": (0x0128, 99, 1, bytes(4)),
    "a directory that leads nowhere": (0x8769, 4, 1, b"\xff" * 4),
    "a maker's note of 4 GB": (0x927C, 7, 2**32 - 1, bytes(4)),
    "no value": (0x0132, 2, 0, bytes(4)),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("what", MALFORMED)
def test_a_turned_photo_is_upright_whatever_else_its_exif_says(what: str, format: str) -> None:
    expected = picture(1).transpose(Image.Transpose.ROTATE_270).size
    for tags in ((TURNED, MALFORMED[what]), (MALFORMED[what], TURNED)):
        out = io.BytesIO()
        picture(1).save(out, format, exif=exif(*tags))
        assert open_picture(out.getvalue(), "photo").size == expected


def test_orientation_is_read_in_both_byte_orders_and_types_and_from_cut_data() -> None:
    for order in "<>":
        for value in range(1, 9):
            for kind, packed in ((3, struct.pack(f"{order}HH", value, 0)), (4, struct.pack(f"{order}I", value))):
                data = exif((0x0131, 5, 1, bytes(4)), (0x0112, kind, 1, packed), order=order)
                assert orientation_in(data) == orientation_in(data[6:]) == value
    data = exif((0x0131, 5, 1, bytes(4)), TURNED)
    assert [orientation_in(data[:n]) for n in range(len(data) - 9)] == [None] * (len(data) - 9)


def test_pictures_are_found_by_what_they_are_where_the_name_does_not_say(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    formats = {"PNG": "a1b2c3", "JPEG": "img_0.05", "WEBP": "w", "BMP": "b", "GIF": "g", "TIFF": "t", "PPM": "p",
               "AVIF": "v"}  # fmt: skip
    for format, name in formats.items():
        picture(1, 16, 16).save(folder / name, format)
    picture(1, 16, 16).save(folder / "web.jfif", "JPEG")
    picture(1, 16, 16).save(folder / "web.AVIF", "AVIF")
    (folder / "LICENSE").write_text("BSD, P6 or not")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    source = open_source(folder, SourceOptions())
    assert sorted(source.files) == sorted([*formats.values(), "web.jfif", "web.AVIF"])
    assert source.left_out == {"no suffix": 1, ".heic": 1}
    assert all(isinstance(sample, dict) for sample in source.read_all(range(source.num_samples)))
    (tmp_path / "none").mkdir()
    (folder / "photo.heic").rename(tmp_path / "none" / "photo.heic")
    with pytest.raises(UserError, match=r"no images in this folder .*and no tars; it holds 1 \.heic"):
        open_source(tmp_path / "none", SourceOptions())


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        picture(i, 8, 8).save(tmp_path / "in" / f"{i}.png")
    os.mkfifo(tmp_path / "in" / "3.png")
    os.mkfifo(tmp_path / "in" / "control")
    with pytest.raises(DataError, match=r"3\.png: is a FIFO, no file; .*--skip-bad"):
        pack(tmp_path / "in", tmp_path / "out")
    assert pack(tmp_path / "in", tmp_path / "skipped", skip_bad=1).num_samples == 3
    os.mkfifo(tmp_path / "x.npz")
    for path, kind in ((tmp_path / "x.npz", "a FIFO"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ScorerayError, match=f"{path}: is {kind}, no file; copy what comes out of it"):
            pack(path, tmp_path / "never")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "x.sock"))
        with pytest.raises(ScorerayError, match=r"x\.sock: is a socket, no file"):
            pack(tmp_path / "x.sock", tmp_path / "never")


def test_a_file_url_is_a_source_and_a_target(tmp_path: Path) -> None:
    folder = tmp_path / "ä b" / "in"
    folder.mkdir(parents=True)
    for i in range(2):
        picture(i, 8, 8).save(folder / f"{i}.png")
    manifest = pack(folder.as_uri(), (tmp_path / "out #1").as_uri())
    assert manifest == pack(str(folder), str(tmp_path / "same"))
    assert (tmp_path / "out #1" / "manifest.json").exists()
    with pytest.raises(UserError, match="is inside the folder that is packed"):
        pack(folder.as_uri(), (folder / "out").as_uri())
    with pytest.raises(UserError, match=r"there is no such file"):
        pack((tmp_path / "absent.npz").as_uri(), tmp_path / "never")


BAD = {
    "empty.png": (b"", r"is empty \(0 bytes\)"),
    "html.jpg": (b"<html>404</html>", "is none of PNG, JPEG"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is none of PNG, JPEG"),
    "cut.png": (None, "can't be decoded"),
    "cut.jpg": (None, "can't be decoded"),
    "moving.gif": (None, "an animation or a document of 3 pictures"),
    "moving.webp": (None, "an animation or a document of 3 pictures"),
    "deep.png": (None, r"more than 8 bits a channel \(I;16\)"),
    "floats.tiff": (None, r"more than 8 bits a channel \(F\)"),
    "bomb.png": (None, "has more pixels than the limit of 134217728"),
}


def bad_bytes(name: str) -> bytes:
    if BAD[name][0] is not None:
        return BAD[name][0]
    out, base = io.BytesIO(), picture(1)
    if name.startswith("cut"):
        base.save(out, {"png": "PNG", "jpg": "JPEG"}[name[4:]])
        return out.getvalue()[: len(out.getvalue()) // 2]
    if name.startswith("moving"):
        frames = [picture(2), picture(3)]
        base.save(out, name[7:].upper(), save_all=True, append_images=frames)
    elif name == "deep.png":
        Image.fromarray(np.zeros((30, 40), np.uint16)).save(out, "PNG")
    elif name == "floats.tiff":
        Image.fromarray(np.zeros((30, 40), np.float32)).save(out, "TIFF")
    else:
        base.save(out, "PNG")
        data = bytearray(out.getvalue())
        data[16:24] = struct.pack(">II", 100_000, 100_000)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        return bytes(data)
    return out.getvalue()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_named_and_can_be_left_out(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = tmp_path / "in" / "class"
    folder.mkdir(parents=True)
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    (folder / name).write_bytes(bad_bytes(name))
    with pytest.raises(
        DataError, match=f"in/class/{name}: ({BAD[name][1]}).*--skip-bad N leaves out up to N"
    ) as caught:
        pack(tmp_path / "in", tmp_path / "a", image_size=16)
    assert "\n" not in str(caught.value)
    manifest = pack(tmp_path / "in", tmp_path / "b", image_size=16, skip_bad=1)
    assert (manifest.num_samples, manifest.class_counts) == (3, [3])
    assert verify(str(tmp_path / "b")) == []
    (folder / f"again-{name}").write_bytes(bad_bytes(name))
    with pytest.raises(DataError, match=rf"2 samples can't be read, --skip-bad is 1; the last: .*{name}: "):
        pack(tmp_path / "in", tmp_path / "c", image_size=16, skip_bad=1, samples_per_shard=2)
    assert pack(tmp_path / "in", tmp_path / "c", image_size=16, skip_bad=2, samples_per_shard=2).num_samples == 3
    assert not recwarn.list


def test_hidden_files_are_skipped_and_others_that_are_no_images_reported(tmp_path: Path) -> None:
    for name in ("in/a/1.png", "in/a/2.png", "in/.cache/3.png", "in/b/.thumb.png", "in/__MACOSX/a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(tmp_path / name)
    (tmp_path / "in" / "a" / "labels.csv").write_text("x")
    source = open_source(tmp_path / "in", SourceOptions(16))
    assert source.files == ["a/1.png", "a/2.png"]
    assert source.classes == ["a"]
    assert source.left_out == {".csv": 1}


def tree(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(folder / name)


def test_links_are_followed_and_those_in_a_circle_are_named(tmp_path: Path) -> None:
    tree(tmp_path, "in/cat/1.png", "in/dog/1.png", "elsewhere/owl/1.png", "elsewhere/owl/deep/2.png", "elsewhere/3.png")
    (tmp_path / "in" / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (tmp_path / "in" / "bird").symlink_to(tmp_path / "elsewhere" / "owl")  # the same folder twice is no circle
    (tmp_path / "in" / "cat" / "3.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (tmp_path / "in" / "cat" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "owl" / "self").symlink_to(".")
    source = open_source(tmp_path / "in", SourceOptions(16))
    assert source.classes == ["bird", "cat", "dog", "owl"]
    assert source.files == ["bird/1.png", "bird/deep/2.png", "cat/1.png", "cat/3.png", "dog/1.png", "owl/1.png",
                            "owl/deep/2.png"]  # fmt: skip
    assert source.notes == (f"{tmp_path}/in: 3 links to a folder above them are not followed: "
                            "bird/self, cat/up, owl/self",)  # fmt: skip
    (tmp_path / "all").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "all" / name).symlink_to(tmp_path / "in" / name)
    (tmp_path / "link").symlink_to("all")
    assert open_source(tmp_path / "link", SourceOptions(16)).classes == ["cat", "dog"]
    assert pack(tmp_path / "in", tmp_path / "out", image_size=8).class_counts == [2, 2, 1, 2]


def test_a_broken_link_is_named_and_a_picture_among_them_can_be_left_out(tmp_path: Path) -> None:
    tree(tmp_path, "in/cat/1.png", "in/dog/1.png", "in/dog/2.png")
    (tmp_path / "in" / "cat" / "0.png").symlink_to("/nowhere/9.png")
    with pytest.raises(
        DataError, match=r"in/cat/0\.png: is a broken link, to /nowhere/9\.png; .* --skip-bad N leaves out"
    ):
        pack(tmp_path / "in", tmp_path / "out", image_size=8)
    (tmp_path / "in" / "dog" / "0.png").symlink_to("0.png")
    with pytest.raises(
        DataError, match=r"2 files can't be read, --skip-bad is 1; the first: .*cat/0\.png: is a broken"
    ):
        pack(tmp_path / "in", tmp_path / "out", image_size=8, skip_bad=1)
    assert not (tmp_path / "out").exists(), "known before any picture was packed"
    assert pack(tmp_path / "in", tmp_path / "out", image_size=8, skip_bad=2).class_counts == [1, 2]
    (tmp_path / "in" / "owl").symlink_to("/nowhere/owl")
    with pytest.raises(
        DataError, match=r"in/owl: is a broken link, to /nowhere/owl; restore what it leads to, as it may"
    ):
        pack(tmp_path / "in", tmp_path / "out2", image_size=8, skip_bad=9)


@pytest.mark.parametrize("call", ["scandir", "stat"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_named(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system's own call, as root may list every folder."""
    tree(tmp_path, "in/cat/1.png", "in/secret/1.png", "in/.hidden/1.png")
    real = getattr(os, call)

    def refused(path: str, *arguments: object, **options: object) -> object:
        if str(path).endswith(("secret", "hidden")):
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, refused)
    with pytest.raises(StorageError, match=f"{tmp_path}/in/secret: (permission denied|the disk reports an error)"):
        pack(tmp_path / "in", tmp_path / "out", image_size=8)
    if call == "stat":
        for source in ("in/secret", "in/secret.npz/secret"):
            with pytest.raises(
                StorageError, match=f"{tmp_path}/{source}: (permission denied|the disk reports an error)"
            ):
                pack(tmp_path / source, tmp_path / "out", image_size=8)
    if call == "scandir":
        with pytest.raises(StorageError, match=f"{tmp_path}/in/(secret|.hidden): (permission denied|the disk reports)"):
            open_store(tmp_path / "in").list()


def test_class_folders_without_images_and_special_files_are_reported(tmp_path: Path) -> None:
    tree(tmp_path, "in/cat/1.png", "in/dog/1.png", "in/lost+found/1.png")
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "papers").mkdir()
    (tmp_path / "in" / "papers" / "a.pdf").write_text("x")
    os.mkfifo(tmp_path / "in" / "cat" / "pipe")
    source = open_source(tmp_path / "in", SourceOptions(16))
    assert (source.classes, source.left_out) == (["cat", "dog"], {".pdf": 1, "FIFO": 1})
    assert source.notes == (
        f"{tmp_path}/in: 2 files that are no images are left out (1 .pdf, 1 FIFO)",
        f"{tmp_path}/in: 2 folders hold no images and become no class: empty, papers",
    )


def test_folders_of_numbers_are_numbered_as_numbers(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / "in" / f"{number}").mkdir(parents=True)
        Image.new("L", (8, 8), 20 * number).save(tmp_path / "in" / f"{number}" / "1.png")
    source = open_source(tmp_path / "in", SourceOptions())
    assert source.classes == [str(number) for number in range(12)]
    assert source.labels is not None
    assert [int(source.read(i)[0, 0, 0]) for i in range(12)] == [20 * label for label in source.labels]


def test_images_beside_class_folders_are_not_quietly_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    picture(0).save(tmp_path / "in" / "a" / "1.png")
    picture(1).save(tmp_path / "in" / "cover.png")
    with pytest.raises(UserError, match=r"1 images are beside the folders of the classes .*cover.png.*--no-classes"):
        pack(tmp_path / "in", tmp_path / "out", image_size=16)
    manifest = pack(tmp_path / "in", tmp_path / "out", image_size=16, labelled=False)
    assert (manifest.num_samples, manifest.classes) == (2, [])


def test_channels_are_those_of_most_images_or_as_asked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        picture(i).convert("L").save(tmp_path / "in" / f"{i:02d}.png")
    picture(99).save(tmp_path / "in" / "020.png")  # not among the files that are read first
    shapes = {channels: pack(tmp_path / "in", tmp_path / f"{channels}", image_size=8, channels=channels).shape[0]
              for channels in (1, 3)}  # fmt: skip
    assert shapes == {1: 1, 3: 3}
    if open_source(tmp_path / "in", SourceOptions(8)).shape[0] == 1:
        with pytest.raises(UserError, match=r"020\.png: has colours, but the others are grey; --channels 3 packs all"):
            pack(tmp_path / "in", tmp_path / "out", image_size=8)


def test_a_folder_in_s3_packs_to_the_bytes_of_a_local_one(tmp_path: Path, s3_url: str) -> None:
    for i in range(12):
        path = tmp_path / "in" / ("cat" if i % 2 else "dog") / f"{i} ü.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
        open_store(f"{s3_url}/in").put(f"{path.parent.name}/{path.name}", path)
    for source, target in ((str(tmp_path / "in"), str(tmp_path / "out")), (f"{s3_url}/in", f"{s3_url}/out")):
        assert pack(source, target, image_size=8, samples_per_shard=5).class_counts == [6, 6]
    local, remote = open_store(tmp_path / "out"), open_store(f"{s3_url}/out")
    assert {key: local.get(key) for key, _ in local.list()} == {key: remote.get(key) for key, _ in remote.list()}


def test_a_target_in_the_source_and_a_mixture_are_refused(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="is inside the folder that is packed"):
        pack(tmp_path, tmp_path / "out", image_size=8)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds tars .*x.tar.* and images .*0.png"):
        pack(tmp_path, "elsewhere", image_size=8)


# What reads bytes from outside, on bytes that nobody would write.

QUICK = settings(max_examples=60, deadline=5000, derandomize=True)


def refusal(what: Callable[[], object]) -> str | None:
    """The one line with which `what` is refused, if it is."""
    try:
        what()
    except ScorerayError as error:
        return str(error)
    return None


def opened(name: str, data: bytes) -> None:
    """Opens `data` as a file called `name`: as a source, or refused in one line."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        said = refusal(lambda: open_source(Path(folder) / name).read(0))
        assert said is None or (name in said and "\n" not in said)


IDX = struct.pack(">HBBIII", 0, 8, 3, 2, 2, 2) + bytes(range(8))


@QUICK
@given(
    header=st.binary(max_size=24) | st.builds(lambda dims: struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims),
                                              st.lists(st.integers(0, 2**32 - 1), max_size=9)),
    body=st.binary(max_size=64), zipped=st.booleans(), cut=st.integers(0, 12),
)  # fmt: skip
def test_any_bytes_as_idx(header: bytes, body: bytes, zipped: bool, cut: int) -> None:
    data = header + body
    opened(
        "x-idx3-ubyte.gz" if zipped else "x-idx3-ubyte", gzip.compress(data)[: len(data) + 20 - cut] if zipped else data
    )


@QUICK
@given(st.lists(st.tuples(st.integers(0, len(IDX) - 1), st.integers(0, 255)), max_size=4))
def test_idx_with_other_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(IDX)
    for at, value in changes:
        data[at] = value
    opened("x-idx3-ubyte", bytes(data))


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, images=np.arange(32, dtype=np.uint8).reshape(2, 4, 4), labels=np.arange(2))
    return out.getvalue()


NPZ = npz()


@QUICK
@given(
    st.binary(max_size=64) | st.lists(st.tuples(st.integers(0, len(NPZ) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, 40),
)
def test_npz_with_other_bytes(changes: bytes | list[tuple[int, int]], cut: int) -> None:
    data = bytearray(NPZ if isinstance(changes, list) else changes)
    for at, value in changes if isinstance(changes, list) else []:
        data[at] = value
    opened("x.npz", bytes(data[: len(data) - cut]))


def test_announced_terabytes_are_refused_before_they_are_made(tmp_path: Path) -> None:
    zeros = tmp_path / "x-idx3-ubyte.gz"
    with gzip.open(zeros, "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, 1 << 20, 1 << 10, 1 << 10))
    with pytest.raises(UserError, match=r"1,099,511,627,776 bytes unpacked, half of this machine's memory"):
        open_source(zeros)
    with gzip.open(zeros, "wb") as file:  # more follows than the header says: not unpacked
        file.write(struct.pack(">HBBIII", 0, 8, 3, 2, 2, 2) + bytes(1 << 26))
    with pytest.raises(DataError, match="its length is not what its header says"):
        open_source(zeros)
    header = (
        b"\x93NUMPY\x01\x00v\x00" + str({"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)}).encode()
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", header.ljust(127) + b"\n" + bytes(64))
    with pytest.raises(DataError, match=r"no readable \.npz of plain arrays"):
        open_source(tmp_path / "x.npz")


# bytes that a file system takes: no "/" and no zero
names = st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"/", b"_").replace(b"\0", b"_")).filter(
    lambda b: b not in (b".", b"..")
)  # fmt: skip


@QUICK
@given(names | st.text(min_size=1, max_size=20).map(lambda t: t.encode(errors="ignore").replace(b"/", b"_")), names)
def test_folders_and_files_of_any_name(folder: bytes, file: bytes) -> None:
    folder = folder.replace(b"\0", b"_") or b"_"
    if folder in (b".", b".."):
        return
    with tempfile.TemporaryDirectory() as place:
        root = os.path.join(place.encode(), b"in", folder)
        os.makedirs(root)
        for i in range(2):
            with open(os.path.join(root, file + b"%d.png" % i), "wb") as out:
                picture(i, 8, 8).save(out, "PNG")
        for labelled in (True, False):
            out = f"{place}/out{labelled}"
            said = refusal(lambda out=out, labelled=labelled: pack(Path(place) / "in", out, labelled=labelled))
            if folder.startswith(b".") or file.startswith(b".") or folder == b"__MACOSX":
                assert said is not None
                assert "no images in this folder" in said
            elif said is None:
                assert read_samples(out, [0, 1]).shape == (2, 3, 8, 8)
            else:
                assert labelled, "only the name of a class can be wrong"
                assert "\n" not in said


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


def test_names_that_no_manifest_can_hold_are_refused_before_the_work_begins(tmp_path: Path) -> None:
    """File names may be of any bytes; a manifest with such a name could not be read again."""
    named = tmp_path / os.fsdecode(b"caf\xe9")
    for i in range(3):
        noise(named / f"{i}.png", i)
    with pytest.raises(UserError, match=r"--name .*caf.*: can't be the name of a data set"):
        pack(named, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pack(named, tmp_path / "out", name="cafe").num_samples == 3
    for name in ("two\nlines", "\ud800"):
        with pytest.raises(UserError, match="can't be the name of a data set"):
            pack(named, tmp_path / "other", name=name)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3):
            tar.add(named / f"{i}.png", f"{i}.png")
    (tmp_path / "tars").mkdir()
    shutil.copy(tmp_path / "x.tar", tmp_path / "tars" / os.fsdecode(b"\xe9.tar"))
    with pytest.raises(UserError, match=r"tars/.*\.tar: can't be the name of a shard; rename it"):
        pack(tmp_path / "tars", tmp_path / "tars")
    assert pack(tmp_path / "tars", tmp_path / "new", image_size=8).num_samples == 3, "new tars have names of our own"


def test_a_folder_of_pictures_is_not_packed_into_itself(tmp_path: Path) -> None:
    for i in range(3):
        noise(tmp_path / "in" / f"{i}.png", i)
    with pytest.raises(UserError, match="in: is the folder that is packed"):
        pack(tmp_path / "in", f"{tmp_path}/in/")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source, target in (("in", "link"), ("link", "in"), ("in", "link/out"), ("link", "in/out")):
        with pytest.raises(UserError, match="the folder that is packed"):
            pack(tmp_path / source, tmp_path / target)
    assert len(list((tmp_path / "in").iterdir())) == 3
