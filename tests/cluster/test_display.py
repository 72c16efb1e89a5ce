"""What a person sees of a run on a terminal: the bar, and the loss by noise level at each commit and at the end."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console
from waiting import wait_until

from scoreray.cluster import display
from scoreray.cluster.display import TrainLine, sigma_table
from scoreray.trainer.monitoring.metrics import TrainingProgress, TrainingRecord

RECORD = TrainingRecord(640, 0.5, 1e-3, 1.0, 100.0, 0.02, (None, 0.9, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, None))


def test_the_table_has_a_row_for_each_level_that_was_met() -> None:
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(sigma_table(RECORD))
    lines = capture.get().splitlines()
    assert "640 images" in lines[0]
    assert len(lines) == 2 + 9
    assert "0.00316-0.01" in lines[2]
    assert "0.9000" in lines[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_at_each_commit_on_a_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """No record's table comes twice, nor the last line of a log."""
    console = Console(width=80, force_terminal=terminal, record=True)
    monkeypatch.setattr(display, "console", console)
    with console.capture() as capture, TrainLine(1280) as line:
        for images, committed in ((600, 0), (660, 640), (700, 640), (1280, 640), (1280, 1280)):
            record = replace(RECORD, images=images // 640 * 640)
            line(TrainingProgress(images, 1280, 0.5, 100.0, 0.02, committed, record=record))
    with console.capture() as later, TrainLine(1280) as line:
        for committed in (0, 640):  # stopped just after a commit
            line(TrainingProgress(650, 1280, 0.5, 100.0, 0.02, committed, record=RECORD))
    shown = capture.get()
    assert shown.count("loss by noise level") == (2 if terminal else 0)
    assert later.get().count("loss by noise level") == (1 if terminal else 0)
    assert terminal or shown.count("1,280/1,280") == 1
    assert "data stall 2%" in shown


def new_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 256 colours gets. No fixture, as pytest puts its own standard error in place after those."""
    written = io.StringIO()
    written.isatty = lambda: True  # type: ignore[method-assign]
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(display, "console", Console(stderr=True, highlight=False, width=80))
    monkeypatch.setattr(display, "_plain", False)
    return written


def work() -> None:
    with display.counted("pack", "samples") as progress, display.waiting("starting Ray"):
        for done in range(5):
            time.sleep(0.03)
            progress(done, 4)
    with TrainLine(1280) as line:
        for images in (640, 1280):
            line(TrainingProgress(images, 1280, 0.5, 100.0, 0.02, images, record=RECORD))
    display.say("done")


def test_plain_lines_have_their_time_and_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(display, "SOON_S", 0.02)
    monkeypatch.setattr(display, "QUIET_LINE_EVERY_S", 0.05)
    display.use_plain_lines()
    work()
    lines = terminal.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [ -~]+$", line) for line in lines), lines
    text = terminal.getvalue()
    assert re.search(r"Z pack \d/4 samples.*: \d+ s so far", text)
    assert re.search(r"Z starting Ray: \d+ s so far", text)
    assert "Z train 1,280/1,280 images" in text
    assert lines[-1].endswith("Z done")


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_bars_and_no_colours_where_none_are_wanted(
    monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    terminal = new_terminal(monkeypatch)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(display, "console", Console(stderr=True, highlight=False, width=80))
    work()
    codes = re.findall(r"\x1b\[([\d;]*)m", terminal.getvalue())
    coloured = [code for code in codes if any(part[:1] in "349" and len(part) == 2 for part in code.split(";"))]
    assert bool(coloured) != no_color
    assert "starting Ray" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()  # the cursor moves


def test_a_quick_step_has_no_line_of_its_own_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, force_terminal=False)
    monkeypatch.setattr(display, "console", console)
    with console.capture() as capture, display.opening(), display.waiting("starting Ray"):
        pass
    assert capture.get() == ""


def test_a_command_that_is_slow_to_say_anything_says_that_it_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(display, "SOON_S", 0.02)
    with display.opening():
        time.sleep(0.1)
        display.say("first line")
        shown = terminal.getvalue()
        time.sleep(0.1)
        assert terminal.getvalue() == shown
    assert re.fullmatch(r"(loading packages .*: 0 s so far\n)first line\n", shown)


def until_shown(terminal: io.StringIO, pattern: str, refresh: Callable[[], None] = lambda: None) -> None:
    def shown() -> bool:
        refresh()
        return re.search(pattern, terminal.getvalue()) is not None

    wait_until(shown, lambda: f"{pattern} in {terminal.getvalue()}", 0.01)


def shown_last(terminal: io.StringIO) -> str:
    """The last line that a terminal drew, without its escapes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").rstrip().splitlines()[-1]


def test_a_bar_says_what_it_waits_for_before_the_first_and_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of nothing out of nothing are no progress."""
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(display, "console", Console(stderr=True, highlight=False, width=80))
    drawn = list[str]()
    with display._progress("sample", None, "samples", "compiling the network, and the first batch") as progress:
        for done in (None, 16, 64):
            if done is not None:
                progress.update(progress.task_ids[0], completed=done, total=64)
            progress.refresh()
            drawn.append(shown_last(terminal))
    assert "sample" in drawn[0]
    assert "compiling the network, and the first batch: 0 s so far" in drawn[0]
    assert "0/" not in drawn[0]
    assert "16/64 samples" in drawn[1]
    assert "64/64 samples, finishing" in drawn[2]
    with display._progress("metrics", 1, "record", "") as progress:
        progress.refresh()
        assert "metrics" in shown_last(terminal)
        assert "under way: 0 s so far" in shown_last(terminal)


def test_a_log_says_what_a_count_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(display, "SOON_S", 0.02)
    monkeypatch.setattr(display, "QUIET_LINE_EVERY_S", 0.02)
    display.use_plain_lines()
    with display.counted("pack", "samples", "looking through the source") as progress:
        until_shown(terminal, r"Z pack looking through the source: \d+ s so far\n")
        progress(4, 4)
        until_shown(terminal, r"Z pack 4/4 samples, finishing: \d+ s so far\n")
    text = terminal.getvalue()
    assert "0/" not in text


def test_what_is_waited_for_can_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (False, True):
        terminal = new_terminal(monkeypatch)
        monkeypatch.setattr(display, "SOON_S", 0.01)
        monkeypatch.setattr(display, "QUIET_LINE_EVERY_S", 0.01)
        if plain:
            display.use_plain_lines()
        with display.waiting("reading the model") as now:
            until_shown(terminal, "reading the model")
            now("compiling [the network]")
            until_shown(terminal, re.escape("compiling [the network]"))
        first, second = (terminal.getvalue().find(what) for what in ("reading the model", "compiling [the network]"))
        assert -1 < first < second


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_that_makes_no_step_and_one_that_ends_say_so(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(display, "console", Console(stderr=True, highlight=False, width=160))
    monkeypatch.setattr(display, "SOON_S", 0.0)
    monkeypatch.setattr(display, "QUIET_LINE_EVERY_S", 0.01)
    if plain:
        display.use_plain_lines()
    end = "the last checkpoint is written" if plain else r"last checkpoint, end of workers: \d+ s"
    with TrainLine(1280) as line:
        until_shown(terminal, r"starting workers, and the first step: \d+ s so far", line._bar.refresh)
        for images, said in ((640, r"no further step: \d+ s so far"), (1280, end)):
            assert not re.search(said, terminal.getvalue())
            line(TrainingProgress(images, 1280, 0.5, 100.0, 0.02, 0))
            until_shown(terminal, said, line._bar.refresh)


def test_the_time_left_can_hold_what_comes_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = new_terminal(monkeypatch)
    monkeypatch.setattr(display, "QUIET_LINE_EVERY_S", -1.0)
    display.use_plain_lines()
    for then, text in ((0.0, "6 s left\n"), (1000.0, "6 s left, 16 s with what comes after\n")):
        with TrainLine(1280, then) as line:
            line(TrainingProgress(640, 1280, 0.5, 100.0, 0.02, 0))
        assert text in terminal.getvalue()
