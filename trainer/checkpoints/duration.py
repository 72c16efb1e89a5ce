"""How long a run is: `duration.images`, or `duration.minutes`, of which its first steps make a number of images.

That number is decided once, before the run's first commit, and is in the config of every checkpoint. So a run that goes
on ends at the same image, by the same learning rates, whatever the speed of the machine that it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.config import Config, DurationSection
from scoreray.trainer.optim.optimizer import OptimizerConfig

PROBE_SHARE = 1 / 16  # of the time, in which the speed is measured
MAX_PROBE_S = 30.0
UNTIMED_STEPS = 2  # the first makes what later ones use again; the work of one image is measured after it. Both may
# take as long as a short run where the machine is busy, so the minutes begin after them.
FEWEST_STEPS = 4  # that are timed, where the run may wait for them
WARMUP_SHARE = 1 / 8  # of a run of minutes: its warm-up is no longer


class RunClock:
    """Rank 0's clock of a run of minutes, made just before its first step. `now`: seconds."""

    def __init__(self, minutes: float, batch_size: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._total_s, self._batch_size, self._now = 60 * minutes, batch_size, now
        self._started = self._timed_from = now()
        self._timed_steps = -UNTIMED_STEPS
        self._probe_s = min(PROBE_SHARE * self._total_s, MAX_PROBE_S)

    def images(self, images_seen: int, *, at_once: bool = False) -> int | None:
        """Called after each step: how many images the run will see, in whole batches; None while that is measured.

        `at_once`: it must be known now, by whatever was measured. Steps that are still to come take as long as those
        that were timed, or, where none was, as all so far.
        """
        now = self._now()
        self._timed_steps += 1
        if self._timed_steps <= 0:
            self._timed_from = now
        timed = self._timed_steps > 0
        step_s = (now - self._timed_from) / self._timed_steps if timed else (now - self._started) / self._steps
        left_s = max(0.0, self._timed_from + self._total_s - now)
        enough = self._timed_steps >= FEWEST_STEPS and now - self._timed_from >= self._probe_s
        if not (enough or at_once or not left_s):
            return None
        return images_seen + int(left_s / max(step_s, 1e-9)) * self._batch_size

    @property
    def _steps(self) -> int:
        return self._timed_steps + UNTIMED_STEPS

    def expected(self, images_seen: int) -> int:
        """About how many images it will be, for a person who watches."""
        return int(images_seen * max(1.0, self._total_s / max(self._now() - self._started, 1e-9)))


def with_images(config: Config, images: int) -> Config:
    """`config`, of a run of minutes, with the number of images that these are."""
    optimizer = config.optimizer
    if isinstance(optimizer, OptimizerConfig):
        optimizer = replace(optimizer, warmup_images=min(optimizer.warmup_images, int(WARMUP_SHARE * images)))
    return config.model_copy(update={"duration": DurationSection(images=images), "optimizer": optimizer})


def as_decided(config: Config, newest: Checkpoint | None) -> Config:
    """`config` with the images that a run of minutes was found to be, where its newest checkpoint says so."""
    if config.duration.minutes is None or newest is None:
        return config
    return with_images(config, newest.marker.config["duration"]["images"])


def has_ended(config: Config, newest: Checkpoint | None) -> bool:
    """Whether the run's newest checkpoint is its last."""
    if newest is None:
        return False
    total = as_decided(config, newest).duration.images
    return total is not None and newest.images_seen >= total
