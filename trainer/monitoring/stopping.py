"""What a run is asked between two steps, and the two errors by which its loop ends early. Needs no torch.

A rank learns alone that it should save (a signal, a notice that its machine goes away, a word from the person who
started the run), but a checkpoint is of all ranks at one step: `vote.py` makes them agree.
"""

from __future__ import annotations

import enum

from scoreray.data.errors import ScorerayError


class Ask(enum.IntEnum):
    """What a rank may be asked between two steps; of several, the greatest is done."""

    NOTHING = 0
    SAVE = 1  # save, and go on
    MOVE = 2  # save, and end so that the workers can be started again elsewhere
    STOP = 3  # save, and end the run for now


class Moved(ScorerayError):
    """The state was saved and this start of the workers ends because their places go away. No failure."""


class NonFiniteError(ScorerayError):
    """Loss or gradient is NaN or infinite; raised instead of the optimizer step, so nothing has been changed by it."""

    exit_status = 3
