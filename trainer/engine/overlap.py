"""Gradients summed over ranks while the backward pass still computes others (Li 2020, PyTorch Distributed)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from scoreray.trainer.engine.buckets import bucket_elements


class OverlappedSum:
    """Sums the flat fp32 buffer `total` over all ranks, range by range, each as soon as its gradients are there.

    Ranges are whole parameters, taken from the last to the first, as gradients come in about that order. Every rank
    sums them in this one order, whichever is complete first, so collectives always match and the result has the same
    bits each time. A parameter that gets no gradient keeps its range, and those behind it, until `finish`.

    `parameters`: (parameter, first element in `total`), in the order in which they lie there without gaps. `collect` is
    called with a range before it is summed and brings its gradients into `total`.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[torch.nn.Parameter, int]],
        total: torch.Tensor,
        collect: Callable[[slice], None] = lambda part: None,
    ) -> None:
        self._total, self._collect = total, collect
        elements = bucket_elements(total.numel())
        self._ranges: list[slice] = []
        self._members: list[set[int]] = []
        members: set[int] = set()
        end = total.numel()
        for index in reversed(range(len(parameters))):
            parameter, start = parameters[index]
            members.add(index)
            parameter.register_post_accumulate_grad_hook(self._hook(index, len(self._ranges)))
            if end - start >= elements or index == 0:
                self._ranges.append(slice(start, end))
                self._members.append(members)
                members, end = set(), start
        self._reset()

    def begin(self) -> None:
        """The backward pass that comes now is the last one before the step."""
        self._active = True

    def finish(self) -> None:
        """Sum what was not summed yet and wait until all is there. Every rank calls it once a step."""
        while len(self._handles) < len(self._ranges):
            self._start()
        for handle in self._handles:
            handle.wait()
        self._reset()

    def _reset(self) -> None:
        self._active = False
        self._missing = [set(members) for members in self._members]
        self._handles: list[dist.Work] = []

    def _hook(self, index: int, bucket: int) -> Callable[[torch.Tensor], None]:
        return lambda _: self._arrived(index, bucket)

    def _arrived(self, index: int, bucket: int) -> None:
        if not self._active:
            return
        if bucket < len(self._handles):
            raise RuntimeError("a gradient came twice in one backward pass, the second time after it was summed")
        self._missing[bucket].discard(index)
        while len(self._handles) < len(self._ranges) and not self._missing[len(self._handles)]:
            self._start()

    def _start(self) -> None:
        part = self._ranges[len(self._handles)]
        self._collect(part)
        self._handles.append(dist.all_reduce(self._total[part], async_op=True))
