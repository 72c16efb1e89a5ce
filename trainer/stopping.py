"""How the ranks of a run agree to save now, when one of them has been told to end, to move or only to save.

A rank learns of it alone (a signal, a notice that its machine goes away, a word from the person who started the run),
but a checkpoint is of all ranks at one step. Each step carries a vote along: one number, reduced by a group of its own
while the step computes, so nobody waits for it. What any rank asked during a step, all know after the next.
"""

from __future__ import annotations

import enum
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scoreray.data.errors import ScorerayError


class Ask(enum.IntEnum):
    """What a rank may be asked between two steps; of several, the greatest is done."""

    NOTHING = 0
    SAVE = 1  # save, and go on
    MOVE = 2  # save, and end so that the workers can be started again elsewhere
    STOP = 3  # save, and end the run for now


class Moved(ScorerayError):
    """The state was saved and this start of the workers ends because their places go away. No failure."""


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
