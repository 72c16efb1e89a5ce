"""Which trial may start, and what a study that goes on makes of its records; without Ray."""

from __future__ import annotations

from typing import Any

from scoreray.tune.book import StudyBook
from scoreray.tune.load import load_sweep
from scoreray.tune.search import drawn
from scoreray.tune.study import claim
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial, read_trials, study_store

RATE = "optimizer.learning_rate"


def book_of(plan: StudyPlan, concurrent: int = 2) -> StudyBook:
    return StudyBook(plan, claim(plan), concurrent, lambda line: None)


def started(book: StudyBook) -> int | None:
    trial = book.next_trial(lambda number: drawn(book.plan, number))
    return None if trial is None else trial.number


def report(images: int, run: str) -> dict[str, Any]:
    return {"images": images, "metrics": {"denoising": 1.0}, "curve": [1.0] * 8, "std_errors": [0.1] * 8, "seq": images,
            "seconds": 1.0, "checkpoint": "/absent", "ema": "0.100", "run": run}  # fmt: skip


def test_trials_that_share_a_run_wait_for_the_one_that_trains_it(sweep: dict[str, Any]) -> None:
    space = {"sample.steps": {"choice": [4, 8, 16]}}
    plan = load_sweep({**sweep, "space": space, "search": {"kind": "grid"}},
                      ["metric.names=[sw, nfe]", "metric.samples=64"])  # fmt: skip
    book = book_of(plan)
    assert started(book) == 0
    assert started(book) is None  # no other trial is even made
    assert not book.is_complete
    given = report(plan.total, book.trials[0].run) | {"metrics": {"sw": 1.0, "nfe": 7.0}}
    book.reported(0, given, ended=True)
    book.ended(0)
    assert [started(book), started(book), started(book)] == [1, 2, None]
    assert book.is_complete
    assert {trial.run for trial in book.trials} == {book.trials[0].run}


def test_a_sweep_of_the_sampler_ends_where_its_run_fails(sweep: dict[str, Any]) -> None:
    space = {"sample.steps": {"choice": [4, 8]}}
    plan = load_sweep({**sweep, "space": space}, ["metric.names=[sw, nfe]", "metric.samples=64"])
    book = book_of(plan)
    assert started(book) == 0
    book.failed(0, "the loss is not finite")
    book.ended(0)
    assert started(book) is None
    assert book.is_complete


def test_values_that_contradict_each_other_fail_their_trial_before_it_starts(sweep: dict[str, Any]) -> None:
    space = {"data.global_batch_size": {"choice": [64, 63]}}
    plan = load_sweep({**sweep, "space": space, "search": {"kind": "grid"}})
    object.__setattr__(plan, "raw", plan.raw | {"duration": {"images": 0}})  # so that no config is accepted
    book = book_of(plan)
    assert started(book) is None
    assert [trial.state for trial in read_trials(study_store(plan.sweep))] == ["failed", "failed"]


def test_a_study_that_goes_on_shows_ended_trials_and_gives_those_under_way_their_numbers(sweep: dict[str, Any]) -> None:
    plan = load_sweep(sweep)
    store = study_store(plan.sweep)
    claim(plan)
    for number, state in ((0, "done"), (1, "running"), (3, "stopped")):
        reports = [report(plan.total, f"run-{number}")] if state != "running" else []
        Trial(number, drawn(plan, number), f"run-{number}", state, reports).save(store)
    book = book_of(plan)
    assert [started(book) for _ in range(5)] == [0, 3, 1, 2, None]  # 2: a person has deleted its record
    assert set(book.state.running) == {1, 2}
    assert book.is_complete


def test_a_population_exchanges_again_only_what_a_kill_has_prevented(sweep: dict[str, Any]) -> None:
    """All have reported at 512 images; before the kill one had taken another's weights, so the others keep theirs."""
    pbt = {"space": {RATE: {"log": [1e-6, 1e-2]}}, "scheduler": {"kind": "pbt", "every_images": 512}}
    plan = load_sweep({**sweep, **pbt})
    store = study_store(plan.sweep)
    claim(plan)
    for number in range(4):
        trial = Trial(number, {RATE: 1e-3}, f"trial-{number:05d}-0", reports=[report(512, f"trial-{number:05d}-0")])
        if number == 2:
            trial.lineage.append({"images": 512, "source": 0, "values": {RATE: 2e-3}})
        trial.save(store)
    book = book_of(plan)
    assert [trial.lineage[-1]["source"] for trial in book.trials] == [None, None, 0, None]
    assert all(trial.has_exchanged for trial in read_trials(store))
    for trial in read_trials(store):  # the kill came before any exchange: all report once more, and exchange
        trial.lineage.clear()
        trial.save(store)
    assert not any(trial.has_exchanged for trial in book_of(plan).trials)
