"""Decoding many pngs in a few calls gives what pyspng gives of each alone, for damaged ones too."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scoreray.data.errors import DataError
from scoreray.data.fields import png_rows as module
from scoreray.data.fields.png_rows import END, header, png_rows
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.reading.decode import decode

deflate = pytest.importorskip("deflate")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def written(height: int, width: int, channels: int, seed: int, parts: int = 1, extra: bytes = b"", **options) -> bytes:
    """A png whose lines have filters by chance, 0 to 4; every residual is allowed. parts: chunks of its pixels."""
    rng = np.random.default_rng(seed)
    lines = rng.integers(0, 256, (height, 1 + width * channels), np.uint8)
    lines[:, 0] = rng.integers(0, 5, height)
    stream = options.get("stream") or zlib.compress(options.get("lines", lines.tobytes()), int(rng.integers(0, 10)))
    cuts = [len(stream) * k // parts for k in range(parts + 1)]
    pixels = b"".join(chunk(b"IDAT", stream[i:j]) for i, j in itertools.pairwise(cuts))
    return header(height, width, channels) + extra + pixels + END


def alone(member: bytes | None, shape: tuple[int, int, int]) -> np.ndarray | None:
    """What pyspng gives of one, by the path that needs no libdeflate."""
    out = np.zeros((1, *shape), np.uint8)
    kept, module.deflate = module.deflate, None
    try:
        return out[0] if not png_rows([(0, member)], out) else None
    finally:
        module.deflate = kept


def check(members: list[bytes | None], shape: tuple[int, int, int]) -> None:
    out = np.zeros((len(members), *shape), np.uint8)
    left = png_rows(enumerate(members), out)
    for row, member in enumerate(members):
        expected = alone(member, shape)
        assert (row in left) == (expected is None)
        if expected is not None:
            assert np.array_equal(out[row], expected)


@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3])),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    seed=st.integers(0, 1 << 30),
    stack=st.sampled_from([1, 500, module.STACK_BYTES]),
)
@settings(max_examples=60, deadline=None)
def test_any_filters_of_any_lines(shape: tuple[int, int, int], parts: list[int], seed: int, stack: int) -> None:
    """Were there no line between two pictures, one's last would be above the other's first."""
    kept, module.STACK_BYTES = module.STACK_BYTES, stack
    try:
        check([written(*shape, seed + k, n) for k, n in enumerate(parts)], shape)
    finally:
        module.STACK_BYTES = kept


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_among_the_usual(channels: int) -> None:
    """Palettes, transparency, 16 bits, two levels, interlacing, other sizes and colours: left to what knows them."""
    rng = np.random.default_rng(0)
    grey, colours = (rng.integers(0, 256, (9, 7, *c), np.uint8) for c in ((), (3,)))
    kinds: list[bytes | None] = [None, b"", b"\x89PNG"]
    for image in (
        Image.fromarray(grey), Image.fromarray(colours), Image.fromarray(grey).convert("1"),
        Image.fromarray(grey).convert("LA"), Image.fromarray(colours).convert("RGBA"),
        Image.fromarray(colours).convert("P"), Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey[:8]), Image.fromarray(colours[:, :6]),
    ):  # fmt: skip
        file = io.BytesIO()
        image.save(file, "png")
        kinds.append(file.getvalue())
    usual = [written(9, 7, channels, seed) for seed in range(len(kinds))]
    interlaced = bytearray(usual[0])
    interlaced[28] = 1
    interlaced[29:33] = struct.pack(">I", zlib.crc32(interlaced[12:29]))
    text = written(9, 7, channels, 1, extra=chunk(b"tEXt", b"a\0b"))
    check([m for pair in zip(kinds, usual, strict=True) for m in pair] + [bytes(interlaced), text], (9, 7, channels))


def test_streams_that_only_one_of_the_decoders_takes() -> None:
    """libspng looks at no checksum of the stream, nor behind the last line; it is its word that counts."""
    good = written(6, 5, 1, 0)
    stream, lines = good[41:-16], zlib.decompress(good[41:-16])
    check(
        [
            good,
            written(6, 5, 1, 0, stream=stream[:-1] + bytes([stream[-1] ^ 1])),
            written(6, 5, 1, 0, stream=stream + b"more"),
            written(6, 5, 1, 0, stream=stream[:-6]),
            written(6, 5, 1, 0, lines=lines + bytes(6)),
            written(6, 5, 1, 0, lines=lines[:-6]),
            written(6, 5, 1, 0, lines=lines[:-1]),
            written(6, 5, 1, 0, lines=b"\5" + lines[1:]),
            good[:-13] + bytes([good[-13] ^ 1]) + good[-12:],
            good[:-12],
            good + b"more",
            written(6, 5, 1, 1),
        ],
        (6, 5, 1),
    )


def error_of(member: bytes, channels: int) -> str:
    try:
        decode(member, FORMATS["png"], (channels, 6, 5), np.dtype(np.uint8), lambda: "sample 1")
    except DataError as error:
        return str(error)
    return ""


@given(data=st.data(), seed=st.integers(0, 1 << 30), parts=st.integers(1, 3), channels=st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None)
def test_damaged_bytes(data: st.DataObject, seed: int, parts: int, channels: int) -> None:
    """Flipped, cut and added bytes, among good ones; a row that is left out is one that decode() names."""
    good = [written(6, 5, channels, seed + k, parts) for k in range(4)]
    bad = bytearray(good[1])
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(0, len(bad)) | st.just(len(bad)))
    member = bytes(bad[:end]) + data.draw(st.binary(max_size=3))
    members = [good[0], member, *good[2:]]
    check([*members], (6, 5, channels))
    out = np.zeros((4, 6, 5, channels), np.uint8)
    if png_rows(enumerate(members), out):
        error = error_of(member, channels)
        assert not error or error.startswith("sample 1: ")


def test_a_line_without_a_filter_costs_its_neighbours_nothing() -> None:
    """One picture of a stack is bad: the others are decoded, alone."""
    lines = bytearray(zlib.decompress(written(6, 5, 1, 0)[41:-16]))
    lines[12] = 9
    members = [written(6, 5, 1, 0), written(6, 5, 1, 0, lines=bytes(lines)), written(6, 5, 1, 2)]
    out = np.zeros((3, 6, 5, 1), np.uint8)
    assert png_rows(enumerate(members), out) == [1]
    check([*members], (6, 5, 1))


def test_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand small pictures are not a thousand calls of the decoder."""
    calls = 0

    class Counted:
        class c:
            SPNG_FMT_G8 = module.pyspng.c.SPNG_FMT_G8

            @staticmethod
            def spng_decode_image_bytes(*arguments: object) -> np.ndarray:
                nonlocal calls
                calls += 1
                return real.c.spng_decode_image_bytes(*arguments)

    real = module.pyspng
    monkeypatch.setattr(module, "pyspng", Counted)
    members = [written(28, 28, 1, seed) for seed in range(200)] * 5
    out = np.empty((1000, 28, 28, 1), np.uint8)
    assert png_rows(enumerate(members), out) == []
    assert calls == -(-1000 // (module.STACK_BYTES // (28 * 29)))
    large = np.empty((3, 300, 300, 1), np.uint8)
    calls = 0
    assert png_rows(enumerate([written(300, 300, 1, seed) for seed in range(3)]), large) == []
    assert calls == 3
