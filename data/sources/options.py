"""How the samples of a source are read: size, channels, labels, layout, as `scoreray data pack` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from scoreray.data.buckets.sizes import Bucket
from scoreray.data.errors import UserError, nearest
from scoreray.data.reading.pictures import Fitting
from scoreray.data.sources.layout import Layout


@dataclass(frozen=True)
class SourceOptions:
    """image_size: the shorter side after resizing, then cropped to a square, or the bucket that is packed; None keeps
    the size.  channels: 1 or 3; None as most images of a folder have.  labelled: subfolders, or the labels beside the
    samples, are classes.  layout: of arrays of as many axes; None finds it from their shape."""

    image_size: int | Bucket | None = None
    channels: Literal[1, 3] | None = None
    labelled: bool = True
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int) and not 1 <= self.image_size <= 8192:
            raise UserError(f"--image-size {self.image_size}: between 1 and 8192 is needed")
        if self.channels not in (None, 1, 3):
            raise UserError(f"--channels {self.channels}: 1 (grey) or 3 (RGB) is needed")
        if self.layout not in (None, *get_args(Layout)):
            raise UserError(f"--layout {self.layout}: {nearest(str(self.layout), get_args(Layout))}")

    @property
    def fitting(self) -> Fitting | None:
        """What pictures are resized and cropped to; None where they keep their size."""
        if isinstance(self.image_size, int):
            return Fitting(self.image_size, self.image_size)
        return self.image_size.fitting if self.image_size else None
