"""What a value means in a picture, an array or a mask that a request gives: one rule, and nothing is guessed."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scoreray.data.errors import ScorerayError, UserError
from scoreray.data.reading.pictures import as_array, open_picture
from scoreray.sampling.guidance.observations import parse_value_range, read_mask, read_numbers, read_observed

RGB, GREY, FIELD, POINT = (3, 8, 8), (1, 8, 8), (5, 8, 8), (4,)
BYTES = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
BYTES[0, 0], BYTES[0, 1] = 0, 255
UNIT = BYTES / 127.5 - 1  # what all of these mean for the model, channels last
TIMES_257 = BYTES.astype(np.uint16) * 257


def saved(folder: Path, array: np.ndarray, name: str = "a.npy") -> str:
    np.save(folder / name, array)
    return str(folder / name)


MEANT: dict[str, tuple[np.ndarray, str | None]] = {
    "uint8 as sample leaves it": (BYTES[None], None),
    "uint8 channels last": (BYTES, None),
    "uint8 channels first": (BYTES.transpose(2, 0, 1), None),
    "floats of the model": (UNIT.transpose(2, 0, 1), None),
    "floats of the service": (UNIT.transpose(2, 0, 1)[None].astype(np.float32), None),
    "floats channels last": (UNIT.astype(">f4"), None),
    "floats that say so": (UNIT, "-1,1"),
    "0 to 1": (BYTES / 255, "0,1"),
    "0 to 255": (BYTES.astype(np.float64), "0,255"),
    "integers": (BYTES.astype(np.int64), "0,255"),
    "uint16": (TIMES_257, "0,65535"),
    "as they are": (UNIT * 1.0, "model"),
}


@pytest.mark.parametrize("name", MEANT)
def test_a_picture_is_the_same_however_its_values_are_stored(name: str, tmp_path: Path) -> None:
    array, value_range = MEANT[name]
    found = read_observed(saved(tmp_path, array), RGB, pictures=True, value_range=value_range)
    assert np.allclose(found.permute(1, 2, 0).numpy(), UNIT, atol=1e-5)


REFUSED: dict[str, tuple[np.ndarray, dict[str, Any], str]] = {
    "0 to 1": (BYTES / 255, {}, r"float64 values from 0 to 1: .*--value-range 0,1"),
    "0 to 255": (BYTES.astype(np.float32), {}, r"values from 0 to 255: .*--value-range 0,255"),
    "black": (np.zeros((8, 8, 3)), {}, "--value-range 0,1"),
    "far out": (UNIT * 80, {}, r"values from -80 to 80: black and white are -1 and 1 here"),
    "uint16": (TIMES_257, {}, r"uint16 values from 0 to 65535: say what black and white"),
    "integers": (BYTES.astype(np.int32), {}, "say what black and white"),
    "uint8 of 0 and 1": (BYTES % 2, {}, "black and white of uint8 are 0 and 255; multiply by 255"),
    "another range than it says": (BYTES / 255, {"value_range": "0,0.2"}, "black and white are 0 and 0.2 here"),
    "a word": (UNIT, {"value_range": "white"}, "write what black and white are"),
    "a range upside down": (UNIT, {"value_range": "1,0"}, "write what black and white are"),
    "not a number": (np.where(UNIT > 0.9, np.nan, UNIT), {}, "not finite"),
    "infinite": (np.where(UNIT > 0.9, np.inf, UNIT), {}, "not finite"),
    "two pictures": (np.stack([BYTES, BYTES]), {}, r"is \[2, 8, 8, 3\], and the measurement must be \[3, 8, 8\]"),
    "another size": (BYTES[:4], {}, r"is \[4, 8, 3\]"),
    "nothing": (BYTES[:0], {}, "is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_another_convention_are_refused_with_what_was_found(name: str, tmp_path: Path) -> None:
    array, settings, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        read_observed(saved(tmp_path, array), RGB, pictures=True, **settings)


def test_the_models_own_units_are_taken_as_they_are(tmp_path: Path) -> None:
    """Of a model that was trained on floats of the shape of pictures; its checkpoint does not say in which unit."""
    found = read_observed(saved(tmp_path, UNIT * 80), RGB, pictures=True, value_range="model")
    assert np.allclose(found.permute(1, 2, 0).numpy(), UNIT * 80)


def test_noise_may_take_a_measurement_out_of_its_range(tmp_path: Path) -> None:
    url = saved(tmp_path, UNIT + np.where(UNIT > 0, 1.0, -1.0))
    with pytest.raises(UserError, match="from -2 to 2"):
        read_observed(url, RGB, pictures=True)
    assert read_observed(url, RGB, pictures=True, noise_std=0.3).abs().max() == 2


def test_a_model_of_other_values_takes_floats_as_they_are(tmp_path: Path) -> None:
    """Points and fields were trained on floats of any unit: there is no black and white."""
    point = saved(tmp_path, np.array([0.0, 300.0, -5.0, 1e4]))
    assert read_observed(point, POINT, pictures=False).tolist() == [0.0, 300.0, -5.0, 1e4]
    for array in (np.array([1, 2, 3, 4]), np.array([1, 0, 1, 1], np.uint8), np.ones(4, bool)):
        with pytest.raises(UserError, match="units of their own: give floats"):
            read_observed(saved(tmp_path, array), POINT, pictures=False)
    with pytest.raises(UserError, match="too large for float32"):
        read_observed(saved(tmp_path, np.full(4, 1e300)), POINT, pictures=False)
    with pytest.raises(UserError, match="is for pictures"):
        read_observed(point, POINT, pictures=False, value_range="0,1")
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"is a picture, and here are values of shape \[5, 8, 8\]"):
        read_observed(str(tmp_path / "a.png"), FIELD, pictures=False)
    with pytest.raises(UserError, match="a matrix is an npy"):
        read_numbers(str(tmp_path / "a.png"))


KNOWN = BYTES[..., 0] > 127


@pytest.mark.parametrize("mask", [
    KNOWN, KNOWN * np.uint8(1), KNOWN * np.uint8(255), KNOWN * 1, KNOWN * 255, KNOWN * np.uint16(65535), KNOWN * 1.0,
    KNOWN * np.float16(255), KNOWN * 2.0 - 1, KNOWN[None], KNOWN[..., None] * np.uint8(1),
    np.broadcast_to(KNOWN, RGB) * 1.0, np.repeat(KNOWN[..., None], 3, 2) * np.uint8(255),
], ids=lambda mask: f"{mask.dtype} {mask.min():g} {mask.max():g} {mask.shape}")  # fmt: skip
def test_a_mask_says_yes_and_no(mask: np.ndarray, tmp_path: Path) -> None:
    url = saved(tmp_path, mask)
    assert np.array_equal(read_mask(url, RGB).numpy(), np.broadcast_to(KNOWN, RGB))
    if mask.shape != RGB and mask.shape[-1] != 3:
        assert np.array_equal(read_mask(url, FIELD).numpy(), np.broadcast_to(KNOWN, FIELD))


@pytest.mark.parametrize(("mask", "words"), [
    (KNOWN * 0.5, "2 values from 0 to 0.5, and a mask has two"),
    (BYTES[..., 0] / 255, "from 0 to 1, and a mask has two: 0 where"),
    (BYTES[..., 0], "from 0 to 255"),
    (KNOWN * np.uint8(254), "from 0 to 254"),
    (KNOWN + np.uint8(1), "from 1 to 2"),
    (KNOWN * 2.0 - 1.5, "from -1.5 to 0.5"),
    (np.where(KNOWN, np.nan, 0), "not finite"),
    (np.zeros((8, 8)), "marks nothing as known"),
    (np.full((8, 8), 255, np.uint8), "marks all as known"),
    (KNOWN[:, :4], r"is \[8, 4\], and the mask must be \[3, 8, 8\]"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_mask_of_anything_else_is_refused(mask: np.ndarray, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_mask(saved(tmp_path, mask), RGB)


@pytest.mark.parametrize("shape", [RGB, GREY])
def test_pictures_are_read_as_they_are_packed(shape: tuple[int, ...], tmp_path: Path) -> None:
    """RGBA, palettes, CMYK and whatever else paint programs save, turned upright; greys in colour files are greys."""
    grey = Image.fromarray(BYTES[..., 0])
    images = {mode: grey.convert("RGB").convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")}
    if shape == RGB:
        images |= {f"{mode} in colours": Image.fromarray(BYTES).convert(mode) for mode in ("RGB", "RGBA", "CMYK", "P")}
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, image in images.items():
        for format in ("PNG", "TIFF", "BMP", "GIF", "WEBP"):
            file, data = tmp_path / f"x.{format.lower()}", io.BytesIO()
            try:
                image.save(data, format, **({"lossless": True} if format == "WEBP" else {"exif": exif}))
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
            file.write_bytes(data.getvalue())
            packed = as_array(open_picture(data.getvalue(), "x"), shape, None, "x", to_grey=True)
            found = read_observed(str(file), shape, pictures=True)
            assert np.allclose(found.permute(1, 2, 0).numpy(), packed / 127.5 - 1, atol=1e-6), (mode, format)
    (tmp_path / "without-suffix").write_bytes(data.getvalue())
    read_observed(str(tmp_path / "without-suffix"), shape, pictures=True)


def test_what_pack_does_not_read_is_refused_here_too(tmp_path: Path) -> None:
    Image.fromarray(BYTES).save(tmp_path / "colours.png")
    with pytest.raises(UserError, match="has colours, and one channel is wanted"):
        read_observed(str(tmp_path / "colours.png"), GREY, pictures=True)
    Image.fromarray(KNOWN * np.uint8(255)).resize((16, 16), Image.Resampling.BILINEAR).save(tmp_path / "soft.png")
    with pytest.raises(UserError, match="without soft edges"):
        read_mask(str(tmp_path / "soft.png"), (3, 16, 16))
    Image.fromarray(TIMES_257[..., 0]).save(tmp_path / "deep.png")
    with pytest.raises(ScorerayError, match=r"deep\.png"):
        read_observed(str(tmp_path / "deep.png"), GREY, pictures=True)
    with pytest.raises(UserError, match="whose range is its own"):
        read_observed(str(tmp_path / "colours.png"), RGB, pictures=True, value_range="0,1")
    np.savez(tmp_path / "two.npz", picture=BYTES, mask=KNOWN)
    with pytest.raises(UserError, match=r"holds the arrays picture, mask; .*'images'"):
        read_observed(str(tmp_path / "two.npz"), RGB, pictures=True)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """500 files with bytes changed, cut out, put in: each is read or refused in a line."""
    whole = []
    for format in ("PNG", "JPEG", "GIF", "TIFF", "BMP"):
        data = io.BytesIO()
        Image.fromarray(BYTES).save(data, format)
        whole.append((format.lower(), data.getvalue()))
    for name, write in (("npy", np.save), ("npz", np.savez)):
        data = io.BytesIO()
        write(data, UNIT)
        whole.append((name, data.getvalue()))
    random_, lines = random.Random(0), []
    for _ in range(500):
        suffix, good = random_.choice(whole)
        bytes_ = bytearray(good)
        for _ in range(random_.randint(1, 5)):
            at = random_.randrange(len(bytes_))
            end = at + random_.randint(0, 8)
            bytes_[at:end] = random_.choice((b"", random_.randbytes(random_.randint(1, 8))))
            bytes_ = bytes_ or bytearray(b"\0")
        (tmp_path / f"x.{suffix}").write_bytes(bytes_)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's and numpy's opinions on the damage
                read_observed(str(tmp_path / f"x.{suffix}"), RGB, pictures=True)
        except ScorerayError as error:
            lines.append(str(error))
    assert len(lines) > 250
    assert [line for line in lines if "\n" in line or len(line) > 400] == []


def test_ranges_as_they_are_written() -> None:
    assert parse_value_range("0,1") == (0, 1)
    assert parse_value_range("-1, 1") == (-1, 1)
    assert parse_value_range("model") is None
    for text in ("", "1", "1,2,3", "nan,1", "0,inf", "1,1", "2,1", "a,b", "0;1"):
        with pytest.raises(UserError, match="--value-range"):
            parse_value_range(text)
