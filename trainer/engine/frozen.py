"""Parameters that are not trained (`optimizer.frozen`): no gradient, no moments, no averages, and whole in checkpoints.

A network computes with them in its precision. Checkpoints store their fp32 values, of which each rank keeps a part in
its host's memory: 4 bytes a parameter, over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from scoreray.trainer.optim.fragments import MASTER, Fragment


class FrozenParameters:
    """Of each frozen parameter of `module`, part `rank` of `num_parts` equal ones; taken before an engine casts it."""

    def __init__(self, module: torch.nn.Module, rank: int = 0, num_parts: int = 1) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._sizes = [p.numel() for p in self._parameters.values()]  # whole: ZeRO-3 empties them
        self._fragments = [_part(name, p.detach(), rank, num_parts) for name, p in self._parameters.items()]
        self._num_parts = num_parts

    def fragments(self) -> Iterator[Fragment]:
        """This rank's: masters alone."""
        return (fragment for fragment in self._fragments if fragment.length)

    def whole(self, device: torch.device) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each parameter, and all of its fp32 values [its size]; every rank goes through it."""
        for parameter, size, fragment in zip(self._parameters.values(), self._sizes, self._fragments, strict=True):
            values = fragment.tensors[MASTER]
            if self._num_parts > 1:
                parts = torch.zeros(size, device=device)
                parts[fragment.start : fragment.start + fragment.length] = values.to(device)
                dist.all_reduce(parts)  # each element is one rank's and 0 of all others: a sum that changes no bit
                values = parts
            yield parameter, values


def _part(name: str, values: torch.Tensor, rank: int, num_parts: int) -> Fragment:
    size = -(-values.numel() // num_parts)
    start = min(rank * size, values.numel())
    part = values.reshape(-1)[start : start + size].to("cpu", torch.float32, copy=True)
    return Fragment(name, start, len(part), {MASTER: part})
