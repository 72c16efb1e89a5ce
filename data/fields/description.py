"""What a run has to know of its data, packed or not."""

from __future__ import annotations

from typing import Protocol

from scoreray.data.fields.field import Field


class DataDescription(Protocol):
    """What a run has to know of its data: a packed set's `Manifest`, or, of tars without one, `UnpackedTars`."""

    @property
    def shape(self) -> list[int]:
        """Of a sample: (C, H, W) of images, any for arrays."""

    @property
    def dtype(self) -> str:
        """Of a sample's values: "uint8" of images."""

    @property
    def fields(self) -> list[Field]:
        """What a sample holds; `shape`, `dtype` and statistics are those of the one that is modelled by default."""

    @property
    def classes(self) -> list[str]:
        """Their names, by number; empty for data without classes."""

    @property
    def num_samples(self) -> int | None:
        """None where nobody has counted them."""

    @property
    def std(self) -> list[float]:
        """The standard deviation of each channel in the model's range; empty where it is not known."""

    @property
    def sigma_data(self) -> float:
        """The standard deviation of all values in the model's range."""

    @property
    def identity(self) -> str:
        """A SHA-256 that other data do not have: a run goes on only with data of the same one."""

    def channel_means(self) -> list[float]:
        """The mean of each channel in the model's range."""
