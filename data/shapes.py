"""Captioned pictures of coloured shapes, and a program that reads colour, shape and size off a picture.

    python -m scoreray.data.shapes FOLDER [--count 8000] [--side 24] [--seed 0] [--factors]

writes 00000.png, ... and metadata.jsonl with a line {"file_name": ..., "text": "a small red circle"} each, the layout
of Hugging Face's image folders; --factors adds "colour", "shape" and "size" to each, by which representations are
measured (docs/evaluation.md). So text-conditional training can be tried, and measured, without any download: what a
model draws for a caption is that shape in that colour, or it is not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 210, 40),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (0.18, 0.21), "large": (0.26, 0.3)}  # of the side: radius of a circle of the same area
BETWEEN = 0.235  # small below, large above
BACKGROUND = (15, 65)  # grey of any level in this range
SUBPIXELS = 4  # a side: edges are antialiased
FAINTEST = 40.0  # of a pixel's distance from the background in 8-bit units: less is noise
WORST_FIT = 0.25  # of a shape's own square that may be off before it is no shape at all


@dataclass(frozen=True)
class Drawing:
    """One shape: its centre and the radius of a circle of its area, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def coverage(self, side: int) -> np.ndarray:
        """How much of each pixel it covers, float64 [side, side] in [0, 1]."""
        at = (np.arange(side * SUBPIXELS) + 0.5) / SUBPIXELS
        x, y = (at[None] - self.x) / self.radius, (at[:, None] - self.y) / self.radius
        return _inside(self.shape, x, y).reshape(side, SUBPIXELS, side, SUBPIXELS).mean((1, 3))


@dataclass(frozen=True)
class Seen:
    """What a picture shows; `shape` is "" where it is none."""

    colour: str = ""
    shape: str = ""
    size: str = ""

    def matches(self, caption: str, what: str) -> bool:
        """Whether a caption says of `what` ("colour", "shape", "size") what the picture shows; True where it says
        nothing of it."""
        words = caption.lower().split()
        said = [word for word in {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[what] if word in words]
        return not said or getattr(self, what) in said


def make(folder: Path, count: int, side: int, seed: int = 0, *, factors: bool = False) -> None:
    """Writes `count` captioned pictures of side x side pixels into a new or empty folder; what `read_off` sees in
    them as columns of their own, where `factors`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as captions:
        for number in range(count):
            picture, caption = draw(rng, side)
            shown = asdict(read_off(picture)) if factors else {}
            name = f"{number:05d}.png"
            Image.fromarray(picture).save(folder / name)
            captions.write(json.dumps({"file_name": name, "text": caption, **shown}) + "\n")


def draw(rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
    """A picture uint8 [side, side, 3] and its caption; half of the captions say the size."""
    colour, shape, size = (str(rng.choice(list(words))) for words in (COLOURS, SHAPES, SIZES))
    radius = side * float(rng.uniform(*SIZES[size]))
    left, top, bottom = (radius * reach for reach in _reach(shape))
    drawing = Drawing(colour, shape, rng.uniform(left, side - left), rng.uniform(top, side - bottom), radius)
    covered = drawing.coverage(side)[..., None]
    picture = covered * np.array(COLOURS[colour]) + (1 - covered) * rng.uniform(*BACKGROUND)
    article = f"a {size}" if rng.random() < 0.5 else "a"
    return np.round(picture).astype(np.uint8), f"{article} {colour} {shape}"


def read_off(picture: np.ndarray) -> Seen:
    """Colour, shape and size in a picture uint8 [H, W, 3] of one shape on grey.

    The background is the border's median; what differs from it covers pixels in part at edges. Each shape of the same
    area about the same centre is drawn, and the one nearest by its squared error is what is seen.
    """
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    apart = pixels - np.median(border, 0)
    strength = np.linalg.norm(apart, axis=2)
    if strength.max() < 2 * FAINTEST:
        return Seen()
    core = pixels[strength > 0.8 * np.quantile(strength, 0.98)]
    mean = np.median(core, 0)
    direction = mean - np.median(border, 0)
    covered = (apart @ direction / (direction @ direction)).clip(0, 1)
    covered[strength < FAINTEST] = 0
    area = covered.sum()
    side = len(picture)
    at = np.arange(side) + 0.5
    centre = ((covered * at).sum() / area, (covered * at[:, None]).sum() / area)
    radius = math.sqrt(area / math.pi)
    errors = {
        shape: float(np.square(Drawing("", shape, *centre, radius).coverage(side) - covered).sum()) / area
        for shape in SHAPES
    }
    shape = min(errors, key=lambda name: errors[name])
    colour = min(COLOURS, key=lambda name: float(np.square(np.array(COLOURS[name]) - mean).sum()))
    return Seen(colour, shape if errors[shape] < WORST_FIT else "", "small" if radius < BETWEEN * side else "large")


class MatchesCaption:
    """Scores of samples under the captions that were requested (`--scorer scoreray.data.shapes:MatchesCaption`)."""

    def __call__(self, samples: Tensor, requested: Mapping[str, Sequence[object]]) -> dict[str, Tensor]:
        """samples uint8 [B, 3, H, W]; `requested["caption"]`: B captions. 1 where the picture is what was said."""
        seen = [read_off(picture.permute(1, 2, 0).numpy()) for picture in samples]
        pairs = list(zip(seen, map(str, requested["caption"]), strict=True))
        found = {
            what: torch.tensor([one.matches(caption, what) for one, caption in pairs], dtype=torch.float64)
            for what in ("colour", "shape", "size")
        }
        return {"colour and shape": found["colour"] * found["shape"], **found}


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape of area pi about the origin; y grows downwards."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= math.sqrt(math.pi) / 2
    height = _triangle_height()
    return (y <= height / 3) & (y + 2 / 3 * height >= math.sqrt(3) * abs(x))


def _triangle_height() -> float:
    """Of an equilateral triangle of area pi."""
    return math.sqrt(math.pi * math.sqrt(3))


def _reach(shape: str) -> tuple[float, float, float]:
    """How far a shape of area pi reaches from its centre: to either side, up and down."""
    if shape == "circle":
        return 1, 1, 1
    if shape == "square":
        return (math.sqrt(math.pi) / 2,) * 3
    height = _triangle_height()
    return height / math.sqrt(3), 2 / 3 * height, height / 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scoreray.data.shapes", description="Captioned coloured shapes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--side", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factors", action="store_true")
    given = parser.parse_args(arguments)
    make(given.folder, given.count, given.side, given.seed, factors=given.factors)


if __name__ == "__main__":
    main()
