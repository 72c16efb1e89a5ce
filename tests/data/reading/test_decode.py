"""Decoding many members at once: what decoding one by one gives, and what is not as it should be is left out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from scoreray.data.errors import DataError
from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.reading.decode import decode, decode_rows, npy_array, npy_head
from scoreray.data.reading.field_values import member_value, put_texts

UINT8 = np.dtype(np.uint8)


def png(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png", **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_are_what_one_by_one_gives(channels: int) -> None:
    """Images of every kind of content, so that every png filter and jpg table is met; formats mixed in one batch."""
    rng = np.random.default_rng(channels)
    x = np.linspace(0, 3, 20)
    images = []
    for k in range(60):
        smooth = 127 + 120 * np.sin(x[:14, None] * rng.uniform(0, 9) + x[None] * rng.uniform(0, 9))
        noise = rng.integers(0, 1 + 4 * k, (14, 20, channels))
        images.append(np.clip(smooth[..., None] + noise, 0, 255).astype(np.uint8))
    members: list[bytes | None] = []
    for k, image in enumerate(images):
        plain = image[:, :, 0] if channels == 1 else image
        if k % 3:
            members.append(png(plain, compress_level=k % 10))
        else:
            members.append(simplejpeg.encode_jpeg(image, 90, "GRAY" if channels == 1 else "RGB"))
    codes = np.array([FORMATS["png" if k % 3 else "jpg"] for k in range(60)], np.uint8)
    out = np.empty((60, 14, 20, channels), np.uint8)
    assert decode_rows(members, codes, out) == []
    for k, member in enumerate(members):
        assert member
        assert np.array_equal(out[k], decode(member, int(codes[k]), (channels, 14, 20), UINT8, str))
        if k % 3:
            assert np.array_equal(out[k], images[k])


def test_what_is_not_as_it_should_be_is_left_out() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12), np.uint8)
    good = png(image)
    deep = png(image.astype(np.uint16) * 200)
    huge = good[:16] + (1 << 30).to_bytes(4, "big") * 2 + good[24:]
    colour = png(np.stack([image] * 3, 2))
    members = [good, None, b"", good[:-30], png(image[:6]), deep, huge, colour, good]
    out = np.zeros((len(members), 12, 12, 1), np.uint8)
    assert decode_rows(members, np.full(len(members), FORMATS["png"], np.uint8), out) == [1, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(out[0, :, :, 0], image)
    assert np.array_equal(out[8, :, :, 0], image)

    def jpg(*shape: int) -> bytes:
        return simplejpeg.encode_jpeg(np.zeros((*shape, 3), np.uint8))

    members = [jpg(12, 12), jpg(12, 6), jpg(24, 6), jpg(300, 300), jpg(12, 12)[:40], None, good]
    out = np.zeros((len(members), 12, 12, 3), np.uint8)
    assert decode_rows(members, np.full(len(members), FORMATS["jpg"], np.uint8), out) == [1, 2, 3, 4, 5, 6]

    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    members = [
        npy(values),
        npy(values.astype(np.float64)),
        npy(values.T),
        npy(values)[:-4],
        npy(np.asfortranarray(values)),
    ]
    arrays = np.zeros((len(members), 3, 4), np.float32)
    assert decode_rows(members, np.full(len(members), FORMATS["npy"], np.uint8), arrays) == [1, 2, 3, 4]
    assert np.array_equal(arrays[0], values)


def test_flipped_bits_never_give_another_result_than_one_by_one() -> None:
    """1,000 damaged members (their digests would have refused them): left out, or decoded to the same array."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (12, 12), np.uint8)
    whole = {"png": png(image), "jpg": simplejpeg.encode_jpeg(image[:, :, None], 90, "GRAY")}
    for name, member in whole.items():
        members: list[bytes | None] = []
        for _ in range(500):
            data = bytearray(member)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            members.append(bytes(data))
        out = np.zeros((500, 12, 12, 1), np.uint8)
        left = set(decode_rows(members, np.full(500, FORMATS[name], np.uint8), out))
        for k, damaged in enumerate(members):
            assert damaged
            try:
                expected = decode(damaged, FORMATS[name], (1, 12, 12), UINT8, str)
            except DataError:
                assert k in left
            else:
                assert k in left or np.array_equal(out[k], expected)


@pytest.mark.parametrize("array", [np.zeros(()), np.arange(6, dtype="u1").reshape(2, 3), np.ones((0, 7), np.float16)])
def test_npy_headers_are_numpys(array: np.ndarray) -> None:
    data = npy_head(array.dtype, array.shape) + array.tobytes()
    assert data == npy(array)
    for _ in range(2):  # the second time from the headers that are known
        found = npy_array(data)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    with pytest.raises(DataError, match="as long as its header says"):
        npy_array(data + b"x")


def test_texts_put_at_once_are_those_put_one_by_one() -> None:
    """A character that is cut is refused, also where the next text would end it."""
    texts = ["", "caf\u00e9", "12345678", "\0"]
    members: list[bytes | None] = [*(text.encode() for text in texts), None, b"123456789"]
    values, lengths = np.full((6, 8), 7, np.uint8), np.full(6, 7)
    assert list(put_texts(members, 8, values, lengths)) == [4, 5]
    for text, row, length in zip(texts, values, lengths, strict=False):
        assert row.tobytes() == text.encode().ljust(8, b"\0")
        assert length == len(text.encode())
    cut: list[bytes | None] = ["1234567\u00e9".encode()[:8], "\u00e9".encode()[1:]]
    assert list(put_texts(cut, 8, values[:2], lengths[:2])) == [0, 1]
    with pytest.raises(DataError, match="is no UTF-8"):
        member_value(Field("text", "text", [8], "uint8", "txt"), b"1234567\xc3", FORMATS["txt"])
