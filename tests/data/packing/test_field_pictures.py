"""Arrays of any dimensions as pictures, and what is said of each field."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scoreray.data.fields.field import Field
from scoreray.data.packing.field_pictures import CURVE_HEIGHT, INK, field_pictures
from scoreray.data.packing.field_summary import FieldSummary, Lengths, _histograms, bars, field_lines
from scoreray.data.packing.inspect import CAPTION_LINES, GRID_BACKGROUND, LEAST_GAP, LINE_PIXELS, picture_grid


def test_a_grid_is_white_at_its_mean_red_above_and_blue_below() -> None:
    fields = np.zeros((2, 2, 3, 4), np.float32)
    fields[0, 0, 0, 0], fields[0, 0, 0, 1] = 1e30, -1e30
    fields[1, 0, 1, 1] = np.nan
    fields[:, 1] = 7.0
    shown = field_pictures(fields).astype(int)
    assert shown.shape == (2, 3, 3, 8), "two channels side by side, each on a scale of its own"
    red, _, blue = shown[0, :, 0, 0]
    assert red > 80 > blue
    red, _, blue = shown[0, :, 0, 1]
    assert blue > 80 > red
    assert shown[0, :, 2, 2].tolist() == shown[1, :, 1, 1].tolist() == shown[1, :, 2, 7].tolist()
    assert min(shown[0, :, 2, 2]) > 240


def test_of_a_volume_the_middle_slice_is_shown() -> None:
    volume = np.random.default_rng(0).normal(size=(2, 1, 5, 3, 4))
    assert (field_pictures(volume) == field_pictures(volume[:, :, 2])).all()


@pytest.mark.parametrize(("length", "width"), [(1, 2), (64, 64), (100_000, 256)])
def test_a_signal_is_a_curve_for_each_channel(length: int, width: int) -> None:
    wave = torch.sin(torch.linspace(0, 50, length)).expand(2, 3, length)
    shown = field_pictures(wave)
    assert shown.shape == (2, 3, 3 * CURVE_HEIGHT, width)
    ink = (shown[0] == np.array(INK)[:, None, None]).all(0)
    assert ink[:CURVE_HEIGHT].any(0).all(), "each column has a part of the curve"
    if length > 1:
        rows = np.flatnonzero(ink[:CURVE_HEIGHT].any(1))
        assert (rows[0], rows[-1]) == (0, CURVE_HEIGHT - 1) or rows[-1] - rows[0] > CURVE_HEIGHT - 6


def test_arrays_without_a_grid_are_no_pictures() -> None:
    with pytest.raises(ValueError, match="with a grid"):
        field_pictures(np.ones((2, 3)))


def test_a_gap_is_between_samples_whose_channels_stand_side_by_side() -> None:
    shown = field_pictures(np.random.default_rng(0).normal(size=(4, 4, 90, 90)))
    grid = np.asarray(picture_grid(shown, columns=2))
    background = (grid == GRID_BACKGROUND).all((0, 2))
    assert background.sum() == 3 * LEAST_GAP
    assert background[LEAST_GAP + 360 :][:LEAST_GAP].all()


def test_captions_stand_below_their_pictures() -> None:
    images = np.zeros((4, 3, 8, 8), np.uint8)
    plain, written = picture_grid(images, 2), picture_grid(images, 2, ["a red circle", "", "x" * 500, "é 漢"])
    assert written.width == plain.width
    assert written.height == plain.height + 2 * CAPTION_LINES * LINE_PIXELS
    pixels = np.asarray(written)[30 + 8 * 45 :][: CAPTION_LINES * LINE_PIXELS]  # below the first row: 45 times as large
    half = written.width // 2
    assert (pixels[:, :half] > 150).any(), "a red circle"
    assert not (pixels[:, half:] > 150).any(), "no caption"


def test_a_field_is_described_in_lines() -> None:
    text = FieldSummary(
        "caption",
        "text",
        [212],
        "uint8",
        "txt",
        "none",
        [],
        [],
        [],
        [],
        lengths=Lengths(0, 45, 90, 212),
        longest=["a cat"],
    )
    assert field_lines(text) == [
        "text [212] uint8, in .txt", "0 to 212 bytes, half have up to 45, 95% up to 90", '"a cat"',
    ]  # fmt: skip
    numbers = FieldSummary(
        "x", "array", [1, 8], "float16", "npy", "channel", [0.5], [2.0], [-1.0], [3.0], histogram=[[0, 1, 8]]
    )
    assert field_lines(numbers)[1] == "channel 0: | ▁█| mean 0.5, std 2, least -1, largest 3"
    assert bars([0, 0]) == "  "
    many = FieldSummary(
        "c", "class", [], "int64", "cls", "none", [], [], [], [], class_counts={str(i): i for i in range(20)}
    )
    assert field_lines(many)[1].endswith("15 15, ... (20 in all)")


@pytest.mark.parametrize(("low", "high"), [(2.0**63, 2.0**63), (2.0**63, 2.0**63 + 2048), (0.0, 15.0), (3.0, 3.0)])
def test_a_histogram_of_values_closer_than_its_bins(low: float, high: float) -> None:
    one = Field("x", "vector", [1], "float64", "x.npy", low=[low], high=[high])
    (counts,) = _histograms(one, torch.tensor([[low], [high]], dtype=torch.float64))
    assert sum(counts) == 2
    assert low == high or counts[0] == counts[-1] == 1
