"""A vote of all ranks that each step carries along: a request to one rank is known to all of them some steps later.

A step sends one message a rank, of one number, at any world size. Of a sum around a ring, which is what gloo's
`all_reduce` does, messages follow one another through all ranks twice: at 1,024 they would take longer than the step
that is to hide them (docs/scaling.md).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scoreray.trainer.monitoring.stopping import LoopRequest


class Vote:
    """Every rank calls `cast` once a step with the request that it has.

    Dissemination (Hensgen, Finkel and Manber 1988): in round k a rank sends the greatest request that it knows of to
    the rank 2^k after it, so that after R = ceil(log2 world_size) rounds, one a step, all know the greatest of all, at
    the same step. A request is known R steps later, 2 R - 1 where a vote has just begun; with two ranks, one.

    `group`: of all ranks; None makes one.
    """

    def __init__(self, world_size: int, timeout_s: float = 1800, group: Any = None) -> None:
        if group is None and world_size > 1:
            # gloo also on GPUs: the ballot is in host memory, and NCCL's kernels would queue behind the step's.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._group, self._world_size = group, world_size
        self._num_rounds = (world_size - 1).bit_length()
        self._round, self._waiting = 0, LoopRequest.NOTHING  # the latter: for the next first round
        self._sent, self._received = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        self._messages: list[Any] = []

    def cast(self, request: LoopRequest) -> LoopRequest:
        """The greatest request to any rank when the last vote began, once, at the step at which all ranks know it;
        NOTHING at others. On one process, this step's."""
        if self._num_rounds == 0:
            return request
        self._waiting = max(self._waiting, request)
        self._finish_round()
        result = LoopRequest.NOTHING
        if self._round == self._num_rounds:
            result, self._round = LoopRequest(int(self._sent)), 0
        if self._round == 0:
            self._sent.fill_(self._waiting)
            self._waiting = LoopRequest.NOTHING
        rank, distance = self._group.rank(), 1 << self._round
        self._messages = [
            self._group.send([self._sent], (rank + distance) % self._world_size, 0),
            self._group.recv([self._received], (rank - distance) % self._world_size, 0),
        ]
        self._round += 1
        return result

    def close(self, meet: bool = False) -> None:
        """Finishes the round that is under way: a rank must not leave the group before.

        `meet`: wait for all ranks too. Ray Train ends the others when one worker's function returns.
        """
        self._finish_round()
        if meet and self._group is not None:
            dist.barrier(group=self._group)

    def _finish_round(self) -> None:
        messages, self._messages = self._messages, []
        for message in messages:
            message.wait()
        if messages:
            self._sent.clamp_(min=int(self._received))
