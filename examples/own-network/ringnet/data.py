"""A data source: `scoreray data pack ringnet.data:Rings OUT` makes a data set of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scoreray.data.fields.field import Field


@dataclass(frozen=True)
class Rings:
    """Points on rings around 0, in turn; the ring's number is the class. Its keys: `--option count=512`."""

    count: int = 256
    radii: tuple[float, ...] = (0.5, 1.0)
    spread: float = 0.02

    @property
    def fields(self) -> list[Field]:
        """In the order in which they are stored; each sample is a mapping with these names."""
        names = [f"radius {radius:g}" for radius in self.radii]
        return [
            Field("array", "array", [2], "float32", ""),
            Field("label", "class", [], "int64", "", classes=names, class_counts=[0] * len(names)),
        ]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, np.ndarray | int]:
        """A function of the number alone, so that every process makes the same."""
        rng, ring = np.random.default_rng(number), number % len(self.radii)
        angle, radius = rng.uniform(0, 2 * np.pi), self.radii[ring] + self.spread * rng.standard_normal()
        return {"array": np.array([radius * np.cos(angle), radius * np.sin(angle)], np.float32), "label": ring}
