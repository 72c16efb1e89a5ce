"""New tars of existing ones: each sample fitted and encoded again, its label kept, whatever a tar's size is."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.verify import verify
from scoreray.data.reading.pictures import Fitting, fit
from scoreray.data.reading.samples import read_samples
from scoreray.data.reading.stream import Stream
from scoreray.data.storage.store import open_store


def photo(number: int) -> Image.Image:
    size = (30 + number % 7, 50 - number % 5)
    colours = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def write(path: Path, numbers: range, suffix: str = "png") -> None:
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            out = io.BytesIO()
            photo(n).save(out, {"png": "PNG", "jpg": "JPEG"}[suffix])
            for kind, data in ((suffix, out.getvalue()), ("cls", str(n % 4).encode()), ("json", b"{}")):
                info = tarfile.TarInfo(f"some folder/{n:05d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("place", ["path", "s3"])
def test_tars_are_made_into_new_ones_with_their_labels(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.tar", range(20 * i, 20 * i + 20))
    source, target = str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}-out")
    if place == "s3":
        url = request.getfixturevalue("s3_url")
        for i in range(3):
            open_store(f"{url}/in").put(f"{i}.tar", tmp_path / f"{i}.tar")
        source, target = f"{url}/in", f"{url}/out"
    manifest = pack(source, target, image_size=16)
    assert (manifest.num_samples, manifest.shape, manifest.class_counts) == (60, [3, 16, 16], [15] * 4)
    assert verify(target) == []
    for n, image in enumerate(read_samples(target, range(60)).numpy()):
        assert (image.transpose(1, 2, 0) == np.asarray(fit(photo(n), Fitting(16, 16), "photo"))).all()
    with Stream(target, global_batch_size=20, rank=0, world_size=1, seed=0) as stream:
        for batch in itertools.islice(stream, 3):
            assert (batch.labels == batch.index % 4).all()
    again = f"{target}-threads"
    pack(source, again, image_size=16, workers=3)
    one, other = open_store(target), open_store(again)
    assert {k: one.get(k) for k, _ in one.list()} == {k: other.get(k) for k, _ in other.list()}


def test_other_formats_and_channels(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", range(10), "jpg")
    out = tmp_path.parent / f"{tmp_path.name}-out"
    assert pack(tmp_path, out / "grey", image_size=8, channels=1, image_format="jpg").shape == [1, 8, 8]
    assert read_samples(str(out / "grey"), [3]).shape == (1, 1, 8, 8)
    with pytest.raises(
        UserError, match=r"a.tar: byte 4096: .*31 x 49 pixels, the first image has 30 x 50; give --image-size"
    ):
        pack(tmp_path, out / "sizes", image_format="png")


def test_a_bad_picture_in_a_tar_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", range(10))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = data.index(b"IDAT", data.index(b"00003.png"))
    data[at + 100] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    out = tmp_path.parent / f"{tmp_path.name}-out"
    with pytest.raises(DataError, match=r"a.tar: byte \d+: 'some folder/00003.png': can't be decoded"):
        pack(tmp_path, out / "a", image_size=8)
    assert pack(tmp_path, out / "b", image_size=8, skip_bad=1).class_counts == [3, 3, 2, 1]


MEMORY = """
import resource, sys
from scoreray.data.packing.pack import pack
pack(sys.argv[1], sys.argv[2] + "/warm", image_size=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack(sys.argv[3], sys.argv[2] + "/large", image_size=8)
pack(sys.argv[3], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_tar_is_not_held_in_memory(tmp_path: Path) -> None:
    """120 MB of members beside the images: neither a new tar nor the index in place takes it into memory."""
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    write(tmp_path / "small" / "a.tar", range(4))
    with tarfile.open(tmp_path / "large" / "a.tar", "w") as tar:
        for n in range(60):
            out = io.BytesIO()
            photo(0).rotate(3 * n).save(out, "PNG")
            for kind, data in (("png", out.getvalue()), ("bin", bytes(2 << 20))):
                info = tarfile.TarInfo(f"{n:05d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("small", "out", "large"))]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 60_000
