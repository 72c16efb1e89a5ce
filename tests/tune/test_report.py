"""A study's report from its records alone: complete, without a warning, with nothing taken for markup."""

from __future__ import annotations

import json
import math
import shlex
import warnings
from typing import Any

import pytest
from typer.main import get_command

from scoreray.cluster.cli.main import app
from scoreray.data.errors import UserError
from scoreray.data.yaml_text import parse_options
from scoreray.sampling.offline.generate import Request
from scoreray.trainer.config import load_config
from scoreray.tune.load import check_sweep, load_sweep
from scoreray.tune.pictures import front_pictures, without_far
from scoreray.tune.report import make_report
from scoreray.tune.schedule import best_of
from scoreray.tune.space import short_names
from scoreray.tune.sweep import StudyPlan, draw_settings
from scoreray.tune.trial import Trial, study_store

SPACE = {
    "objective.weighting.kind": {"choice": ["edm", "min_snr"]},
    "objective.weighting.gamma": {"log": [1, 9], "when": {"objective.weighting.kind": "min_snr"}},
    "objective.sigma_sampling.P_mean": {"uniform": [-3.0, 1.0]},
}


def made(plan: StudyPlan, number: int, values: dict[str, Any], costs: list[float], state: str = "done") -> Trial:
    """A trial that has reported at as many stops as `costs` has numbers; every further metric goes the other way."""
    first, *others = plan.sweep.metric.names
    reports = [
        {"images": 2048 * (i + 1) // len(costs), "metrics": {first: cost, **dict.fromkeys(others, 1 / cost)},
         "curve": [cost] * 8, "std_errors": [0.01] * 8, "seq": 10 * number + i, "seconds": 1.0,
         "checkpoint": "/absent/from/here", "ema": "0.100"}
        for i, cost in enumerate(costs)
    ]  # fmt: skip
    return Trial(number, values, f"run-{number}", state, reports, error="<b>diverged</b>" if state == "failed" else "")


@pytest.mark.parametrize(
    ("count", "names"), [(1, ["denoising"]), (12, ["denoising", "nfe"]), (12, ["fid", "denoising", "nfe", "sw", "kid"])]
)
def test_the_page_holds_every_trial_and_metric(sweep: dict[str, Any], count: int, names: list[str]) -> None:
    plan = load_sweep({**sweep, "space": SPACE, "metric": {**sweep["metric"], "names": names}})
    default = plan.default()
    assert default is not None
    trials = [made(plan, 0, default, [1.0, 0.9])]
    for i in range(1, count):
        kind = "min_snr" if i % 3 else "edm"
        values = {"objective.weighting.kind": kind, "objective.sigma_sampling.P_mean": -3.0 + 0.3 * i}
        values |= {"objective.weighting.gamma": 1.0 + i / 2} if kind == "min_snr" else {}
        state = "failed" if i == 3 else "stopped" if i == 4 else "done"
        trials.append(made(plan, i, values, [1.1, 0.8 + 0.02 * i] if state == "done" else [1.5][: i - 3], state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = make_report(plan, trials)
    store = study_store(plan.sweep)
    page, record = store.get("report.html").decode(), json.loads(store.get("report.json"))
    best = best_of(plan, trials)[0]
    assert record["best"]["number"] == best.number
    assert [one["number"] for one in record["trials"]] == list(range(count))
    assert page.count("<img") == 4 + (count > 1) + len(names) - 1  # the front's: the first metric against each other
    assert "No samples of the best" in page  # the checkpoint is gone: the rest of the report stands
    assert all(f"<td>{number}</td>" in page for number in range(1, count))
    assert all(f">{name}</th>" in page for name in names)
    if count > 1:
        assert "<b>diverged" not in page
        assert "&lt;b&gt;diverged" in page
        assert math.isclose(sum(record["importance"].values()), 1.0)
    config = load_config(report.best_url)
    assert config.objective == plan.config(best.values).objective


def asha(sweep: dict[str, Any], count: int, done: int) -> tuple[StudyPlan, list[Trial]]:
    """Trials of which asha let only some come to their end; their noise levels decide how good they are."""
    scheduler = {"kind": "asha", "grace_images": 1024, "reduction": 2}
    space = {"objective.sigma_sampling.P_mean": {"uniform": [-3.0, 1.0]}, "optimizer.learning_rate": {"log": [1e-3, 1]}}
    plan = load_sweep({**sweep, "space": space, "scheduler": scheduler})
    trials = []
    for i in range(count):
        cost = 1.0 + i / count
        values = {"objective.sigma_sampling.P_mean": -3.0 + 4 * i / count,
                  "optimizer.learning_rate": 10.0 ** -(1 + i * 7 % 5 / 4)}  # fmt: skip
        trials.append(made(plan, i, values, [cost, cost - 0.1], "done"))
        if i >= done:
            trials[-1].reports.pop()
            trials[-1].state = "stopped"
    return plan, trials


def test_importance_takes_stopped_trials_where_they_stood(sweep: dict[str, Any]) -> None:
    plan, trials = asha(sweep, count=20, done=5)
    report = make_report(plan, trials)
    shares = report.record["importance"]
    assert shares["objective.sigma_sampling.P_mean"] > 0.6
    assert report.record["importance_note"] == "20 trials as they stood at 1,024 images"
    assert "(20 trials as they stood at 1,024 images)" in report.text()
    assert "20 trials as they stood" in study_store(plan.sweep).get("report.html").decode()


def test_a_page_without_importance_says_why(sweep: dict[str, Any]) -> None:
    plan, trials = asha(sweep, count=7, done=5)
    report = make_report(plan, trials)
    assert report.record["importance"] == {}
    assert "importance: too few finished trials (5 of 8)" in report.text()
    assert "too few finished trials (5 of 8)" in study_store(plan.sweep).get("report.html").decode()


def test_a_report_of_a_checkpoint_claims_no_training_and_no_default(sweep: dict[str, Any]) -> None:
    given = {key: value for key, value in sweep.items() if key != "base"}
    plan = load_sweep({**given, "checkpoint": "/absent/from/here", "space": {"sample.steps": {"choice": [5, 9]}},
                       "metric": {**sweep["metric"], "names": ["sw", "nfe"]}})  # fmt: skip
    assert plan.default() is None
    trials = [made(plan, i, {"sample.steps": steps}, [1.0 + i]) for i, steps in enumerate((5, 9))]
    for trial in trials:
        trial.run = ""
    report = make_report(plan, trials)
    page = study_store(plan.sweep).get("report.html").decode()
    assert report.record["images"] == 0
    assert "nothing was trained" in page
    assert "images trained on" not in page
    assert "the default" not in page
    assert report.answer()["best_config"] is None
    assert "best.yaml" not in {key for key, _ in study_store(plan.sweep).list()}


def test_one_bad_trial_rules_no_axis(sweep: dict[str, Any]) -> None:
    plan = load_sweep({**sweep, "metric": {**sweep["metric"], "names": ["sw", "nfe"]}})
    key = "objective.sigma_sampling.P_mean"
    trials = [made(plan, i, {key: -2.0 + i / 10}, [cost]) for i, cost in enumerate([1.0, 1.2, 1.1, 1.4, 500.0])]
    for trial, calls in zip(trials, (9.0, 5.0, 9.0, 7.0, 9.0), strict=True):
        trial.reports[0]["metrics"]["nfe"] = calls
    assert [trial.state for trial in without_far(plan, trials)] == ["done"] * 4 + ["failed"]
    trials[4].reports[0]["metrics"]["nfe"] = 4.0  # the front is shown whole
    assert [trial.state for trial in without_far(plan, trials)] == ["done"] * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert front_pictures(plan, trials, trials[4])


def test_names_are_shortened_as_far_as_they_stay_unique() -> None:
    keys = ["objective.weighting.kind", "process.kind", "a.sigma_max", "b.sigma_max", "optimizer.learning_rate"]
    assert list(short_names(keys).values()) == [
        "weighting.kind", "process.kind", "a.sigma_max", "b.sigma_max", "learning_rate"
    ]  # fmt: skip


def test_the_printed_line_that_draws_is_what_the_command_reads(sweep: dict[str, Any]) -> None:
    """Through the shell's rules and the command's own parser, at values that print as 1e-05."""
    space = {
        "sample.options.s_noise": {"log": [1e-5, 1.0]},
        "sample.options.s_churn": {"int": [0, 40]},
        "sample.sampler": {"choice": ["edm_sde", "heun"]},
        "sample.steps": {"int": [4, 64]},
    }
    space = {
        key: {**one, "when": {"sample.sampler": "edm_sde"}} if "options" in key else one for key, one in space.items()
    }
    plan = load_sweep({**sweep, "space": space, "metric": {**sweep["metric"], "names": ["nfe"]}})
    drawn = {
        "sample.sampler": "edm_sde",
        "sample.steps": 9,
        "sample.options.s_noise": 1e-05,
        "sample.options.s_churn": 7,
    }
    report = make_report(plan, [made(plan, 0, drawn, [1.0])])
    line = report.text().splitlines()[-1]
    assert line.startswith("draw: scoreray sample /absent/from/here ")
    words = shlex.split(line.removeprefix("draw: scoreray sample "))
    command: Any = get_command(app)
    params = command.commands["sample"].make_context("sample", words).params
    assert (params["sampler"], params["steps"], params["ema"]) == ("edm_sde", 9, "0.100")
    options = parse_options(params["option"])
    assert options == {"s_noise": 1e-05, "s_churn": 7}
    assert Request(count=1, sampler="edm_sde", options=options).options == options


def test_grids_are_searched_by_name_and_by_their_levels(sweep: dict[str, Any]) -> None:
    space = {"sample.grid": {"choice": ["karras", [4.0, 0.5], [4.0, 1.0, 0.2]]}}
    plan = load_sweep({**sweep, "space": space, "metric": {**sweep["metric"], "names": ["sw", "nfe"]}})
    check_sweep(plan)
    found = [draw_settings(plan.sweep, values)["grid"] for values in plan.space.grid(1, plan.base)]
    assert found == ["karras", [4.0, 0.5], [4.0, 1.0, 0.2]]
    assert plan.space.decoded(plan.space.encoded({"sample.grid": [4.0, 0.5]}), plan.base) == {"sample.grid": [4.0, 0.5]}
    lines = make_report(plan, [made(plan, 0, {"sample.grid": [4.0, 0.5]}, [1.0])]).text().splitlines()
    (line,) = [line for line in lines if line.startswith("draw: ")]
    words = shlex.split(line.removeprefix("draw: scoreray sample "))
    command: Any = get_command(app)
    assert command.commands["sample"].make_context("sample", words).params["grid"] == "4.0,0.5"
    space = {"sample.grid": {"choice": [[0.5, 4.0], "karras"]}}
    rising = load_sweep({**sweep, "space": space, "metric": {**sweep["metric"], "names": ["sw", "nfe"]}})
    with pytest.raises(UserError, match=r"space.sample.grid: at \[0.5, 4.0\]: grid 0.5,4.0: 0.5 is followed by 4"):
        check_sweep(rising)
