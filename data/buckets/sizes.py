"""Sizes of about equal area for pictures of many aspect ratios, and which of them a picture goes to.

As NovelAI (2022) and SDXL (Podell 2023, appendix I) train: every picture is resized to cover the size that is nearest
to its own aspect ratio, and cropped at its centre, so that little is cut off and a batch has one size.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scoreray.data.errors import UserError
from scoreray.data.reading.pictures import Fitting

Size = tuple[int, int]
"""(width, height) in pixels."""
MOST_BUCKETS = 64
MOST_PIXELS = 8192  # along a side
MAX_ENLARGE = 2.0


@dataclass(frozen=True)
class Bucket:
    """One of the `sizes` that a data set is packed in, which are sorted by `sorted_sizes`.

    max_enlarge: a picture that had to be enlarged more to cover its size is treated as one that can't be read.
    """

    sizes: tuple[Size, ...]
    number: int
    max_enlarge: float = MAX_ENLARGE

    @property
    def size(self) -> Size:
        return self.sizes[self.number]

    @property
    def folder(self) -> str:
        """Of its data set: "48x80"."""
        return size_text(self.size)

    @property
    def fitting(self) -> Fitting:
        return Fitting(*self.size, self.max_enlarge)

    def takes(self, picture: Size) -> bool:
        """Whether a picture of this width and height goes here."""
        return bucket_of(self.sizes, picture) == self.number


def bucket_of(sizes: Sequence[Size], picture: Size) -> int:
    """The number of the size that is nearest in aspect ratio, by the ratio's logarithm; the narrower of two as near.

    Compared in whole numbers: w/h is below the geometric mean of two neighbours' ratios where (w/h)^2 is below their
    product. So a picture goes to the same size on every machine.
    """
    w, h = picture
    between = itertools.pairwise(sizes)
    return sum(w * w * h1 * h2 > h * h * w1 * w2 for (w1, h1), (w2, h2) in between)


def sorted_sizes(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """From narrow to wide. Raises UserError where one can't be taken."""
    found = tuple(sorted(sizes, key=lambda size: size[0] / size[1]))
    if not 1 <= len(found) <= MOST_BUCKETS:
        raise UserError(f"--buckets: {len(found)} sizes; 1 to {MOST_BUCKETS} are accepted")
    for size in found:
        if not all(1 <= side <= MOST_PIXELS for side in size):
            raise UserError(f"--buckets {size_text(size)}: sides of 1 to {MOST_PIXELS} pixels are accepted")
    for one, other in itertools.pairwise(found):
        if one[0] * other[1] == other[0] * one[1]:
            raise UserError(
                f"--buckets {size_text(one)},{size_text(other)}: both have the same aspect ratio, so no picture would "
                "go to one of them; leave one out"
            )
    return found


def usual_sizes(side: int, aspect_max: float, multiple: int) -> list[Size]:
    """Sizes of at most side^2 pixels whose sides are multiples of `multiple`, up to `aspect_max` : 1, as SDXL's are:
    for every shorter side the longest longer one. Raises UserError."""
    if multiple < 1 or side % multiple or side < multiple:
        raise UserError(f"--buckets {side}: must be a multiple of --multiple {multiple}")
    if aspect_max < 1:
        raise UserError(f"--aspect-max {aspect_max:g}: 1 or more is needed (2 takes pictures up to 2:1 and 1:2)")
    found: list[Size] = []
    for short in range(side, 0, -multiple):
        long = side * side // short // multiple * multiple
        if long > aspect_max * short:
            break
        found += [(long, short), (short, long)] if long > short else [(long, short)]
    return found


def parse_buckets(text: str, aspect_max: float = 2.0, multiple: int = 64) -> tuple[Size, ...]:
    """Sizes from the command line: 64x64,48x80 (width x height), or the side of a square, 512, for `usual_sizes`.
    Raises UserError."""
    if re.fullmatch(r"[0-9]{1,5}", text):
        return sorted_sizes(usual_sizes(int(text), aspect_max, multiple))
    return sorted_sizes([parse_size(part, "--buckets") for part in text.split(",")])


def parse_size(text: str, option: str) -> Size:
    """48x80: (width, height). Raises UserError, which begins with the option."""
    if not (match := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.strip())):
        raise UserError(f"{option} {text}: WIDTHxHEIGHT is needed, such as 48x80")
    return int(match[1]), int(match[2])


def size_text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
