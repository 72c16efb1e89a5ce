"""webdataset's decoder chain with the allowlist: each kind to its value, by the fast decoders, and pickles refused."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from scoreray.data.errors import DataError
from scoreray.data.packing.shards import encode
from scoreray.data.reading.allowlist import SampleDecoder
from scoreray.data.webdataset import SampleDecoder as exported

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def webp(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "webp", lossless=True)
    return file.getvalue()


VALUES = {
    "png": (encode(PIXELS, "png"), PIXELS),
    "seg.PNG": (encode(PIXELS[..., :1], "png"), PIXELS[..., :1]),
    "webp": (webp(PIXELS), PIXELS),
    "npy": (npy(np.arange(12, dtype=np.int16).reshape(3, 4)), np.arange(12).reshape(3, 4)),
    "emb.npy": (npy(PIXELS), PIXELS),
    "cls": (b"7\n", 7),
    "label.txt": (b"7", 7),
    "txt": ("a cat, café".encode(), "a cat, café"),
    "caption": (b"a cat", "a cat"),
    "json": (b'{"width": 64, "tags": ["a"]}', {"width": 64, "tags": ["a"]}),
    "boxes.json": (b"[1, 2.5]", [1, 2.5]),
    "mp4": (b"\0\1", b"\0\1"),
    "json.gz": (gzip.compress(b"{}"), gzip.compress(b"{}")),
    "ten": (b"no tenbin", b"no tenbin"),
}
"""kind -> (the member's bytes, what they are decoded to); of the kinds at the end, nothing is decoded."""


@pytest.mark.parametrize("kind", VALUES)
def test_each_kind_becomes_its_value(kind: str) -> None:
    data, value = VALUES[kind]
    sample = {"__key__": "a", "__url__": "0.tar", kind: data}
    decoded = next(iter(webdataset.DataPipeline(lambda: [sample], webdataset.map(exported()))))
    assert list(decoded) == ["__key__", "__url__", kind]
    assert type(decoded[kind]) is type(value)
    assert np.array_equal(decoded[kind], value)


def test_a_jpg_is_what_the_fast_decoder_makes_of_it() -> None:
    decoded = SampleDecoder()({"jpg": encode(PIXELS, "jpg")})["jpg"]
    pillow = np.asarray(Image.open(io.BytesIO(encode(PIXELS, "jpg"))))
    assert decoded.shape == PIXELS.shape
    assert np.abs(decoded.astype(int) - pillow).max() <= 2


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pkl", "pyd", "PKL", "pickle", "pth", "seg.pth", "pt"])
def test_a_pickle_is_refused_in_a_line_and_never_run(kind: str, tmp_path: Path) -> None:
    sample = {
        "__key__": "a/1",
        "__url__": "s3://b/0.tar",
        "png": VALUES["png"][0],
        kind: pickle.dumps(Bomb(tmp_path / "x")),
    }
    for decoder in (SampleDecoder(), SampleDecoder(webdataset.imagehandler("rgb8"))):
        with pytest.raises(DataError) as caught:
            decoder(sample)
        said = f"s3://b/0.tar: sample 'a/1': .{kind}: is a pickle, which can run code: not read"
        assert str(caught.value) == said
    assert not (tmp_path / "x").exists()


DAMAGED = {
    "png": (b"\x89PNG", r"is none of PNG, JPEG"),
    "jpg": (encode(PIXELS, "jpg")[:40], r"can't be decoded: "),
    "npy": (npy(np.array([{}], object), allow_pickle=True), r"an npy of plain numbers in C order"),
    "f.npy": (npy(np.asfortranarray(np.eye(3))), r"an npy of plain numbers in C order"),
    "short.npy": (npy(np.eye(3))[:-1], r"an npy of plain numbers"),
    "no.npy": (b"x" * 99, r"can't be decoded: the magic string is not correct"),
    "cls": (b"cat", r"b'cat' is no class number \(0 to 999999\)"),
    "label": (b"1000000", r"class 1000000, the limit is 999999"),
    "json": (b"{" * 100_000, r"can't be decoded: "),
    "long.json": (json.dumps("x" * (1 << 20)).encode(), r"1,048,578 bytes of JSON, the limit is 1,048,576"),
    "txt": (b"\xff\xfe", r"can't be decoded: .*utf-8"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_can_not_be_decoded_is_one_line_with_shard_sample_and_member(kind: str) -> None:
    data, why = DAMAGED[kind]
    with pytest.raises(DataError, match=rf"^0\.tar: sample 'a': \.{kind}: {why}") as caught:
        SampleDecoder()({"__key__": "a", "__url__": "0.tar", kind: data})
    assert "\n" not in str(caught.value)


def test_a_callers_handler_comes_first_and_ours_take_the_rest() -> None:
    decoder = SampleDecoder(webdataset.imagehandler("torchrgb8"), webdataset.handle_extension("mp4", len))
    decoded = decoder({"png": VALUES["png"][0], "cls": b"3", "mp4": b"abc", "__position__": 5})
    assert decoded["png"].shape == (3, 6, 5)
    assert (decoded["cls"], decoded["mp4"], decoded["__position__"]) == (3, 3, 5)


def test_a_decoder_goes_to_other_processes() -> None:
    decoded = pickle.loads(pickle.dumps(SampleDecoder()))({"cls": b"3"})
    assert decoded == {"cls": 3}
