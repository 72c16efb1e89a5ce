"""What is recognised as a plain png or jpg from its chunks or segments alone is what Pillow finds to be one."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scoreray.data.errors import DataError
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.packing.shards import encode
from scoreray.data.reading import pictures
from scoreray.data.reading.decode import decode_as_found
from scoreray.data.reading.pictures import plain_format

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
RGB = Image.fromarray(PIXELS)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    return exif


def texts() -> PngInfo:
    info = PngInfo()
    info.add_text("comment", "eXIf")
    return info


PLAIN = {
    "png, ours": encode(PIXELS, "png"),
    "jpg, ours": encode(PIXELS, "jpg"),
    "grey png": saved(RGB.convert("L"), "PNG"),
    "grey jpg": saved(RGB.convert("L"), "JPEG"),
    "progressive jpg": saved(RGB, "JPEG", progressive=True, optimize=True),
    "jpg with a density and a comment": saved(RGB, "JPEG", dpi=(72, 72), comment=b"hello"),
    "png with a density": saved(RGB, "PNG", dpi=(72, 72)),
}
OTHERS = {
    "turned jpg": saved(RGB, "JPEG", exif=turned()),
    "turned png": saved(RGB, "PNG", exif=turned()),
    "CMYK jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "palette png": saved(RGB.convert("P"), "PNG"),
    "png with transparency": saved(RGB, "PNG", transparency=(0, 0, 0)),
    "png with alpha": saved(RGB.convert("RGBA"), "PNG"),
    "16-bit png": saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16)), "PNG"),
    "png with text": saved(RGB, "PNG", pnginfo=texts()),
    "animation": saved(RGB, "PNG", save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)]),
    "gif": saved(RGB.convert("P"), "GIF"),
    "nothing": b"",
}


@pytest.fixture
def pillow_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], str | None]:
    def found(data: bytes) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_usual_format", lambda data: None)
            return plain_format(data)

    return found


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_a_look_at_the_chunks_finds_what_pillow_does(name: str, pillow_alone: Callable[[bytes], str | None]) -> None:
    data = (PLAIN | OTHERS)[name]
    usual = pictures._usual_format(data)
    assert usual in ((None,) if name in OTHERS else ("png", "jpg"))
    assert plain_format(data) == pillow_alone(data)


@pytest.mark.parametrize("name", ["png, ours", "jpg, ours", "progressive jpg"])
def test_a_damaged_file_is_found_plain_only_where_pillow_finds_it_so_or_the_decoder_refuses_it(
    name: str, pillow_alone: Callable[[bytes], str | None]
) -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = bytearray(PLAIN[name])
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        damaged = bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        usual = pictures._usual_format(damaged)
        if usual and usual != pillow_alone(damaged):
            with pytest.raises(DataError):
                decode_as_found(damaged, FORMATS[usual])
