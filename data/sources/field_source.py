"""What a pack of named fields reads: samples by number, each a mapping of the fields' names to their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Self

import numpy as np

from scoreray.data.buckets.sizes import Bucket, Size
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field

FieldValue = np.ndarray | int | float | str | bytes
"""A value of one field, by its kind:

image: uint8 [H, W, 1 or 3], or the bytes of a png or jpg that are kept as they are, for which the field's `member` is
"png" or "jpg" and which are decoded once to check them.  array, vector: in the field's shape and type.
sequence: [L, D] of its own length L, 0 too.  bfloat16: as uint16 of the same bits.
class: its number, -1 for none.  scalar: a number.  text: a str.  json: its bytes, UTF-8.
"""
Sample = Mapping[str, FieldValue]
NO_PICTURE: Size = (0, 0)
"""Of one that can't be read."""


class FieldSource(Protocol):
    """Samples with named fields that are to be packed.

    Picklable: in another process it opens what it reads again, and raises UserError where that has other contents.
    A source whose samples can't be read by number at a reasonable cost (tars) is a PackPlan of its own instead.
    """

    @property
    def path(self) -> str:
        """What messages call it; a URL or a file."""

    @property
    def num_samples(self) -> int: ...

    @property
    def fields(self) -> Sequence[Field]:
        """In the order in which a sample's members are stored. Without statistics; a class field has `classes` where
        its classes have names. The first entry of the shape of what varies in length is 1: packing finds the longest.
        """

    @property
    def fingerprint(self) -> str:
        """A digest of the contents: the same pack is recognised by it."""

    def inputs(self, numbers: Sequence[int]) -> str:
        """A digest of what these samples are read from; `fingerprint` where parts have none of their own. A shard that
        a killed pack has made is made again where it changed."""

    @property
    def runs(self) -> np.ndarray | None:
        """int64, ascending from 0: first samples of the runs that are fetched and unpacked together, through which a
        pack goes one by one; None where a sample by itself costs no more."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for a person before the pack begins: what is left out, and the --field that would take it."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Columns, arrays and files that no field reads -> how many samples have one."""

    def check_visible(self) -> None:
        """Raises UserError or DataError when this process does not see the source."""

    def check_readable(self, skip_bad: int) -> None:
        """Raises DataError where more samples are known to be unreadable than may be left out."""

    def read_all(self, numbers: Iterable[int]) -> Iterator[Sample | DataError]:
        """The samples, in order; in place of one that can't be read, or that lacks a field, why."""

    def picture_sizes(self) -> np.ndarray:
        """int32 [num_samples, 2]: width and height of each sample's picture as it is stored, NO_PICTURE of one that
        can't be read; by their headers, where these can be read alone. Raises UserError where samples have none, or
        several."""

    def in_bucket(self, bucket: Bucket) -> Self:
        """The same samples, their pictures fitted to the bucket's size."""


def as_sizes(sizes: Iterable[Size]) -> np.ndarray:
    """int32 [N, 2] of pictures' widths and heights."""
    return np.array(list(sizes), np.int32).reshape(-1, 2)


def only_picture(fields: Sequence[Field], path: str) -> Field:
    """The field whose pictures say the bucket. Raises UserError where there is none, or there are several."""
    found = [one for one in fields if one.kind == "image"]
    if len(found) != 1:
        raise UserError(
            f"--buckets: {path} has {len(found)} fields of images ({', '.join(one.name for one in found) or 'none'}); "
            "buckets are of one"
        )
    return found[0]


def in_size(fields: Sequence[Field], bucket: Bucket) -> list[Field]:
    """The fields with images of the bucket's size."""
    width, height = bucket.size
    return [replace(one, shape=[one.shape[0], height, width]) if one.kind == "image" else one for one in fields]
