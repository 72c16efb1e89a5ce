"""A vote of all ranks that each step carries along: what one rank was asked, all know a step later.

One number, reduced by a group of its own while the step computes, so nobody waits for it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scoreray.trainer.monitoring.stopping import Ask


class Vote:
    """Every rank calls `cast` once a step, with what it was asked; what any was asked a step earlier comes back."""

    def __init__(self, world_size: int, timeout_s: float = 1800) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world_size > 1 else None
        self._ballot = torch.zeros((), dtype=torch.int32)
        self._work: Any = None
        self._before = Ask.NOTHING

    def cast(self, ask: Ask) -> Ask:
        """The greatest ask of any rank in the step before; on one process, this step's."""
        if self._group is None:
            return ask
        result = self.close()
        self._ballot.fill_(ask)
        self._work = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return result

    def close(self, meet: bool = False) -> Ask:
        """The result of the last vote; a rank must not leave the group while one is under way. `meet`: nor before all
        ranks are here, as one that is gone ends the others."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._before = Ask(int(self._ballot))
        if meet and self._group is not None:
            dist.barrier(group=self._group)
        return self._before
