"""Captioned shapes: what is drawn is read off again, and what is no shape is not taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoreray.data.shapes import COLOURS, SHAPES, SIZES, Drawing, MatchesCaption, Seen, draw, main, read_off


@pytest.mark.parametrize(("side", "noise"), [(16, 0), (24, 0), (24, 10)])
def test_every_shape_is_read_off_again(side: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        picture, caption = draw(rng, side)
        seen = read_off((picture + noise * rng.standard_normal(picture.shape)).clip(0, 255).astype(np.uint8))
        assert all(seen.matches(caption, what) for what in ("colour", "shape", "size")), (seen, caption)


def test_what_is_no_shape_is_not_taken_for_one() -> None:
    rng = np.random.default_rng(0)
    assert read_off(np.full((24, 24, 3), 40, np.uint8)) == Seen(), "nothing on the background"
    two = [Drawing("red", "circle", x, x, 3.5).coverage(24)[..., None] * np.array(COLOURS["red"]) for x in (6, 18)]
    assert read_off(sum(two).astype(np.uint8)).shape == "", "two circles are no circle"  # type: ignore[attr-defined]
    assert not any(read_off(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)).shape for _ in range(20)), "noise"
    half = Drawing("red", "circle", 12, 12, 6).coverage(24)[..., None] * np.array(COLOURS["red"])
    half[:, 12:] = 0
    assert read_off(half.astype(np.uint8)).shape == "", "half a circle"


def test_captions_are_compared_word_by_word() -> None:
    seen = Seen("red", "circle", "small")
    assert seen.matches("A red circle", "colour")
    assert seen.matches("a red circle", "size"), "not said"
    assert not seen.matches("a large red circle", "size")
    assert not seen.matches("a blue circle", "colour")
    assert not Seen().matches("a red circle", "shape")


def test_the_folder_is_an_image_folder_with_captions_and_its_scores_are_one(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    main([str(folder), "--count", "60", "--side", "20"])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = np.stack([np.asarray(Image.open(folder / line["file_name"])) for line in lines])
    assert pictures.shape == (60, 20, 20, 3)
    captions = [line["text"] for line in lines]
    words = {word for caption in captions for word in caption.split()}
    assert words == {"a", *COLOURS, *SHAPES, *SIZES}
    samples = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    scores = MatchesCaption()(samples, {"caption": captions})
    assert scores["colour and shape"].mean() == scores["size"].mean() == 1
    turned = MatchesCaption()(samples, {"caption": [captions[-1], *captions[:-1]]})
    assert turned["colour and shape"].mean() < 0.3
    assert torch.equal(turned["colour and shape"], turned["colour"] * turned["shape"])
