"""A plan whose shards and chunks take time and no CPU, and a log of what was begun and ended; for `scale_actors.py`.

Actors import this without torch, so that sixteen of them fit into a small machine. An item is what a call makes: a
shard, of an encoding or an evaluation a chunk.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from scoreray.data.fields.field import Field, plain_fields
from scoreray.data.packing.plan import PackedShard
from scoreray.data.reading.manifest import Shard
from scoreray.data.storage.lease import Lease
from scoreray.data.storage.store import open_store

_computing = threading.Lock()  # an evaluation's process computes one chunk while it stores another


@dataclass(frozen=True)
class Work:
    """Sleeps, with a line in `log` before and after: kind, item, process, time.

    slow: how many times as long the first process that begins takes for each; claimed by a file beside the log.
    """

    log: str
    seconds: float
    slow: float = 1.0

    def sleep(self, item: int) -> None:
        with _computing:
            self._note("begin", item)
            time.sleep(self.seconds * (self.slow if self.slow != 1 and self._is_slow() else 1))
            self._note("end", item)

    def _is_slow(self) -> bool:
        claim = Path(f"{self.log}.slow")
        with suppress(FileExistsError):
            os.write(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY), str(os.getpid()).encode())
        return claim.read_text() == str(os.getpid())

    def _note(self, kind: str, item: int) -> None:
        line = f"{kind} {item} {os.getpid()} {time.time():.4f}\n".encode()
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line)  # whole, as it is short
        os.close(file)


@dataclass(frozen=True)
class Chunk:
    shard: int
    first: int
    size: int


@dataclass
class SleepingPlan:
    """A `PackPlan` of `num_shards` shards of one sample. Its owner is checked as sampling and encoding do it."""

    url: str
    work: Work
    num_shards: int
    lease: Lease | None = None
    device: str | None = "cpu"
    name: str = "sleeping"
    origin: str = ""
    in_place: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fields: list[Field] = plain_fields((1, 8, 8), "uint8", [], [], [], [])
        self.data, self.packed = _a_shard(self.fields)
        self.sha256 = f"sleeping-{self.num_shards}"
        config = SimpleNamespace()
        self.model = SimpleNamespace(info=SimpleNamespace(config=config))  # what sampling's driver asks of a plan
        self.job = SimpleNamespace(request=SimpleNamespace(count=self.num_shards), checkpoint="none")

    def num_outside(self, numbers: Iterable[int]) -> int:
        return self.num_shards - len(list(numbers))

    def inputs(self, number: int) -> str:
        return ""

    def total_samples(self, done: list[Shard]) -> int:
        return self.num_shards

    def check_visible(self) -> None:
        pass

    def check_owner(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def make(self, number: int, scratch: Path) -> tuple[bytes, PackedShard]:
        self.check_owner()
        self.work.sleep(number)
        self.check_owner()
        return self.write(number, ())

    def chunks(self, number: int) -> list[Chunk]:
        return [Chunk(number, number, 1)]

    def read(self, chunk: Chunk) -> Mapping[str, np.ndarray]:
        return {"values": np.zeros((1, 8, 8), np.uint8)}

    def encode(self, chunk: Chunk, read: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
        self.work.sleep(chunk.shard)
        return {"values": read["values"]}

    def write(self, number: int, parts: Iterable[Any]) -> tuple[bytes, PackedShard]:
        return self.data, replace(self.packed, shard=replace(self.packed.shard, name=f"shards/{number:06d}.tar"))


def _a_shard(fields: list[Field]) -> tuple[bytes, PackedShard]:
    from scoreray.data.packing.shards import ShardWriter  # imports torch, in the driver alone

    tar = io.BytesIO()
    writer = ShardWriter(tar, fields)
    writer.add("0", {one.name: np.arange(64, dtype=np.uint8).reshape(8, 8, 1) if one.kind == "image" else -1
                     for one in fields})  # fmt: skip
    packed = writer.finish("shards/000000.tar")
    return tar.getvalue(), packed


def run_chunk(url: str, work: Work, item: int) -> int:
    """What an evaluation does with a chunk, around the computing."""
    store, key = open_store(url), f"samples/{item:06d}.npz"
    if not store.exists(key):
        work.sleep(item)
        store.put(key, b"chunk")
    return 1
