"""Every bad sweep is refused before the first trial, in one line that says what to fix."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import read_samples
from scoreray.sampling.offline.generate import Request
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.tune.load import check_room, check_sweep, load_sweep
from scoreray.tune.metric import held_out
from scoreray.tune.space import with_values
from scoreray.tune.sweep import draw_settings, goals

CONFIGS = Path(__file__).parents[2] / "configs" / "tune"
MEAN = "objective.sigma_sampling.P_mean"

BAD_SPACES: list[tuple[dict[str, Any], str]] = [
    ({MEAN: {"uniform": [5, 1]}}, "reversed; write [1.0, 5.0]"),
    ({MEAN: {"uniform": [1, 1]}}, "is empty"),
    ({MEAN: {"uniform": [float("nan"), 1]}}, "nan is not accepted; it should be a finite number"),
    ({MEAN: {"uniform": [0, float("inf")]}}, "inf is not accepted; it should be a finite number"),
    ({"objective.weighting.kind": {"choice": []}}, "choice is empty"),
    ({"objective.weighting.kind": {"choice": ["edm", "edm"]}}, "names a value twice"),
    ({"objective.weighting.kind": {"choice": ["edm", "min_snrr"]}}, "did you mean 'min_snr'"),
    ({"objective.sigma_sampling.P_maen": {"uniform": [0, 1]}}, "did you mean 'P_mean'"),
    ({"optimiser.learning_rate": {"log": [1e-4, 1e-2]}}, "did you mean 'optimizer'"),
    ({"optimizer.learning_rate": {"log": [0, 1e-2]}}, "must be above 0"),
    ({"objective.sigma_sampling.P_std": {"uniform": [-1, 2]}}, "at -1.0: "),
    ({"data.global_batch_size": {"int": [0, 64]}}, "at 0: data.global_batch_size"),
    ({MEAN: {"uniform": [0, 1], "log": [1, 2]}}, "uniform and log are given"),
    ({MEAN: {}}, "none is given"),
    ({MEAN: {"log": True, "uniform": [0, 1]}}, "log: true is for int"),
    ({MEAN: {"unifrom": [0, 1]}}, "did you mean 'uniform'"),
    ({MEAN: {"uniform": [0, 1], "when": {"objective.weihting.kind": "edm"}}}, "unknown key 'objective.weihting.kind'"),
    ({"objective.weighting.kind": {"choice": ["edm", "min_snr"]},
      "objective.weighting.gamma": {"log": [1, 9], "when": {"objective.weighting.kind": "soft"}}}, "is never 'soft'"),
    ({"objective.weighting.gamma": {"log": [1, 9]}}, "objective.weighting.gamma: unknown key"),
    ({MEAN: {"uniform": [0, 1], "when": {MEAN: 1}}}, "depends on itself"),
    ({"run.seed": {"int": [0, 9]}}, "space.run.seed: run and duration are not searched"),
    ({"duration": {"choice": [{"images": 1024}, {"images": 2048}]}}, "space.duration: run and duration are not"),
    ({"run": {"choice": [{"seed": 1}, {"seed": 2}]}}, "space.run: run and duration are not searched"),
    ({"log": {"choice": [{"every_images": 100}, {"every_images": 200}]}}, "space.log: changes nothing that a metric"),
    ({"optimizer": {"choice": [{"learning_rate": 0.001}, {"learning_rate": 0.002}]},
      "optimizer.learning_rate": {"choice": [0.005, 1e30]}}, "space.optimizer: sets space.optimizer.learning_rate too"),
    ({"objective.weighting": {"choice": [{"kind": "edm"}, {"kind": "sigma2"}]},
      MEAN: {"uniform": [0, 1], "when": {"objective.weighting.kind": "edm"}}}, "is in space.objective.weighting"),
    ({"sample.step": {"int": [4, 9]}}, "did you mean 'steps'"),
    ({}, "space: is empty"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "choice", "default"),
    [
        ("optimizer.learning_rate", "[1e-3, 2e-3]", 2e-3),
        ("optimizer.learning_rate", "['1e-3', '2e-3']", "2e-3"),
        ("optimizer.warmup_images", "[0.5k, 1k, 10k]", "1k"),
        ("optimizer.warmup_images", "[500, 1E3]", 1000),
        ("data.num_lanes", "[~, 64]", None),
        ("optimizer.learning_rate", "[1e-3, 5e-3]", "none"),
    ],
)
def test_the_base_s_own_value_is_found_among_the_choices_however_it_is_written(
    sweep: dict[str, Any], tmp_path: Path, key: str, choice: str, default: Any
) -> None:
    sweep["base"]["optimizer"] |= {"warmup_images": 1000}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in sweep.items() if name != "space"}))
    file.write_text(file.read_text() + f"space: {{{key}: {{choice: {choice}}}}}\n")
    found = load_sweep(file).default()
    assert found == (None if default == "none" else {key: default})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: " + "[" * 20_000, "nested too deeply"),
        ("study: {name: a}\nstudy: {name: b}", "key 'study' stands here again, after line 1"),
        ("space: {a: 2024-13-45}", "'2024-13-45' is not a dimension"),
        ("space: {1: {uniform: [0, 1]}}", "put it in quotes"),
        ("trials: !!int abc", "tags are not read"),
        ("trials: " + "9" * 5000, "too long for a number"),
        ("base: deep.yaml", "base: .*deep.yaml: .*nested too deeply"),
    ],
)
def test_a_sweep_that_is_no_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "deep.yaml").write_text("{a: " * 5000)
    (tmp_path / "sweep.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_sweep(tmp_path / "sweep.yaml")
    assert max(map(len, str(caught.value).splitlines())) < 400
    with pytest.raises(UserError, match=r"nested too deeply|is not an override"):
        load_sweep(CONFIGS / "laptop.yaml", ["space=" + "[" * 20_000] if "[" in text else ["base" + ".a" * 3000 + "=1"])


@pytest.mark.parametrize(("space", "message"), BAD_SPACES, ids=[message[:24] for _, message in BAD_SPACES])
def test_a_bad_space_is_one_line(sweep: dict[str, Any], space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_sweep({**sweep, "space": space})
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1, str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metric.sigma_min=9"], "must be below metric.sigma_max"),
        (["metric.names=[fidd]"], "metric.names.0: unknown metric 'fidd'; did you mean 'fid'"),
        (["metric.names=[theirs.fid]"], "a part of yours is written package.module:Name"),
        (["scheduler.kind=asha"], "scheduler.grace_images: missing"),
        (["scheduler.kind=asha", "scheduler.grace_images=1M"], "must be between"),
        (["scheduler.kind=pbt", "scheduler.every_images=512", "trials=2"], "pbt needs at least 4"),
        (["scheduler.kind=asha", "scheduler.grace_images=512", "metric.names=[denoising, nfe]"], "needs one metric"),
        (
            ["scheduler.kind=pbt", "scheduler.every_images=512", "space={network: {choice: [{kind: mlp}]}}"],
            "space.network: can't change within a trial",
        ),
        (
            ["scheduler.kind=pbt", "scheduler.every_images=512", "space={optimizer: {choice: [{schedule: constant}]}}"],
            "space.optimizer: can't change within a trial",
        ),
        (["space={sample.steps: {int: [4, 9]}}"], "space.sample.steps: changes nothing that metric.names (denoising)"),
        (["metric.names=[nfe]", "space={sample.ema: {choice: [0.1]}}"], "add one of fid, kid, sw to them"),
        (["search.kind=hyperop"], "search.kind: 'hyperop' is not known; did you mean 'hyperopt'?"),
        (["scheduler.kind=hyperband"], "scheduler.every_images: missing; hyperband needs"),
        (["callbacks.mlfow={}"], "callbacks: 'mlfow' is not known; did you mean 'mlflow'?"),
        (["search={kind: random, options: {a: 3}}"], "search.options: 'random' has none"),
        (["search.kind=ax", "metric.names=[denoising, nfe]"], "search.kind: 'ax' needs one metric"),
        (
            ["scheduler={kind: pb2, every_images: 512}", "space={optimizer.gradient_clip: {choice: [1.0]}}"],
            "space.optimizer.gradient_clip: pb2 explores ranges that always exist",
        ),
        (["scheduler={kind: pbt, every_images: 512}", "search.kind=ax"], "search.kind: 'ax' with pbt"),
        (["study=5"], "study: 5 is not a section; write study: {KEY: VALUE, ...}"),
        (["base=5"], "base: 5 is not a section"),
        (["base=/absent.yaml"], "base: /absent.yaml: no such config file"),
        (["space={a.b: 5}"], "space.a.b: 5 is not a dimension; write {uniform: [LOW, HIGH]}"),
        (["space={a.b: {uniform: 5}}"], "space.a.b.uniform: 5 is not a range; write [LOW, HIGH]"),
        (["space={a.b: {choice: 5}}"], "space.a.b.choice: 5 is not a list"),
        (["space={a.b: {choice: [5], when: 3}}"], "space.a.b.when: 3 is not a condition"),
        (["study.nam=x"], "did you mean 'name'"),
        (["base.duration.images=0"], "base: duration.images"),
        (["resources.cpus=0"], "resources.cpus"),
    ],
)
def test_a_bad_setting_is_one_line(sweep: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_sweep(sweep, overrides)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1, str(error.value)


def test_mistakes_are_counted_without_their_headings(sweep: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        load_sweep(sweep, ["base.foo=1", "base.bar=2", "metric.sigma_min=9"])
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError) as error:
        load_sweep(sweep, ["base.foo=1", "base.bar=2"])
    head, *lines = str(error.value).splitlines()
    assert head == "sweep: 2 mistakes"
    assert [line.strip()[:9] for line in lines] == ["base: foo", "base: bar"]


def test_a_run_config_and_a_sweep_are_distinguished() -> None:
    file = CONFIGS.parent / "cifar10.yaml"
    with pytest.raises(UserError, match=rf"this is a run's config, not a sweep's: scoreray train {file}$"):
        load_sweep(file)


def test_the_sweep_of_the_weighting_searches_nothing_else() -> None:
    space = yaml.safe_load((CONFIGS / "weighting.yaml").read_text())["space"]
    assert all(key.startswith("objective.weighting.") for key in space)


def test_levels_that_are_searched_one_by_one_are_a_grid_whatever_they_are() -> None:
    plan = load_sweep(CONFIGS / "grid.yaml")
    for seed in range(20):
        values = plan.space.draw(random.Random(seed), plan.base)
        drawn = draw_settings(plan.sweep, values)
        request = Request(count=1, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"])
        assert (request.steps, request.grid[0]) == (6, 80.0)
        assert all(high > low for high, low in pairwise(request.grid))
        assert sorted(request.grid) == sorted(v for key, v in values.items() if key.startswith("sample.levels."))
    with pytest.raises(UserError, match=r"space.sample.steps: the levels under sample.levels.NAME are the grid"):
        load_sweep(CONFIGS / "grid.yaml", ["space={sample.levels.0: {log: [1, 2]}, sample.steps: {int: [4, 9]}}"])


def test_a_base_given_on_the_command_line_is_loaded(sweep: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(sweep["base"]))
    plan = load_sweep(sweep, [f"base={tmp_path / 'base.yaml'}", "base.duration.images=4096"])
    assert plan.total == 4096


def test_checks_that_need_the_stores_or_the_cluster(sweep: dict[str, Any], points: dict[str, str]) -> None:
    assert check_sweep(load_sweep(sweep)) == []
    check_room(load_sweep(sweep), {"CPU": 2.0})
    with pytest.raises(UserError, match="a trial needs 4 CPU, the cluster has 2"):
        check_room(load_sweep(sweep, ["resources.cpus=4"]), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"at 8 a trial needs 8 CPU"):
        check_room(load_sweep({**sweep, "space": {"scaling.workers": {"choice": [1, 8]}}}), {"CPU": 2.0})
    for key in ("metric.reference", "base.data.url"):
        with pytest.raises(UserError, match=rf"^{key}: /tmp/absent-from-here: no data set here"):
            check_sweep(load_sweep(sweep, [f"{key}=/tmp/absent-from-here"]))
    (line,) = check_sweep(load_sweep(sweep, ["metric.count=100000"]))
    assert line == f"metric.count: 100,000 images asked for, {points['held']} holds 512; all of these are used"
    assert len(held_out(points["held"], 100_000).x0) == 512
    with pytest.raises(UserError, match="unknown sampler 'heunn'"):
        check_sweep(load_sweep({**sweep, "space": {"sample.sampler": {"choice": ["heun", "heunn"]}}},
                               ["metric.names=[sw]"]))  # fmt: skip
    with pytest.raises(UserError, match="bpd is of 8-bit images"):
        check_sweep(load_sweep(sweep, ["metric.names=[bpd]"]))
    with pytest.raises(UserError, match=r"metric: --extractor classifier: .* in 0 of its 0 classes"):
        check_sweep(load_sweep(sweep, ["metric.names=[fid]", "metric.extractor=classifier"]))
    for given, named in ((0.1, "0.100"), ("0.2", "0.200"), ("5e-2", "0.050")):
        lengths = load_sweep({**sweep, "space": {"sample.ema": {"choice": [given, "0.100", "1e-1"]}}},
                             ["metric.names=[sw]"])  # fmt: skip
        assert named in lengths.config({}).ema.names
        assert len(lengths.config({}).ema.names) == (1 if named == "0.100" else 2)
        assert check_sweep(lengths) == []


def test_somebody_elses_metric_compares_trials(
    sweep: dict[str, Any], own_package: Callable[..., Path], tmp_path: Path
) -> None:
    """As `evaluate --metrics` computes it of a trial's samples; less is better."""
    source = "def mean(samples, reference):\n    return {'far': (samples.mean(0) - reference.mean(0)).norm()}"
    own_package("theirs", far=source)
    settings = ["metric.names=[theirs.far:mean]", "metric.extractor=identity", "metric.samples=32"]
    plan = load_sweep(sweep, [*settings, "space={sample.steps: {int: [2, 4]}}"])
    assert check_sweep(plan) == []
    assert goals(plan.sweep) == ("theirs.far:mean", "min")
    with pytest.raises(UserError, match=r"metric: names 'theirs.far:absent': theirs.far has no 'absent'"):
        check_sweep(load_sweep(sweep, ["metric.names=[theirs.far:absent]", "metric.extractor=identity"]))


def test_training_images_as_held_out_ones_are_warned_of(
    sweep: dict[str, Any], points: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(points["train"], tmp_path / "copy")
    for url in (points["train"], points["train"] + "/", str(tmp_path / "copy")):
        (line,) = check_sweep(load_sweep(sweep, [f"metric.reference={url}"]))
        assert "holds the images that are trained on" in line
    same = load_sweep(sweep, [f"metric.reference={points['train']}", "metric.names=[sw, nfe]"])
    assert check_sweep(same) == []  # distances between samples are often to those


def test_data_that_no_trial_could_train_on_are_refused(
    sweep: dict[str, Any], points: dict[str, str], tmp_path: Path
) -> None:
    data = read_samples(points["train"], range(64)).numpy()
    np.savez(tmp_path / "large.npz", points=1e6 * data)
    large = str(tmp_path / "large")
    pack(tmp_path / "large.npz", large)
    with pytest.raises(
        UserError, match=r"^base: data.url: the data have .* noise levels from .* only; set data.normalisation=channel"
    ):
        check_sweep(load_sweep(sweep, [f"base.data.url={large}"]))
    fits = {**sweep, "space": {"process.sigma_max": {"log": [1e3, 1e9]}}}
    assert any(line.startswith("base: data.url") for line in check_sweep(load_sweep(fits, [f"base.data.url={large}"])))


def test_conditions_decide_which_dimensions_exist(sweep: dict[str, Any]) -> None:
    space = {
        "objective.weighting.gamma": {"log": [1, 9], "when": {"objective.weighting.kind": ["min_snr", "soft_min_snr"]}},
        "objective.weighting.kind": {"choice": ["edm", "min_snr", "soft_min_snr"]},
    }
    plan = load_sweep({**sweep, "space": space})
    drawn = [plan.space.draw(random.Random(i), plan.base) for i in range(50)]
    for values in drawn:
        assert ("objective.weighting.gamma" in values) == (values["objective.weighting.kind"] != "edm")
        assert plan.config(values).objective.weighting.kind == values["objective.weighting.kind"]
    assert {len(values) for values in drawn} == {1, 2}
    assert len(plan.space.grid(3, plan.base)) == 1 + 3 + 3


def test_a_new_kind_starts_a_new_section_and_nothing_else_changes(sweep: dict[str, Any]) -> None:
    raw = {"process": {"kind": "edm", "sigma_max": 80.0}, "ema": {"stds": [0.1]}}
    before = copy.deepcopy(raw)
    made = with_values(raw, {"process.kind": "vp", "process.beta_max": 10.0, "sample.steps": 3})
    assert made == {"process": {"kind": "vp", "beta_max": 10.0}, "ema": {"stds": [0.1]}}
    assert raw == before


def test_an_outer_kind_does_not_undo_an_inner_one(sweep: dict[str, Any]) -> None:
    space = {"objective.weighting.kind": {"choice": ["sigma2"]}, "objective.kind": {"choice": ["edm", "denoising"]}}
    plan = load_sweep({**sweep, "space": space})
    for values in plan.space.grid(1, plan.base):
        objective = plan.config(values).objective
        assert (objective.kind, objective.weighting.kind) == (values["objective.kind"], "sigma2")


def test_a_whole_section_is_a_dimension(sweep: dict[str, Any]) -> None:
    choices = [{"learning_rate": 0.001, "gradient_clip": 1.0}, {"learning_rate": 0.002, "gradient_clip": 0.0}]
    plan = load_sweep({**sweep, "space": {"optimizer": {"choice": choices}}})
    found = [plan.config(values).optimizer for values in plan.space.grid(1, plan.base)]
    assert [(one.learning_rate, one.gradient_clip) for one in found] == [(0.001, 1.0), (0.002, 0.0)]


def test_an_ema_length_that_is_searched_is_tracked_by_the_one_run(sweep: dict[str, Any]) -> None:
    plan = load_sweep({**sweep, "space": {"sample.ema": {"choice": [0.05, 0.1, 0.2]}}})
    assert not plan.space.trains
    assert plan.config({}).ema.names == ("0.100", "0.050", "0.200")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_spaces_are_valid(file: Path) -> None:
    plan = load_sweep(file)
    assert load_sweep(plan.sweep.dump()) == plan  # as study.json and report.json hold it
    assert plan.space.trains == (file.stem not in ("sampler", "curvature", "grid"))


def test_models_of_few_steps_are_compared_by_samples_of_their_own_sampler(
    sweep: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EDMObjective, "map", "consistency")
    with pytest.raises(UserError, match=r"metric.names: denoising: objective.kind 'edm' learns where .*; give fid"):
        check_sweep(load_sweep(sweep))
    space = {"sample.sampler": {"choice": ["heun", "consistency"]}}
    drawn = load_sweep({**sweep, "space": space, "metric": {**sweep["metric"], "names": ["sw", "nfe"]}})
    with pytest.raises(UserError, match=r"space.sample.sampler: at 'heun': sampler 'heun' needs") as caught:
        check_sweep(drawn)
    assert "at 'consistency'" not in str(caught.value)
