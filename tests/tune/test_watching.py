"""What is said of a study while it runs, in a log: how far it is, how long it takes, and nothing twice."""

from __future__ import annotations

from typing import Any

import pytest

from scoreray.cluster.verbs import tune as tuning
from scoreray.cluster.verbs.tune import Pace, TrialTable
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.tune.book import RunningTrial, State
from scoreray.tune.load import load_sweep
from scoreray.tune.schedule import expected_images
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial


def trial(number: int, images: int, state: str) -> Trial:
    report = {"images": images, "metrics": {"denoising": 1.0}, "seq": number}
    return Trial(number, {}, f"run-{number}", state, [report] if images else [])


def under_way(one: Trial, images: int, target: int) -> RunningTrial:
    work = RunningTrial(one, target, 0.0)
    work.progress = TrainingProgress(images, target, 1.0, 1.0, 0.0, 0)
    return work


def test_time_left_follows_from_images_and_from_how_far_trials_go(sweep: dict[str, Any]) -> None:
    plan = load_sweep(sweep)  # 2,048 images a trial
    first = trial(0, 0, "running")
    state = State([first], 4, {0: under_way(first, 48, 2048)})
    pace = Pace(plan, state, now=100.0)
    assert pace.left_s(state, 101.0) is None
    state.running[0] = under_way(first, 1048, 2048)
    assert pace.progress(state) == "1 of 4 trials; 1,048 images"
    assert pace.left_s(state, 111.0) == pytest.approx((1000 + 3 * 2048) / 100)  # the clock starts with the first image
    ended = State([trial(0, 512, "stopped"), trial(1, 2048, "done"), first := trial(2, 512, "running")], 4)
    ended.running[2] = under_way(first, 768, 2048)
    assert pace.progress(ended) == "3 of 4 trials, 1 done, 1 stopped; 3,328 images"
    far = (512 + 2048 + 4 * 2048) / 6  # the ended trials' images, and four full trials'
    assert pace.left_s(ended, 133.8) == pytest.approx((2048 - 768 + far) / 100)


def test_asha_is_expected_to_stop_its_share(sweep: dict[str, Any]) -> None:
    plan = load_sweep({**sweep, "scheduler": {"kind": "asha", "grace_images": 512, "reduction": 2}})
    assert expected_images(plan) == 512 + 512 / 2 + 1024 / 4
    assert expected_images(load_sweep(sweep)) == 2048


def test_a_sweep_that_trains_nothing_counts_trials(sweep: dict[str, Any]) -> None:
    given = {key: value for key, value in sweep.items() if key != "base"}
    plan = load_sweep({**given, "checkpoint": "/absent", "space": {"sample.ema": {"choice": [0.1, 0.2]}}})
    pace = Pace(plan, State([], 6), now=0.0)
    state = State([trial(0, 9999, "done"), trial(1, 9999, "done"), trial(2, 0, "running")], 6)
    assert pace.progress(state) == "3 of 6 trials, 2 done"
    assert pace.left_s(state, 10.0) == pytest.approx(20.0)


def test_a_log_has_a_line_only_where_something_changed(sweep: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan: StudyPlan = load_sweep(sweep)
    lines: list[str] = []
    monkeypatch.setattr(tuning, "say", lines.append)
    monkeypatch.setattr(tuning, "QUIET_LINE_EVERY_S", -1.0)
    table, one = TrialTable(plan), trial(0, 0, "running")
    assert table._live is None
    state = State([one], 2, {0: under_way(one, 64, 2048)})
    for _ in range(3):
        table(state)
    state.running[0] = under_way(one, 640, 2048)
    for _ in range(3):
        table(state)
    assert [line.split("; about")[0] for line in lines] == [
        "tune: 1 of 2 trials; 64 images",
        "tune: 1 of 2 trials; 640 images",
    ]
    assert "s left" in lines[1]
