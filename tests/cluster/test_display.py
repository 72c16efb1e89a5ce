"""What a person sees of a run on a terminal: the bar, and the loss by noise level at each commit and at the end."""

from __future__ import annotations

import io
import re
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

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
