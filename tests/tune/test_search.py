"""Ray Tune's searchers, schedulers and callbacks by name: over our spaces, and with what is on record."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scoreray.data.errors import UserError
from scoreray.tune.checks import check_plugins
from scoreray.tune.load import load_sweep
from scoreray.tune.schedule import RecordedTrial, allowed, callbacks, milestones, scheduler
from scoreray.tune.search import drawn, num_trials, searcher, values
from scoreray.tune.space import Space
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial

MEAN, KIND, GAMMA = "objective.sigma_sampling.P_mean", "objective.weighting.kind", "objective.weighting.gamma"
SPACE: dict[str, dict[str, Any]] = {
    MEAN: {"uniform": [-3.0, 1.0]},
    KIND: {"choice": ["edm", "min_snr"]},
    GAMMA: {"log": [0.5, 50.0], "when": {KIND: "min_snr"}},
    "network.hidden_size": {"int": [8, 64], "log": True},
    "optimizer": {"choice": [{"learning_rate": 0.001}, {"learning_rate": 0.002}]},
}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's searcher: the points that it is given, then the lower end of everything."""
    from ray.tune.search import Searcher

    class Corners(Searcher):
        def __init__(self, metric: str, mode: str, points_to_evaluate: list[Any] | None = None, extra: int = 0) -> None:
            super().__init__(metric, mode)
            self.points, self.extra = list(points_to_evaluate or []), extra
            self.results = dict[str, Any]()

        def set_search_properties(
            self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
        ) -> bool:
            self.lower = {key: getattr(one, "categories", [None])[0] or one.lower for key, one in config.items()}
            return True

        def suggest(self, trial_id: str) -> dict[str, Any]:
            return self.points.pop(0) if self.points else self.lower

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            self.results[trial_id] = result

    monkeypatch.setattr(Corners, "__module__", "own_search")  # as if it were defined there
    monkeypatch.setitem(sys.modules, "own_search", SimpleNamespace(Corners=Corners))
    return "own_search:Corners"


def plan_of(sweep: dict[str, Any], kind: str, **changes: Any) -> StudyPlan:
    return load_sweep({**sweep, "space": SPACE, "search": {"kind": kind, "startup": 4}, "trials": 12, **changes})


def suggested(plan: StudyPlan, count: int, trials: list[Trial] | None = None) -> list[dict[str, Any]]:
    search: Any = searcher(plan, trials or [])
    found = []
    for number in range(count):
        found.append(values(plan, search.suggest(str(number))))
        search.on_trial_complete(str(number), {"images": 2048, "denoising": found[-1][MEAN] ** 2})
    return found


def on_record(plan: StudyPlan, number: int, mean: float, state: str = "done", images: int = 2048) -> Trial:
    made = {**drawn(plan, number), MEAN: mean}
    report = {"images": images, "metrics": {"denoising": (mean + 2.0) ** 2}, "seq": number}
    return Trial(number, made, state=state, reports=[report] if state in ("done", "stopped") else [])


@pytest.mark.parametrize("kind", ["tpe", "optuna", "hyperopt", "own"])
def test_values_are_of_the_space_under_its_conditions_and_the_base_config_comes_first(
    sweep: dict[str, Any], own: str, kind: str
) -> None:
    if kind == "hyperopt":
        pytest.importorskip("hyperopt")
    kind = own if kind == "own" else kind
    plan = plan_of(sweep, kind, base={**sweep["base"], "optimizer": {"learning_rate": 0.002}})
    plan = load_sweep({**plan.sweep.dump(), "space": {key: SPACE[key] for key in SPACE if key != "optimizer"}})
    found = suggested(plan, 12)
    assert found[0] == plan.default() == {MEAN: -1.2, KIND: "edm", "network.hidden_size": 16}
    for one in found + suggested(plan_of(sweep, kind), 12):
        assert (GAMMA in one) == (one[KIND] == "min_snr")
        plan.config(one)
        for dimension in plan.space.dimensions:
            assert dimension.key not in one or dimension.contains(one[dimension.key])
    sections = [one["optimizer"] for one in suggested(plan_of(sweep, kind), 12)]
    assert all(section in SPACE["optimizer"]["choice"] for section in sections)


@pytest.mark.parametrize("kind", ["tpe", "hyperopt"])
def test_trials_on_record_are_evaluated_ones_and_those_under_way_come_first(sweep: dict[str, Any], kind: str) -> None:
    if kind == "hyperopt":
        pytest.importorskip("hyperopt")
    plan = plan_of(sweep, kind, trials=40)
    trials = [on_record(plan, number, -3.0 + number / 6) for number in range(24)]
    trials += [on_record(plan, 24, 0.5, "failed"), on_record(plan, 25, 0.9, "running"),
               on_record(plan, 27, 0.8, "stopped", 512)]  # fmt: skip
    found = suggested(plan, 9, trials)
    assert found[0] == trials[25].values
    assert sum(abs(one[MEAN] + 2.0) for one in found[1:]) / 8 < 0.6  # at random: 1.25
    assert found == suggested(plan, 9, trials)


def test_a_searcher_of_one_s_own_gets_its_options_and_what_is_on_record(sweep: dict[str, Any], own: str) -> None:
    plan = load_sweep({**plan_of(sweep, own).sweep.dump(), "search": {"kind": own, "options": {"extra": 5}}})
    search: Any = searcher(plan, [on_record(plan, 0, -2.0), on_record(plan, 1, 0.0, "failed")])
    assert search.extra == 5
    assert search.results == {"trial-00000": {"images": 2048, "denoising": 0.0}, "trial-00001": None}


def test_several_metrics_are_searched_for_together(sweep: dict[str, Any]) -> None:
    plan = plan_of(sweep, "tpe", metric={**sweep["metric"], "names": ["denoising", "nats"]})
    search: Any = searcher(plan, [])
    assert (search.metric, search.mode) == (["denoising", "nats"], ["min", "max"])
    for number in range(6):
        search.suggest(str(number))
        search.on_trial_complete(str(number), {"denoising": 1.0, "nats": float(number)})


def test_random_and_grid_points_do_not_depend_on_other_trials(sweep: dict[str, Any]) -> None:
    for kind, count in (("random", 12), ("grid", 8)):
        plan = plan_of(sweep, kind, space={MEAN: SPACE[MEAN], KIND: SPACE[KIND], GAMMA: SPACE[GAMMA]}, trials=count)
        assert searcher(plan, []) is None
        assert num_trials(plan) == count
        made = [drawn(plan, number) for number in range(count)]
        assert made == [drawn(plan, number) for number in range(count)]
        assert len({str(one) for one in made}) == count
    assert num_trials(plan_of(sweep, "grid", space={KIND: SPACE[KIND]})) == 2  # no more than its points


def report(scheduler: Any, trial: Any, images: int, value: float) -> str:
    decision: str = scheduler.on_trial_result(None, trial, {"images": images, "denoising": value})
    return decision


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_bad_trial_is_stopped_and_the_base_config_s_never(sweep: dict[str, Any], kind: str) -> None:
    section = {"kind": kind, "grace_images": 256, "reduction": 2, "every_images": 256}
    plan = plan_of(sweep, "random", space={MEAN: SPACE[MEAN]}, scheduler=section)
    records = [on_record(plan, number, number / 10, "stopped", 256) for number in range(1, 6)]  # errors 4.41 to 6.25
    made: Any = scheduler(plan, records)
    default, bad, good = (RecordedTrial(name, {MEAN: mean}) for name, mean in (("a", -1.2), ("b", 0.1), ("c", 0.2)))
    for trial in (default, bad, good):
        made.on_trial_add(None, trial)
    assert report(made, bad, 256, 9.0) == "STOP"
    assert report(made, default, 256, 9.0) == "CONTINUE"
    assert report(made, default, 512, 9.0) == "CONTINUE"
    assert report(made, good, 256, 1.0) == "CONTINUE"
    assert scheduler(load_sweep({**plan.sweep.dump(), "scheduler": {"kind": "none"}})) is None


def test_asha_counts_a_trial_that_goes_on_after_a_kill_once_at_each_stop(sweep: dict[str, Any]) -> None:
    section = {"kind": "asha", "grace_images": 256, "reduction": 2}
    plan = plan_of(sweep, "random", space={MEAN: SPACE[MEAN]}, scheduler=section)
    made: Any = scheduler(plan, [on_record(plan, 0, 0.2, "running", 256)])  # an error of 4.84 at 256 images
    going_on, new = (SimpleNamespace(trial_id=name, config={MEAN: 0.2}) for name in "ab")
    made.on_trial_add(None, going_on)
    assert report(made, going_on, 512, 1.0) == "CONTINUE"
    made.on_trial_complete(None, going_on, {"images": 512, "denoising": 1.0, "done": True})
    made.on_trial_add(None, new)
    assert report(made, new, 256, 4.0) == "CONTINUE"  # better than all that were there: 1.0 was not


def test_milestones_are_where_the_scheduler_looks(sweep: dict[str, Any]) -> None:
    found = {}
    for kind in ("asha", "hyperband", "median", "pbt"):
        section = {"kind": kind, "grace_images": 256, "reduction": 2, "every_images": 768}
        found[kind] = milestones(plan_of(sweep, "random", space={MEAN: SPACE[MEAN]}, scheduler=section))
    assert found == {"asha": [256, 512, 1024, 2048]} | {
        kind: [768, 1536, 2048] for kind in ("hyperband", "median", "pbt")
    }


def test_population_based_training_mutates_within_the_space_and_what_the_config_accepts(sweep: dict[str, Any]) -> None:
    space = {key: SPACE[key] for key in (MEAN, KIND, GAMMA)} | {"optimizer.warmup_images": {"int": [0, 90]}}
    plan = plan_of(sweep, "random", space=space, scheduler={"kind": "pbt", "every_images": 512})
    config = {KIND: "min_snr", GAMMA: 60.0, MEAN: -3.6, "optimizer.warmup_images": 42, "other": 1}
    random.seed(0)
    made = [allowed(plan, config) for _ in range(60)]
    assert {one[KIND] for one in made} == {"edm", "min_snr"}
    assert sum(one[KIND] == "min_snr" for one in made) > 40  # mostly kept
    assert all(one in ({**config, GAMMA: 50.0, MEAN: -3.0}, {**config, KIND: "edm", MEAN: -3.0}) for one in made)
    assert {GAMMA in values(plan, one) for one in made} == {True, False}
    assert scheduler(plan) is not None
    plan = plan_of(sweep, "random", space={"objective.weighting": {"choice": [{"kind": "edm"}]}})
    choices = ({"kind": "edm"}, {"kind": "none such"})
    refused = replace(plan, space=Space((replace(plan.space.dimensions[0], choices=choices),)))
    bad = {"objective.weighting": '{"kind": "none such"}'}
    drawn_again = {allowed(refused, bad)["objective.weighting"] for _ in range(60)}
    assert '{"kind": "edm"}' in drawn_again


def test_a_callback_that_can_t_be_set_up_is_one_line_with_its_name(sweep: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = f"sqlite:///{tmp_path}/file/no-folder.db"
    (made,) = callbacks(plan_of(sweep, "random", callbacks={"mlflow": {"tracking_uri": place}}))
    with pytest.raises(UserError, match=r"^callbacks\.mlflow: ") as found:
        made.setup()
    assert "\n" not in str(found.value)


def test_callbacks_are_ray_tune_s_by_name_with_the_study_s_name(sweep: dict[str, Any]) -> None:
    names = {"mlflow": {"tracking_uri": "sqlite:///a"}, "tensorboard": None, "csv": {}, "ray.tune:Callback": {}}
    made: list[Any] = callbacks(plan_of(sweep, "random", callbacks=names))
    assert [type(one).__name__ for one in made] == [
        "MLflowLoggerCallback", "TBXLoggerCallback", "CSVLoggerCallback", "Callback",
    ]  # fmt: skip
    assert (made[0].experiment_name, made[0].tracking_uri) == ("study", "sqlite:///a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks.mlflow={tracking_url: a}"], "callbacks.mlflow: options.tracking_url: unknown key; did you mean"),
        (["callbacks.aim={}"], "callbacks.aim: aim must be installed!"),
        (["search={kind: tpe, options: {n_ei: 3}}"], "search: options.n_ei: unknown key"),
        (["search={kind: optuna, options: {sampler: TPE}}"], "search: 'optuna.samplers:TPE' can't be imported"),
        (["search.kind=absent.module:Search"], "search: kind 'absent.module:Search': can't be imported on"),
        (["search.kind=json:loads"], "search: 'json:loads' is no class"),
        (["search.kind=json:JSONDecoder"], "search: 'json:JSONDecoder' can't search this space"),
        (["search.kind=bohb"], "search: HpBandSter must be installed!"),
        (["scheduler={kind: asha, grace_images: 512, options: {brackets: 0}}"], "scheduler: brackets must be positive"),
        (["scheduler={kind: asha, grace_images: 512, options: {bracket: 1}}"], "scheduler: options.bracket: unknown"),
    ],
)
def test_what_a_plugin_refuses_is_one_line(sweep: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_plugins(load_sweep(sweep, overrides))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1, str(error.value)
    check_plugins(load_sweep(sweep))


def test_all_plugins_mistakes_are_found_at_once(sweep: dict[str, Any]) -> None:
    overrides = ["search={kind: tpe, options: {n_ei: 3}}", "callbacks={mlflow: {a: 1}, csv: {b: 2}}"]
    with pytest.raises(UserError) as error:
        check_plugins(load_sweep(sweep, overrides))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()] == [
        "sweep", "search", "callbacks.mlflow", "callbacks.csv",
    ]  # fmt: skip
