"""Progress on the terminal: bars with rate and time left; in a log, a line now and then.

Whatever takes longer than two seconds is under one of these: `TrainLine`, `bar`, `counted`, or `waiting` where nothing
can be counted. NO_COLOR is honoured by rich.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from scoreray.data.errors import printable

if TYPE_CHECKING:
    from scoreray.trainer.monitoring.metrics import TrainingProgress, TrainingRecord

QUIET_LINE_EVERY_S = 10.0
SOON_S = 2.0  # after which somebody who looks on wants to know what is being waited for

console = Console(stderr=True, highlight=False)
_plain = False
_opening: contextlib.ExitStack | None = None  # what runs until the first line


def use_plain_lines() -> None:
    """`--plain`: from here on lines with their time (UTC), without colour, bars or cursor movement, on any terminal."""
    global console, _plain
    console = Console(stderr=True, highlight=False, force_terminal=False, color_system=None)
    _plain = True


def say(text: str) -> None:
    """A line on stderr, beside the progress bars."""
    _end_opening()
    _print_line(printable(text, keep="\n\t"))


def _print_line(text: str) -> None:
    """With its time (UTC) where lines are plain."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) if _plain else ""
    console.print(at + text, markup=False, soft_wrap=True)


@contextmanager
def opening() -> Iterator[None]:
    """Around a whole command: until its first line, that it is loading. Not in a log, which asks for no such line."""
    global _opening
    if not console.is_terminal and not _plain:
        yield
        return
    _opening = contextlib.ExitStack()
    try:
        _opening.enter_context(_ticking(lambda: "loading packages and reading what the command names"))
        yield
    finally:
        _end_opening()


def _end_opening() -> None:
    global _opening
    ended, _opening = _opening, None
    if ended is not None:
        ended.close()


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Around a step that can't say how far it is: what is waited for, and for how long so far.

    Yields a function that says what is waited for from then on.
    """
    _end_opening()
    now = [what]

    def change(what: str) -> None:
        now[0] = what
        if console.is_terminal:
            progress.update(task, description=what)
        else:
            lines.restart(_soon_s())

    if not console.is_terminal:
        with _ticking(lambda: now[0]) as lines:
            yield change
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield change


class _Ticker:
    """In a log: `line()` and how long it has been, first after `first_s`, then now and then."""

    def __init__(self, line: Callable[[], str], first_s: float) -> None:
        self._line, self._over, self._changed = line, False, threading.Condition()
        self.restart(first_s)
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> _Ticker:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def restart(self, first_s: float) -> None:
        """What it says has changed: it is silent again for `first_s`."""
        with self._changed:
            self._started = time.monotonic()
            self._next = self._started + first_s
            self._changed.notify()

    def _tick(self) -> None:
        with self._changed:
            while not self._over:
                now = time.monotonic()
                if now < self._next:
                    self._changed.wait(self._next - now)
                    continue
                self._next = now + QUIET_LINE_EVERY_S
                _print_line(f"{printable(self._line())}: {now - self._started:,.0f} s so far")


def _ticking(line: Callable[[], str]) -> _Ticker:
    return _Ticker(line, _soon_s())


def _soon_s() -> float:
    return SOON_S if _plain or console.is_terminal else QUIET_LINE_EVERY_S


class TrainLine:
    """The progress of a training run; a bar on a terminal, a line now and then in a log.

    then: images whose training takes as long as what comes after it; they are in the time left.
    """

    def __init__(self, total: int, then: float = 0.0) -> None:
        self._terminal, self._then = console.is_terminal, then
        self._last_line = self._last_step = time.monotonic()
        self._patience_s = QUIET_LINE_EVERY_S  # until a step that does not come is worth a word
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("train"),
            BarColumn(bar_width=None if console.width > 100 else 8),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _Live(lambda task: self._facts(task) + self._waited()),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("train", total=total, facts="")
        self._committed, self._ended = 0, False
        self._still = _ticking(self._state)
        self._progress: TrainingProgress | None = None
        self._record: TrainingRecord | None = None
        self._tabled: TrainingRecord | None = None

    def __enter__(self) -> TrainLine:
        _end_opening()
        self._bar.start()
        if not self._terminal:
            self._still.restart(_soon_s())
            self._still.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._terminal:
            self._still.__exit__(*exc)
        self._bar.stop()
        if self._terminal and self._record is not None and self._record != self._tabled:
            console.print(sigma_table(self._record))

    def __call__(self, progress: TrainingProgress) -> None:
        before, self._progress = self._progress, progress
        now, ended = time.monotonic(), progress.images >= progress.total
        if before is not None and progress.images != before.images:
            self._patience_s = max(QUIET_LINE_EVERY_S, 3 * (now - self._last_step))
        self._last_step = now
        done = min(progress.images, progress.total)  # the last batch may pass the end
        self._bar.update(self._task, total=progress.total, completed=done)  # the total of minutes changes
        if progress.record is not None:
            self._record = progress.record
            if self._terminal and progress.committed > self._committed and progress.images < progress.total:
                console.print(sigma_table(progress.record))
                self._tabled = progress.record
        self._committed = progress.committed
        if not self._terminal:
            self._still.restart(_soon_s() if ended else self._patience_s)
        if not self._terminal and not self._ended and (now - self._last_line > QUIET_LINE_EVERY_S or ended):
            self._last_line, self._ended = now, ended
            say(f"train {done:,}/{progress.total:,} images  {self._facts()}{self._left(progress)}")

    def _state(self) -> str:
        """What is waited for where no step comes."""
        if self._progress is None:
            return "train: starting workers, and the first step"
        if self._progress.images >= self._progress.total:
            return "train: the last checkpoint is written, and the workers end"
        return f"train {self._progress.images:,}/{self._progress.total:,} images, no further step"

    def _facts(self, task: Task | None = None) -> str:
        progress = self._progress
        if progress is None:
            return f"{self._state().partition(': ')[2]}: {task.elapsed or 0:,.0f} s so far" if task else ""
        rate = "" if math.isnan(progress.images_per_s) else f"{progress.images_per_s:,.0f} img/s"
        return f"loss {progress.loss:.4f}  {rate}  data stall {progress.data_stall:.0%}"

    def _waited(self) -> str:
        """On a terminal: for how long nothing has come, where that is long or is the end."""
        if self._progress is None:
            return ""
        waited_s, ended = time.monotonic() - self._last_step, self._progress.images >= self._progress.total
        if waited_s < (SOON_S if ended else self._patience_s):
            return ""
        return f"  {'last checkpoint, end of workers' if ended else 'no further step'}: {waited_s:,.0f} s so far"

    def _left(self, progress: TrainingProgress) -> str:
        if not progress.images_per_s > 0:
            return ""
        left = max(0, progress.total - progress.images)
        text = f"  {left / progress.images_per_s:,.0f} s left"
        then_s = self._then / progress.images_per_s
        return f"{text}, {left / progress.images_per_s + then_s:,.0f} s with what comes after" if then_s else text


def sigma_table(record: TrainingRecord) -> Table:
    """The weighted loss by noise level, as of one record."""
    table = Table(title=f"loss by noise level at {record.images:,} images", title_justify="left", box=None)
    table.add_column("sigma", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("")
    losses = record.sigma_losses_by_label()
    most = max(losses.values(), default=0.0)
    for label, loss in losses.items():
        table.add_row(label, f"{loss:.4f}", "\u2588" * round(24 * loss / most) if most > 0 else "")
    return table


class _Live(ProgressColumn):
    """What a function says of a task, each time that the line is drawn."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task))


@contextmanager
def bar(name: str, total: int, unit: str, first: str = "") -> Iterator[Callable[[int], None]]:
    """A bar for work that reports how much more is done. first: what is waited for until then."""
    with _progress(name, total, unit, first) as progress:
        yield lambda n: progress.advance(progress.task_ids[0], n)


@contextmanager
def counted(name: str, unit: str, first: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, total) itself. first: what is waited for until then."""
    with _progress(name, None, unit, first) as progress:
        yield lambda done, total: progress.update(progress.task_ids[0], completed=done, total=total)


@contextmanager
def _progress(name: str, total: int | None, unit: str, first: str) -> Iterator[Progress]:
    _end_opening()
    first = first or ("under way" if total == 1 else f"the first {unit}")
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        _Live(
            lambda task: (
                _in_words(unit, first, task) + ("" if task.completed else f": {task.elapsed or 0:,.0f} s so far")
            )
        ),
        console=console,
        disable=not console.is_terminal,
        transient=not sys.stderr.isatty(),
    )
    progress.add_task(name, total=total)
    lines = _ticking(lambda: f"{name} {_in_words(unit, first, progress.tasks[0])}")
    with contextlib.ExitStack() as stack:
        if not console.is_terminal:
            stack.enter_context(lines)
        stack.enter_context(progress)
        yield progress
    if not console.is_terminal:
        task = progress.tasks[0]
        say(f"{name}: {task.completed:,.0f} {unit} in {task.elapsed or 0:.1f} s")


def _in_words(unit: str, first: str, task: Task) -> str:
    """How far it is, at which rate, and how long it will take; what is waited for before the first and after the last
    of them."""
    if not task.completed:
        return first
    done = f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}"
    if task.total is not None and task.completed >= task.total:
        return f"{done}, finishing"
    left = "" if task.time_remaining is None else f", {_duration(task.time_remaining)} left"
    return f"{done}{f', {_rate(task.speed)}/s{left}' if task.speed else ''}"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))
