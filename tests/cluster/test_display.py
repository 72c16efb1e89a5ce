"""What a person sees of a run on a terminal: the bar, and the loss by noise level at each commit and at the end."""

from __future__ import annotations

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
