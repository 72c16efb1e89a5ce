"""The pieces of a sharded training state, in a form that is independent of world size and ZeRO stage.

A parameter's fp32 master, its moments and its averages are flat tensors of equal length. Wherever they are
partitioned, a rank holds a contiguous run of each: a `Fragment`. A checkpoint is a set of fragments that covers
every parameter once; any other partition can be cut from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of the flattened parameter `name`.

    `tensors`: "master" and each state key, flat views [length] of the live fp32 storage: writing into them restores.
    """

    name: str
    start: int
    length: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class StoredFragment:
    """Which of a checkpoint's files stores elements [start, start + length) of a parameter."""

    name: str
    start: int
    length: int
    file: str

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


def parameter_shapes(module: torch.nn.Module, *, trained_only: bool = False) -> dict[str, list[int]]:
    """Shapes of a module's parameters, whole ones also where ZeRO-3 has left this rank a piece of each."""
    return {
        name: list(getattr(p, "ds_shape", p.shape))
        for name, p in module.named_parameters()
        if p.requires_grad or not trained_only
    }


def overlaps(start: int, length: int, stored: Iterable[StoredFragment]) -> list[tuple[StoredFragment, int, int, int]]:
    """How to fill [start, start + length): (piece, its first element to copy, where it goes, how many).

    Raises ValueError when the pieces leave a gap, as a checkpoint that is not whole would.
    """
    end, filled, copies = start + length, start, []
    for piece in sorted(stored, key=lambda piece: piece.start):
        low, high = max(filled, piece.start), min(end, piece.start + piece.length)
        if low >= high:
            continue
        if low > filled:
            break
        copies.append((piece, low - piece.start, low - start, high - low))
        filled = high
    if filled < end:
        raise ValueError(f"elements [{filled}, {end}) are in no file")
    return copies
