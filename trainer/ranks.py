"""Values and tensors between the ranks of a run, by torch's default process group; a single rank sends nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(value: T, world_size: int) -> T:
    """Rank 0's value on every rank; every rank calls it."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def tensors_from_rank_0(tensors: Iterable[torch.Tensor], world_size: int, device: torch.device) -> None:
    """Writes rank 0's values into the same tensors of every rank, by way of `device`; every rank calls it."""
    for tensor in tensors if world_size > 1 else ():
        values = tensor.to(device)
        dist.broadcast(values, src=0)
        if values is not tensor:
            tensor.copy_(values)


def from_all_ranks(values: list[T], world_size: int) -> list[T]:
    """The values of rank 0, then those of rank 1, ...; every rank calls it."""
    if world_size == 1:
        return values
    everyones: list[Any] = [None] * world_size
    dist.all_gather_object(everyones, values)
    return [value for of_rank in everyones for value in of_rank]
