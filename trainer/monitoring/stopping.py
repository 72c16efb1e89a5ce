"""Requests to a training loop between two steps, and the two errors by which it ends early. Needs no torch.

One rank alone learns that it should save (by a signal, by a notice that its machine goes away, from the person who
started the run), but a checkpoint is of all ranks at one step: `vote.py` makes them agree.
"""

from __future__ import annotations

import enum

from scoreray.data.errors import ScorerayError


class LoopRequest(enum.IntEnum):
    """What is requested of a rank between two steps; of several requests, the greatest is done."""

    NOTHING = 0
    SAVE = 1  # save, and go on
    PREEMPT = 2  # save, and end so that the workers can be started again elsewhere
    STOP = 3  # save, and end the run for now


class Preempted(ScorerayError):
    """The state was saved and this start of the workers ends because its machines go away. Not a failure."""


class NonFiniteError(ScorerayError):
    """Loss or gradient is NaN or infinite; raised instead of the optimizer step, so nothing has been changed by it."""

    exit_status = 3
