"""Optimised grids as they are stored beside a model: grids/<sampler>-<steps>.json, in a run's or a model's folder.

Sealed (`data/seal.py`). Every checkpoint of a run is drawn from on the grid of any of them: which one it was made on is
in it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from scoreray.data.errors import DataError
from scoreray.data.reading.manifest import Sha256
from scoreray.data.seal import read_sealed, sealed
from scoreray.data.storage.store import Store

FOLDER = "grids"


@dataclass(frozen=True)
class StoredGrid:
    """levels: descending, without the 0 at the end. grid: "optimised", or the named grid that was no worse.

    checkpoint, images_seen, ema, sha256: what it was made on. errors: of held-out samples, by name of grid. seed,
    samples: of the noise; the second half was held out. options: the sampler's. guidance, class_label, conditions: as
    of the request that the samples were drawn for.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    sampler: str
    steps: int
    levels: list[float]
    grid: str
    errors: dict[str, float]
    checkpoint: str
    images_seen: int
    ema: str
    sha256: Sha256
    seed: int
    samples: int
    options: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    class_label: str | int | None = None
    conditions: dict[str, str] = field(default_factory=dict)
    format: Literal[1] = 1

    @property
    def name(self) -> str:
        return f"{self.sampler.replace(':', '.')}-{self.steps}"

    @property
    def key(self) -> str:
        """Of its file, beside the model."""
        return f"{FOLDER}/{self.name}.json"

    def to_json(self) -> bytes:
        """A field a line; sealed."""
        return sealed([f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(self).items()]).encode()


def read_grids(store: Store) -> dict[str, StoredGrid | str]:
    """Those beside the model whose folder this is, by URL; of one that can't be read the reason, which concerns
    requests for an optimised grid alone. Raises StorageError."""
    found = dict[str, StoredGrid | str]()
    for key, _ in store.list(f"{FOLDER}/"):
        if key.endswith(".json"):
            url = store.url(key)
            try:
                found[url] = read_sealed(_ADAPTER, store.get(key), url, "optimised grid")
            except DataError as error:
                found[url] = str(error)
    return found


def copy_grids(source: Store, target: Store) -> None:
    """To another folder of the same model, in the place of those that an earlier export left. Raises StorageError."""
    keys = [key for key, _ in source.list(f"{FOLDER}/")]
    for key in keys:
        target.put(key, source.get(key))
    target.delete({key for key, _ in target.list(f"{FOLDER}/")} - {*keys})


_ADAPTER = TypeAdapter(StoredGrid)
