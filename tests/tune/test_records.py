"""What a study reads back from the store: torn and foreign files are named in one line, and can be removed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from scoreray.data.errors import DataError
from scoreray.tune.load import load_sweep
from scoreray.tune.report import make_report
from scoreray.tune.schedule import best_of
from scoreray.tune.search import drawn, searcher, values
from scoreray.tune.study import Study, claim
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial, read_trials, study_store

MEAN = "objective.sigma_sampling.P_mean"


def recorded(plan: StudyPlan, count: int) -> list[Trial]:
    """Finished trials, on record in the plan's study."""
    claim(plan)
    trials = []
    for number in range(count):
        report = {"images": plan.total, "metrics": {"denoising": 1.0 + number}, "curve": [1.0] * 8,
                  "std_errors": [0.1] * 8, "seq": number, "seconds": 1.0, "checkpoint": "/absent", "ema": "0.100",
                  "run": f"run-{number}"}  # fmt: skip
        trials.append(Trial(number, {MEAN: -1.0 - number / 10}, f"run-{number}", "done", [report]))
        trials[-1].save(study_store(plan.sweep))
    return trials


def wrecks(whole: dict[str, Any]) -> list[bytes]:
    """A record cut at many places, with each key left out, and with each value of another type."""
    text = json.dumps(whole).encode()
    made = [text[:length] for length in range(0, len(text), 5)]
    made += [b'{"x":', b"[]", b"null", b"7", b'"a"', b"\xff\xfe", b"[" * 100_000, b"{}", text + b"}"]
    report = whole["reports"][0]
    for key in whole:
        made.append(json.dumps({name: value for name, value in whole.items() if name != key}).encode())
        others = [other for other in (None, 1.5, {"a": 1}, [3], "odd", True) if type(other) is not type(whole[key])]
        made += [json.dumps({**whole, key: other}).encode() for other in others]
    for key in report:
        made.append(json.dumps({**whole, "reports": [{k: v for k, v in report.items() if k != key}]}).encode())
        made.append(json.dumps({**whole, "reports": [{**report, key: [None]}]}).encode())
    return [*made, json.dumps({**whole, "values": {MEAN: 99.0}}).encode(), json.dumps({**whole, "new": 1}).encode()]


def test_a_wrecked_record_is_one_line_that_names_it(sweep: dict[str, Any]) -> None:
    plan = load_sweep(sweep)
    trials, store = recorded(plan, 4), study_store(plan.sweep)
    whole = json.loads(store.get(trials[3].key))
    tried = wrecks(whole)
    for data in tried:
        store.put(trials[3].key, data)
        with pytest.raises(DataError) as error:
            claim(plan)
        (line,) = str(error.value).splitlines()
        assert line.startswith(store.url("trials/00003.json") + ": "), data
        assert "delete that file, and the same command runs trial 3 again" in line
    assert len(tried) > 100
    store.put(trials[3].key, json.dumps(whole).encode())
    store.put("trials/notes.txt", b"not ours")
    assert claim(plan) == trials


def test_a_wrecked_sweep_of_a_study_is_one_line(sweep: dict[str, Any]) -> None:
    plan = load_sweep(sweep)
    trials = recorded(plan, 2)
    for data in (b"", b'{"x":', b"[1]", b"7", b"\xff", b"[" * 100_000, b'{"a":' * 100_000):
        study_store(plan.sweep).put("study.json", data)
        with pytest.raises(DataError, match=r"study.json: not a record of a sweep; delete that file"):
            claim(plan)
    study_store(plan.sweep).delete(["study.json"])
    assert claim(plan) == trials


@pytest.mark.slow
def test_a_deleted_record_is_run_again_and_the_others_are_not(ray_cluster: None, sweep: dict[str, Any]) -> None:
    plan = load_sweep(sweep, ["base.duration.images=256"])
    before = Study(plan, {"CPU": 2.0}).run()
    study_store(plan.sweep).delete([before[1].key])
    after = Study(plan, {"CPU": 2.0}).run()
    assert [trial.number for trial in after] == [0, 1, 2, 3]
    assert [trial.values for trial in after] == [trial.values for trial in before]
    assert after[1].reports[0]["metrics"] == before[1].reports[0]["metrics"]
    assert [after[i] == before[i] for i in range(4)] == [True, False, True, True]
    assert read_trials(study_store(plan.sweep)) == after


@pytest.mark.parametrize(("kind", "value"), [("tpe", math.nan), ("tpe", -math.inf), ("random", math.inf)])
def test_a_trial_without_a_finite_metric_has_failed_and_the_study_goes_on(
    sweep: dict[str, Any], value: float, kind: str
) -> None:
    """Also one that an earlier version recorded as done: it ended every later start of a TPE study."""
    plan = load_sweep({**sweep, "search": {"kind": kind, "startup": 2}})
    trials, store = recorded(plan, 4), study_store(plan.sweep)
    trials[1].reports[0]["metrics"] = {"denoising": value}
    trials[1].save(store)
    claimed = claim(plan)
    assert [trial.state for trial in claimed] == ["done", "failed", "done", "done"]
    assert "not a finite number" in claimed[1].error
    search: Any = searcher(plan, claimed)
    proposed = drawn(plan, 4) if search is None else values(plan, search.suggest("4"))
    assert plan.space.dimensions[0].contains(proposed[MEAN])
    assert [trial.number for trial in best_of(plan, claimed)] == [0, 2, 3]
    made = make_report(plan, claimed)
    assert made.record["states"] == {"done": 3, "stopped": 0, "failed": 1}
    json.loads(store.get("report.json"), parse_constant=lambda word: pytest.fail(word))
