"""A vote of all ranks that each step carries along: a request to one rank is known to all of them a step later.

The vote is one number, reduced by a process group of its own while the step computes, so no rank waits for it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scoreray.trainer.monitoring.stopping import LoopRequest


class Vote:
    """Every rank calls `cast` once a step with the request that it has; returns the greatest one of the step before."""

    def __init__(self, world_size: int, timeout_s: float = 1800) -> None:
        # gloo also on GPUs: the ballot is in host memory, and NCCL's kernels would queue behind the step's.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world_size > 1 else None
        self._ballot = torch.zeros((), dtype=torch.int32)
        self._reduction: Any = None
        self._before = LoopRequest.NOTHING

    def cast(self, request: LoopRequest) -> LoopRequest:
        """The greatest request to any rank in the step before; on one process, this step's."""
        if self._group is None:
            return request
        result = self.close()
        self._ballot.fill_(request)
        self._reduction = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return result

    def close(self, meet: bool = False) -> LoopRequest:
        """The result of the last vote; a rank must not leave the group while one is under way.

        `meet`: wait for all ranks too. Ray Train ends the others when one worker's function returns.
        """
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
            self._before = LoopRequest(int(self._ballot))
        if meet and self._group is not None:
            dist.barrier(group=self._group)
        return self._before
