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
from rich.table import Table
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
def waiting(what: str) -> Iterator[None]:
    """Around a step that can't say how far it is: what is waited for, and for how long so far."""
    _end_opening()
    if not console.is_terminal:
        with _ticking(lambda: what):
            yield
        return
    columns = (SpinnerColumn(), TextColumn(what), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def _ticking(line: Callable[[], str]) -> Iterator[None]:
    """In a log: `line()` and how long it has been, now and then while the block goes on; nothing where it is quick."""
    over, started = threading.Event(), time.monotonic()

    def tick() -> None:
        wait_s = SOON_S if _plain or console.is_terminal else QUIET_LINE_EVERY_S
        while not over.wait(wait_s):
            _print_line(f"{printable(line())}: {time.monotonic() - started:,.0f} s so far")
            wait_s = QUIET_LINE_EVERY_S

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class TrainLine:
    """The progress of a training run; a bar on a terminal, a line now and then in a log."""

    def __init__(self, total: int) -> None:
        self._terminal = console.is_terminal
        self._last_line = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("train"),
            BarColumn(bar_width=None if console.width > 100 else 8),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("train", total=total, facts="starting workers")
        self._committed, self._ended = 0, False
        self._starting = contextlib.ExitStack()
        self._record: TrainingRecord | None = None
        self._tabled: TrainingRecord | None = None

    def __enter__(self) -> TrainLine:
        _end_opening()
        self._bar.start()
        if not self._terminal:
            self._starting.enter_context(_ticking(lambda: "train: workers start, and make their first step"))
        return self

    def __exit__(self, *exc: object) -> None:
        self._starting.close()
        self._bar.stop()
        if self._terminal and self._record is not None and self._record != self._tabled:
            console.print(sigma_table(self._record))

    def __call__(self, progress: TrainingProgress) -> None:
        self._starting.close()
        done = min(progress.images, progress.total)  # the last batch may pass the end
        rate = "" if math.isnan(progress.images_per_s) else f"{progress.images_per_s:,.0f} img/s"
        facts = f"loss {progress.loss:.4f}  {rate}  data stall {progress.data_stall:.0%}"
        self._bar.update(self._task, total=progress.total, completed=done, facts=facts)  # the total of minutes changes
        if progress.record is not None:
            self._record = progress.record
            if self._terminal and progress.committed > self._committed and progress.images < progress.total:
                console.print(sigma_table(progress.record))
                self._tabled = progress.record
        self._committed = progress.committed
        now, ended = time.monotonic(), progress.images >= progress.total
        if not self._terminal and not self._ended and (now - self._last_line > QUIET_LINE_EVERY_S or ended):
            self._last_line, self._ended = now, ended
            left = max(0, progress.total - progress.images)
            left_text = f"  {left / progress.images_per_s:,.0f} s left" if progress.images_per_s > 0 else ""
            say(f"train {done:,}/{progress.total:,} images  {facts}{left_text}")


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


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def bar(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar for work that reports how much more is done."""
    with _progress(name, total, unit) as progress:
        yield lambda n: progress.advance(progress.task_ids[0], n)


@contextmanager
def _progress(name: str, total: int, unit: str) -> Iterator[Progress]:
    _end_opening()
    progress = Progress(
        SpinnerColumn(),
        TextColumn(name),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=not sys.stderr.isatty(),
    )
    progress.add_task(name, total=total)
    lines = _ticking(lambda: _in_words(name, unit, progress.tasks[0]))
    with contextlib.nullcontext() if console.is_terminal else lines, progress:
        yield progress
    if not console.is_terminal:
        task = progress.tasks[0]
        say(f"{name}: {task.completed:,.0f} {unit} in {task.elapsed or 0:.1f} s")


def _in_words(name: str, unit: str, task: Task) -> str:
    """What a bar would show."""
    left = "" if task.time_remaining is None else f", {task.time_remaining:,.0f} s left"
    rate = f", {task.speed:,.3g}/s{left}" if task.speed else ""
    return f"{name} {task.completed:,.0f}/{task.total or 0:,.0f} {unit}{rate}"


@contextmanager
def counted(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, total) itself."""
    with _progress(name, 1, unit) as progress:
        yield lambda done, total: progress.update(progress.task_ids[0], completed=done, total=total)
