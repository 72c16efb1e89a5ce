"""Tars that somebody else made: indexed in place, and refused by name when they are not what they should be."""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import lzma
import pickle
import random
import re
import shutil
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.fields.record_layout import RECORD, digest, record_dtype
from scoreray.data.packing.index_tars import TarsPlan, index_tar, plan_tars, tars_at
from scoreray.data.packing.pack import pack
from scoreray.data.packing.shards import encode
from scoreray.data.packing.tar_fields import images_of_shape
from scoreray.data.packing.tar_samples import TarSamples
from scoreray.data.packing.verify import verify
from scoreray.data.reading.decode import decode
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.order import RecordRange
from scoreray.data.reading.quarantine import Quarantine, Unreadable
from scoreray.data.reading.reader import Reader
from scoreray.data.reading.samples import SampleReader, read_samples
from scoreray.data.reading.stream import Stream
from scoreray.data.reading.tars import BLOCK, Tape, checksum_of
from scoreray.data.sources.field_options import FieldOption, FieldOptions
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store

RAN: list[str] = []


def image(number: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


def write_tars(folder: Path, num_tars: int = 3, each: int = 20) -> None:
    """As most people write them: with webdataset's TarWriter, which makes a PAX header a member."""
    folder.mkdir()
    for tar in range(num_tars):
        with webdataset.TarWriter(str(folder / f"train-{tar:04d}.tar")) as writer:
            for i in range(tar * each, (tar + 1) * each):
                png = encode(image(i), "png")
                writer.write({"__key__": f"a folder/{i:06d}", "png": png, "cls": i % 5, "json": {"n": i}})


@pytest.mark.parametrize("kind", ["path", "s3"])
def test_existing_webdataset_tars_are_indexed_in_place(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_tars(tmp_path / "tars")
    url = str(tmp_path / "tars")
    if kind == "s3":
        url = request.getfixturevalue("s3_url")
        for path in (tmp_path / "tars").iterdir():
            open_store(url).put(path.name, path)
    before = dict(open_store(url).list())
    manifest = pack(url, url, name="mine")
    assert before.items() < dict(open_store(url).list()).items(), "the tars are as they were"
    assert (manifest.num_samples, manifest.shape, manifest.class_counts) == (60, [3, 8, 8], [12] * 5)
    values = np.stack([image(i) for i in range(60)]) / 127.5 - 1
    assert manifest.sigma_data == pytest.approx(values.std(), rel=1e-9)
    assert manifest.mean == pytest.approx(values.mean((0, 1, 2)), rel=1e-6)
    assert verify(url) == []
    with Stream(url, global_batch_size=20, rank=0, world_size=1, seed=0) as stream:
        seen = {
            int(n): (x, int(y))
            for b in itertools.islice(stream, 3)
            for n, x, y in zip(b.index, b.images, b.labels, strict=True)
        }
    assert all(torch.equal(seen[i][0], torch.from_numpy(image(i).transpose(2, 0, 1))) for i in range(60))
    assert all(seen[i][1] == i % 5 for i in range(60))
    assert pack(url, url, name="mine") == manifest


def test_tars_are_not_copied_or_resized_in_place(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", 1)
    with pytest.raises(UserError, match="indexed in place, not copied; give it as the URL too"):
        pack(tmp_path / "tars", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="new tars need another URL than that of the tars"):
        pack(tmp_path / "tars", tmp_path / "tars", image_size=32)
    with pytest.raises(UserError, match="each tar stays one; --samples-per-shard can't be given"):
        pack(tmp_path / "tars", tmp_path / "tars", samples_per_shard=32)


class Mischief:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return RAN.append, ("code ran",)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def made(*entries: tuple, format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for entry in entries:
            add(tar, *entry)
    return out.getvalue()


PNG = encode(image(0), "png")
GOOD = [(f"{i:03d}.png", encode(image(i), "png")) for i in range(4)]
PAX = made((f"{'x' * 200}.png", PNG), format=tarfile.PAX_FORMAT)
GREY = encode(image(0)[:, :, :1], "png")


@functools.cache
def zeros() -> bytes:
    """64 MiB, deflated."""
    return zlib.compress(bytes(1 << 26), 9)


@functools.cache
def zipped() -> bytes:
    return gzip.compress(bytes(1 << 26))


def with_header(data: bytes, at: int, start: int, value: bytes) -> bytes:
    """A header at `at` changed, with its checksum corrected."""
    header = bytearray(data[at : at + 512])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def bomb() -> bytes:
    """A png of 30000 x 30000 pixels in a few kB."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    ihdr = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


NPY_OF_OBJECTS = (
    b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127)
    + b"\n"
    + pickle.dumps(Mischief())
)

HOSTILE = {
    "pickle": (made(*GOOD, ("004.png", PNG), ("004.pkl", pickle.dumps(Mischief()))), "is a pickle"),
    "pickled npy": (made(*GOOD, ("004.npy", NPY_OF_OBJECTS)), "004.npy"),
    "symlink": (made(*GOOD, ("004.png", b"", tarfile.SYMTYPE, "/etc/passwd")), "004.png' is a symbolic link"),
    "hard link": (made(*GOOD, ("004.png", b"", tarfile.LNKTYPE, "000.png")), "is a hard link"),
    "device": (made(*GOOD, ("004.png", b"", tarfile.CHRTYPE)), "is a device"),
    "parent": (made(*GOOD, ("../004.png", PNG)), "leaves the tar"),
    "absolute": (made(*GOOD, ("/etc/004.png", PNG)), "leaves the tar"),
    "no printable name": (made(*GOOD, ("0\n04.png", PNG)), "can't be a member's name"),
    "duplicate member": (made(*GOOD, GOOD[3]), "'003.png' comes twice"),
    "unsorted": (made(*GOOD, ("000.cls", b"1")), "sample '000' comes twice, or its members are not side by side"),
    "two images": (made(*GOOD, ("003.jpg", b"x")), "has two images"),
    "no image": (made(*GOOD, ("004.cls", b"1")), "sample '004' has no image"),
    "bad class": (made(*GOOD, ("003.cls", b"cat")), "is no class number"),
    "huge class": (made(*GOOD, ("003.cls", b"2000000000")), "class 2000000000, the limit"),
    "other size": (made(*GOOD, ("004.png", encode(image(4, 9), "png"))), "is 9 x 9 pixels, the first sample has 8"),
    "other type": (made(*GOOD, ("004.npy", encode(image(0).astype(np.float32), "npy"))), "is float32"),
    "bomb": (made(*GOOD, ("004.png", bomb())), "30000 x 30000 pixels, the limit is"),
    "no png": (made(*GOOD, ("004.png", b"GIF89a")), "can't be decoded|is none of PNG"),
    "huge size": (with_header(made(*GOOD), 0, 124, b"77777777777\0"), "the limit is"),
    "huge binary size": (with_header(made(*GOOD), 0, 124, b"\x80" + b"\xff" * 11), "the limit is"),
    "size past the end": (with_header(made(*GOOD), 0, 124, b"%011o\0" % 40960), "are announced"),
    "huge pax header": (with_header(PAX, 0, 124, b"%011o\0" % (1 << 20)), "an extended header of 1048576 bytes"),
    "pax length 0": (PAX[:512] + b"000" + PAX[515:], "PAX header that is not well-formed"),
    "pax length too long": (PAX[:512] + b"999" + PAX[515:], "PAX header that is not well-formed"),
    "pax upon pax": (PAX[:1024] + PAX, "a second one for the same member"),
    "cut at a member": (made(*GOOD)[: 2 * 1024], "the tar ends here, without its end marker"),
    "cut in the end": (made(*GOOD)[: 4 * 1024 + 512], "end marker is cut"),
    "empty": (made(), "holds no sample"),
    "no bytes": (b"", "byte 0: is empty"),
    "deflated": (zlib.compress(made(*GOOD)), "."),
    "gzipped": (gzip.compress(made(*GOOD)), "byte 0: is compressed"),
    "xz": (lzma.compress(made(*GOOD)), "byte 0: is compressed"),
    "more after the end": (made(*GOOD) + made(*GOOD), "more after the tar's end"),
    "text": (b"hello " * 1000, "header"),
}  # fmt: skip


def index(folder: Path, data: bytes) -> list[str]:
    """Indexes `data` as the second of two tars and reads all of it back; what verify() finds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "0.tar").write_bytes(made(*GOOD))
    (folder / "1.tar").write_bytes(data)
    plan = TarsPlan(
        str(folder),
        "x",
        [("0.tar", (folder / "0.tar").stat().st_size), ("1.tar", len(data))],
        images_of_shape((3, 8, 8), labelled=True),
    )
    started = time.process_time()
    try:
        packed = index_tar(plan, 1)
    finally:
        assert time.process_time() - started < 5
    problems = []
    for record in np.frombuffer(packed.records, RECORD):
        member = data[int(record["offset"]) :][: int(record["size"])]
        if digest(member) != int(record["digest"]):
            problems.append("digest")
        decode(member, int(record["format"]), (3, 8, 8), np.dtype("uint8"), lambda: "sample")
    return problems


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused_by_name_and_runs_nothing(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(DataError, match=message) as caught:
        index(tmp_path / "tars", data)
    assert "1.tar: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert RAN == []


def flipped(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def field_changed(data: bytes, chance: random.Random) -> bytes:
    """A header's field, with the checksum right."""
    start = chance.choice([0, 100, 124, 136, 156, 257, 345])
    value = bytes(chance.randrange(256) for _ in range(chance.randint(1, 12)))
    return with_header(data, 1024 * chance.randrange(4), start, value)


def swapped(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    i, j = (512 * chance.randrange(len(data) // 512) for _ in range(2))
    out[i : i + 512], out[j : j + 512] = data[j : j + 512], data[i : i + 512]
    return bytes(out)


def repeated(data: bytes, chance: random.Random) -> bytes:
    i = 512 * chance.randrange(len(data) // 512)
    return data[:i] + data[i : i + 512 * chance.randint(1, 4)] + data[i:]


def huge(data: bytes, chance: random.Random) -> bytes:
    size = chance.choice([b"%011o\0" % chance.randrange(1 << 20, 1 << 33), b"\x80" + chance.randbytes(11)])
    kind = with_header(data, at := 1024 * chance.randrange(4), 156, chance.choice([b"0", b"L", b"x", b"g", b"5"]))
    return with_header(kind, at, 124, size)


def with_members(*entries: tuple, at: int | None = None) -> bytes:
    """The good members with others after the `at`-th."""
    return made(*GOOD[:at], *entries, *([] if at is None else GOOD[at:]))


def bombed(data: bytes, chance: random.Random) -> bytes:
    """Much in few bytes: the tar itself, an image's pixels, its text, or more pixel data than it has room for."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    name, at = f"{chance.randrange(100, 999)}.png", chance.randrange(5)
    which = chance.randrange(5)
    if which == 0:
        return zipped()
    if which == 1:
        return with_members((name, bomb()), at=at)
    if which == 2:
        return with_members((name, zipped()), at=at)
    if which == 3:
        return with_members((name, PNG[:33] + chunk(b"zTXt", b"a\0\0" + zeros()) + PNG[33:]), at=at)
    return with_members((name, PNG[:33] + chunk(b"IDAT", zeros()) + chunk(b"IEND", b"")), at=at)


def pickled(data: bytes, chance: random.Random) -> bytes:
    code, at = pickle.dumps(Mischief()), chance.randrange(5)
    suffix = chance.choice(["pkl", "pickle", "pyd", "pth", "PKL", "png", "npy", "cls", "jpg"])
    if suffix == "npy":
        return with_members(("004.npy", NPY_OF_OBJECTS), at=at)
    return with_members((f"{chance.choice(['004', '003'])}.{suffix}", code), at=at)


def linked(data: bytes, chance: random.Random) -> bytes:
    kind = chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
    return with_members(
        ("004.png", b"", kind, chance.choice(["/etc/passwd", "../x", "000.png"])), at=chance.randrange(5)
    )


def escaping(data: bytes, chance: random.Random) -> bytes:
    name = chance.choice(["../{}.png", "/etc/{}.png", "a/../../{}.png", "..\\{}.png", "a/../{}.png", "{}/../../x.png"])
    return with_members((name.format(chance.randrange(999)), PNG), at=chance.randrange(5))


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flips": flipped,
    "cut at a block": lambda data, chance: data[: 512 * chance.randrange(1, len(data) // 512)],
    "cut elsewhere": lambda data, chance: data[: chance.randrange(len(data))],
    "header fields": field_changed,
    "blocks swapped": swapped,
    "blocks twice": repeated,
    "duplicate members": lambda data, chance: with_members(chance.choice(GOOD), at=chance.randrange(5)),
    "unsorted members": lambda data, chance: made(*chance.sample(GOOD + [(n[:3] + ".cls", b"1") for n, _ in GOOD], 8)),
    "huge headers": huge,
    "gz bombs": bombed,
    "pickles": pickled,
    "links": linked,
    "names that leave": escaping,
}
EACH = 77  # 1001 in all


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tars of the good members, indexed while they are whole."""
    folder = tmp_path_factory.mktemp("indexed")
    for name in ("0.tar", "1.tar"):
        (folder / name).write_bytes(made(*GOOD))
    pack(folder, folder)
    return str(folder)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_thousand_mutated_tars_are_refused_or_whole_and_none_takes_long(
    kind: str, indexed: str, tmp_path: Path
) -> None:
    """Each by both ways in: indexed in place, and read by the index of what it was."""
    chance, base = random.Random(kind), made(*GOOD)
    pictures = [image(i).transpose(2, 0, 1) for i in range(4)]
    refusals, quarantined = [], 0
    for case in range(EACH):
        data = MUTATIONS[kind](base, chance)
        try:
            assert index(tmp_path / "tars", data) == []
        except DataError as error:
            refusals.append(str(error))
        Path(indexed, "1.tar").write_bytes(data)
        started = time.process_time()
        found, entries = (through_stream if case % 7 == 0 else through_reader)(indexed)
        assert time.process_time() - started < 5
        for number, picture in found.items():
            assert (picture == pictures[number % 4]).all()
        assert all(entry.shard == "1.tar" for entry in entries)
        assert {entry.sample for entry in entries}.isdisjoint(found)
        assert {entry.sample for entry in entries} | set(found) == set(range(8))
        quarantined += bool(entries)
        assert RAN == []
    assert all("1.tar: " in refusal for refusal in refusals)
    all_of_them = ("duplicate members", "links", "names that leave")
    assert len(refusals) == EACH if kind in all_of_them else len(refusals) > EACH // 4
    assert quarantined > EACH // 8 or kind in ("header fields", "huge headers"), "of which nothing that counts changed"


def through_stream(url: str) -> tuple[dict[int, np.ndarray], list[Unreadable]]:
    """One epoch: pictures by number, and what is quarantined."""
    with Stream(
        url, global_batch_size=8, rank=0, world_size=1, seed=0, cache_bytes=0, quarantine=Quarantine(4)
    ) as stream:
        batch = next(stream)
    return dict(zip(batch.index.tolist(), batch.images.numpy(), strict=True)), stream.quarantined


def through_reader(url: str) -> tuple[dict[int, np.ndarray], list[Unreadable]]:
    """The same, without a stream's threads."""
    store, quarantine = open_store(url), Quarantine(4)
    reader = Reader(store, Manifest.load(store), ReadStats(), quarantine=quarantine)
    (members,), records = reader.read([RecordRange(0, 0, 4), RecordRange(1, 0, 4)])
    found = {
        number: decode(member, int(record["format"]), (3, 8, 8), np.dtype("uint8"), str).transpose(2, 0, 1)
        for number, (member, record) in enumerate(zip(members, records, strict=True))
        if member is not None
    }
    quarantine.settle(np.arange(8))
    return found, quarantine.found


def test_a_mutated_shard_of_a_packed_set_never_gives_other_images(packed: tuple[str, Manifest], tmp_path: Path) -> None:
    """With the manifest's digests every change of a member is seen; what else is in a tar is not looked at."""
    url = tmp_path / "set"
    shutil.copytree(packed[0], url)
    path = url / packed[1].shards[2].name
    base = path.read_bytes()
    numbers = list(range(128, 192))
    expected = read_samples(packed[0], numbers)
    chance = random.Random(1)
    refusals = []
    for kind in ["bit flips", "cut at a block", "blocks swapped", "blocks twice"] * 15:
        path.write_bytes(MUTATIONS[kind](base, chance))
        try:
            assert torch.equal(read_samples(str(url), numbers), expected)
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all("000002.tar: sample" in refusal for refusal in refusals)


def test_members_longer_than_the_window_and_long_names_are_read_each_byte_once_in_order() -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        entries = [(f"{'long/' * 25}{i}.png", encode(image(i, 32), "png")) for i in range(5)]
        data = made(("folder", b"", tarfile.DIRTYPE), *entries, format=format)
        windows: list[bytes] = []

        def get(start: int, end: int, data: bytes = data, windows: list[bytes] = windows) -> bytes:
            windows.append(data[start:end])
            return windows[-1]

        found = [sample.member() for sample in TarSamples(Tape(get, len(data), window_bytes=700))]
        assert [(m.name, m.data) for m in found] == entries
        assert all(data[m.offset :].startswith(m.data) for m in found)
        assert len(windows) > 5
        assert b"".join(windows) == data


def test_a_headers_checksum_is_the_sum_of_its_bytes_with_its_own_as_spaces() -> None:
    chance = np.random.default_rng(0)
    for header in (bytes(BLOCK), b"\xff" * BLOCK, chance.bytes(BLOCK), chance.bytes(BLOCK)):
        assert checksum_of(header) == sum(header[:148] + b" " * 8 + header[156:])


def test_jpg_and_grey_tars_are_recognised(tmp_path: Path) -> None:
    for name, picture, shape in [("rgb", image(1, 16), [3, 16, 16]), ("grey", image(1, 16)[:, :, :1], [1, 16, 16])]:
        (tmp_path / name).mkdir()
        data = made(*((f"{i}.jpeg", encode(np.ascontiguousarray(np.roll(picture, i, 0)), "jpg")) for i in range(3)))
        (tmp_path / name / "a.tar").write_bytes(data)
        assert pack(tmp_path / name, tmp_path / name).shape == shape
        first = Image.open(io.BytesIO(data[512 : 512 + 100_000]))
        assert (
            abs(
                np.asarray(first).astype(int)
                - read_samples(str(tmp_path / name), [0])[0].numpy().transpose(1, 2, 0).squeeze()
            ).max()
            <= 2
        )


FIELDS = FieldOptions(
    (FieldOption("latent", "latent.npy"), FieldOption("caption", "txt"), FieldOption("label", "json", "label"))
)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members_of(number: int) -> dict[str, bytes]:
    """A picture, an array, a caption and JSON with the class."""
    about = b'{"label": %d}' % number
    latent, picture = npy(np.full(3, number, np.float16)), encode(image(number), "png")
    return {"json": about, "latent.npy": latent, "png": picture, "txt": b"caption" * number}


@functools.cache
def hostile_members() -> dict[str, list[bytes]]:
    return {
        "json": [
            b"[" * 100_000, b'{"label": ' * 5000, b'{"label": NaN}', b'{"label": 1e999}', b'{"label": 2000000000}',
            b"{}", b'{"label": "\\ud800"}', b'{"label": -2}', b'{"label": 1%s}' % (b"0" * 5000), b"\xff", b"", b"null",
        ],
        "latent.npy": [
            NPY_OF_OBJECTS, npy(np.zeros(4, np.float16)), npy(np.zeros(3)), npy(np.full(3, np.inf, np.float16)), b"",
            npy(np.zeros(3, np.float16))[:-1], npy(np.zeros((3, 1), np.float16)), npy(np.zeros(3, np.float16)) + b"x",
            npy(np.zeros(3, np.float16)).replace(b"(3,), ", b"(9**9,"), npy(np.zeros(3, ">f2")), zipped(),
            npy(np.zeros(3, np.float16)).replace(b"'descr': ", b"[]: 1, (("),  # what Python's tokenizer raises
            npy(np.zeros(3, np.float16)).replace(b"'descr': '<f2'", b"[]: 1         "),  # a key that is unhashable
        ],
        "png": [bomb(), encode(image(0, 9), "png"), b"", zipped(), PNG[:-20], npy(image(0))],
        "txt": [b"\xff", b"a\xc3", bytes((1 << 20) + 1), "\ud800".encode(errors="surrogatepass")],
    }  # fmt: skip


def member_replaced(data: bytes, chance: random.Random) -> bytes:
    """A whole tar, of which one member holds what no sample should."""
    samples = [members_of(number) for number in range(4)]
    kind = chance.choice(list(hostile_members()))
    samples[chance.randrange(4)][kind] = chance.choice(hostile_members()[kind])
    return made(*((f"{i}.{kind}", value) for i, sample in enumerate(samples) for kind, value in sample.items()))


@pytest.fixture(scope="module")
def fields_indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TarsPlan, bytes]:
    """Two tars of several fields, indexed while they are whole; the plan that does so, and the bytes of each."""
    folder = tmp_path_factory.mktemp("fields")
    whole = made(*((f"{i}.{kind}", value) for i in range(4) for kind, value in members_of(i).items()))
    for name in ("0.tar", "1.tar"):
        (folder / name).write_bytes(whole)
    pack(folder, folder, fields=FIELDS)
    return plan_tars(tars_at(folder), folder, None, SourceOptions(), FIELDS), whole


@pytest.mark.parametrize("kind", [*MUTATIONS, "members"])
def test_mutated_tars_of_several_fields_are_refused_or_whole(kind: str, fields_indexed: tuple[TarsPlan, bytes]) -> None:
    """By both ways in: indexed in place, and read by the index of what it was; every second one with flipped bits."""
    (plan, base), chance, refusals, unread = fields_indexed, random.Random(kind), list[str](), list[str]()
    requests = [FieldRequest(field.name) for field in plan.fields]
    for case in range(30):
        data = MUTATIONS.get(kind, member_replaced)(base, chance)
        data = flipped(data, chance) if case % 2 and data else data
        Path(plan.url, "1.tar").write_bytes(data)
        started = time.process_time()
        try:
            packed = index_tar(replace(plan, shards=[plan.shards[0], ("1.tar", len(data))]), 1)
            records = np.frombuffer(packed.records, record_dtype(plan.fields))
            columns = (records[name].ravel().tolist() for name in ("offset", "size", "digest"))
            assert all(digest(data[at : at + size]) == expected for at, size, expected in zip(*columns, strict=True))
        except DataError as error:
            refusals.append(str(error))
        try:
            found = SampleReader(plan.url).read_fields(range(8), requests).fields
            assert found["latent"].tolist() == [[i % 4] * 3 for i in range(8)]
            assert found["label"].tolist() == [i % 4 for i in range(8)]
            assert found["image"][5:7].equal(torch.from_numpy(np.stack([image(1), image(2)]).transpose(0, 3, 1, 2)))
        except DataError as error:
            unread.append(str(error))
        assert time.process_time() - started < 5
        assert RAN == []
    assert all(re.match(r"[^\n]*1\.tar: [^\n]*$", said) for said in refusals + unread)
    assert len(refusals) > 15
    assert len(unread) > 5
