"""Studies on Ray: ASHA frees what it stops, PBT exchanges weights, kills lose nothing, sampler sweeps train once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from waiting import PATIENCE_S

from scoreray.data.errors import UserError
from scoreray.data.storage.arrow import arrow_location
from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.checkpoint import committed, latest, open_checkpoint
from scoreray.trainer.config import load_config
from scoreray.trainer.prepare import check_run
from scoreray.trainer.run_folder import run_store
from scoreray.tune.load import load_sweep
from scoreray.tune.report import make_report
from scoreray.tune.schedule import best_of
from scoreray.tune.study import State, Study
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import read_trials, study_store, trial_config

ROOM = {"CPU": 2.0}
MEAN = "objective.sigma_sampling.P_mean"


def trial_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "Trainable" in " ".join(process.cmdline()):
                found.append(process)
    return found


def placement_groups() -> int:
    """Of this Ray, those that hold resources or wait for them."""
    import ray

    return sum(one["state"] != "REMOVED" for one in ray.util.placement_group_table().values())


def analysis(plan: StudyPlan, start: int = 1) -> Any:
    """Ray Tune's own view of a start of a study."""
    from ray.tune import ExperimentAnalysis

    filesystem, place = arrow_location(study_store(plan.sweep).url(f"ray/study-{start}"))
    return ExperimentAnalysis(place, storage_filesystem=filesystem)


def runs_of(plan: StudyPlan) -> set[str]:
    return {key.split("/")[1] for key, _ in study_store(plan.sweep).list("runs/") if key.endswith("COMMITTED.json")}


@pytest.mark.slow
def test_asha_stops_trials_and_later_ones_get_their_resources(ray_cluster: None, sweep: dict[str, Any]) -> None:
    """20 trials on 2 cores: never more than two at once, most stopped early, the planted noise levels found."""
    plan = load_sweep(
        {**sweep, "space": {MEAN: {"uniform": [-6.0, 6.0]}}, "trials": 20,
         "scheduler": {"kind": "asha", "grace_images": 256, "reduction": 2}}
    )  # fmt: skip
    most, processes = 0, set[int]()

    def look(state: State) -> None:
        nonlocal most
        most = max(most, len(state.running))
        processes.update(process.pid for process in trial_processes())

    groups = placement_groups()
    study = Study(plan, ROOM, show=look)
    trials = study.run()
    assert placement_groups() == groups
    stopped = [trial for trial in trials if trial.state == "stopped"]
    assert len(trials) == 20
    assert {trial.state for trial in trials} == {"done", "stopped"}
    assert len(stopped) >= 8
    assert most == 2
    assert len(processes) == 2  # twenty trials in two processes
    assert sum(trial.images for trial in trials) < 0.6 * 20 * plan.total
    best = best_of(plan, trials)[0]
    assert -3.5 < best.values[MEAN] < 1.5  # the metric's levels are 0.02 to 5, ln sigma -3.9 to 1.6
    deadline = time.monotonic() + PATIENCE_S
    while trial_processes():
        assert time.monotonic() < deadline, "processes of trials are left"
        time.sleep(0.1)

    report = make_report(plan, trials)
    record = json.loads(study_store(plan.sweep).get("report.json"))
    assert record["best"]["number"] == best.number
    assert record["default"]["values"] == {MEAN: -1.2}
    assert len(record["best"]["curve"]) == 8
    page = study_store(plan.sweep).get("report.html").decode()
    assert page.count("<img") >= 4
    config = load_config(report.best_url)  # what `scoreray train best.yaml` reads
    check_run(config)
    assert config.objective.sigma_sampling == plan.config(best.values).objective.sigma_sampling


@pytest.mark.slow
def test_population_based_training_exchanges_weights(
    ray_cluster: None, sweep: dict[str, Any], new_listeners: Any
) -> None:
    plan = load_sweep(
        {**sweep, "space": {"optimizer.learning_rate": {"log": [1e-6, 1e-2]}},
         "scheduler": {"kind": "pbt", "every_images": 512}},
        ["base.duration.images=1536"],
    )  # fmt: skip
    with new_listeners() as listeners:
        trials = Study(plan, ROOM).run()
    listeners.check()
    assert {trial.state for trial in trials} == {"done"}
    taken = [(trial, one) for trial in trials for one in trial.lineage if one["source"] is not None]
    assert len(taken) == 2  # at 512 and at 1,024 images the worst of four
    for trial, one in taken:
        donor = next(r for r in trials[one["source"]].reports if r["images"] == one["images"])
        run = next(r["run"] for r in trial.reports if r["images"] > one["images"])
        store = run_store(trial_config(plan, one["values"], run))
        folder = committed(store)[0]
        copied = open_checkpoint(store, folder)
        assert copied.images_seen == one["images"]
        source = trial_config(plan, {}, donor["run"])
        given = open_checkpoint(run_store(source), "checkpoints/" + donor["checkpoint"].rpartition("/")[2])
        after = latest(store)
        assert after is not None
        for key in ("master", "ema_0.100", "exp_avg"):
            theirs, ours, later = given.full_state(key), copied.full_state(key), after.full_state(key)
            assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
            assert any(not torch.equal(theirs[name], later[name]) for name in theirs)
        assert one["values"] != {}
        before = next(r["run"] for r in trial.reports if r["images"] == one["images"])
        own = latest(run_store(trial_config(plan, {}, before)))
        assert own is not None  # what it had learnt itself was something else
        assert any(not torch.equal(a, b) for a, b in zip(own.full_state().values(), ours.values(), strict=False))


@pytest.mark.slow
def test_a_killed_driver_loses_no_trial_and_runs_none_twice(
    ray_cluster: None, sweep: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL to `scoreray tune` when some trials have ended and two are under way; the same sweep goes on."""
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**sweep, "trials": 5}))
    plan = load_sweep(file, ["base.duration.images=16384", "base.checkpoint.every_images=1024"])
    command = [sys.executable, "-m", "scoreray.cluster.cli", "tune", str(file), "base.duration.images=16384",
               "base.checkpoint.every_images=1024"]  # fmt: skip
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    store, family = study_store(plan.sweep), list[psutil.Process]()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()
        trials = read_trials(store)
        under_way = [t for t in trials if t.state == "running" and committed(run_store(trial_config(plan, t.values)))]
        if any(t.state == "done" for t in trials) and under_way:
            break
        family = psutil.Process(driver.pid).children(recursive=True)
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    psutil.wait_procs(family, timeout=PATIENCE_S)  # its trials may commit once more before their Ray ends
    dead_at = time.time()
    before = {trial.number: trial for trial in read_trials(store)}
    half = {t.number: latest(run_store(trial_config(plan, t.values))) for t in under_way}

    notes: list[str] = []
    trials = Study(plan, ROOM, notes.append).run()
    assert [trial.number for trial in trials] == list(range(5))
    assert {trial.state for trial in trials} == {"done"}
    assert len(runs_of(plan)) == 5
    for trial in trials:
        assert len(trial.reports) == 1  # nothing was computed twice
        if trial.number in before:
            assert trial.values == before[trial.number].values
            if before[trial.number].state == "done":
                assert trial.reports == before[trial.number].reports
    seen = {str(trial): trial for trial in analysis(plan, start=2).trials}  # also those that had ended before
    assert [seen[f"{trial.number:05d}"].last_result["denoising"] for trial in trials] == [
        trial.reports[0]["metrics"]["denoising"] for trial in trials
    ]
    for number, checkpoint in half.items():
        assert checkpoint is not None
        start = json.loads(store.get(f"runs/{trials[number].run}/metrics/{checkpoint.images_seen:012d}.jsonl")
                           .splitlines()[0])  # fmt: skip
        assert start["time"] < dead_at  # the records of before the kill still stand
    with pytest.raises(UserError, match=r"(?s)another sweep.*P_mean.*uniform"):
        Study(load_sweep({**sweep, "space": {MEAN: {"uniform": [0, 1]}}}), ROOM)


@pytest.mark.slow
def test_a_killed_trial_goes_on_from_its_newest_checkpoint(ray_cluster: None, sweep: dict[str, Any]) -> None:
    plan = load_sweep({**sweep, "trials": 1}, ["base.duration.images=32768", "base.checkpoint.every_images=2048"])
    killed, notes = list[int](), list[str]()

    def kill_once(state: State) -> None:
        running = list(state.running.values())
        if not killed and running and committed(run_store(trial_config(plan, running[0].trial.values))):
            (process,) = trial_processes()
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    (trial,) = Study(plan, ROOM, notes.append, kill_once).run()
    assert killed
    assert trial.state == "done"
    assert trial.deaths == 1
    (note,) = [line for line in notes if "its process died" in line]
    assert "continues from 0 images" not in note


@pytest.mark.slow
def test_a_sweep_of_the_sampler_and_the_ema_length_trains_once(ray_cluster: None, sweep: dict[str, Any]) -> None:
    """Several metrics: the Pareto front of quality and cost; and no trial beats another in both."""
    space = {"sample.steps": {"choice": [4, 8, 16]}, "sample.ema": {"choice": [0.1, 0.2]}}
    plan = load_sweep({**sweep, "space": space, "search": {"kind": "grid"}, "trials": 6},
                      ["metric.names=[sw, nfe]", "metric.samples=64"])  # fmt: skip
    trials = Study(plan, ROOM).run()
    assert {trial.state for trial in trials} == {"done"}
    assert len(runs_of(plan)) == 1
    assert len({json.dumps(trial.values) for trial in trials}) == 6
    front = [trial.metrics for trial in best_of(plan, trials) if trial.metrics]
    assert 1 <= len(front) <= 6
    assert {m["nfe"] for t in trials if (m := t.metrics)} == {7.0, 15.0, 31.0}
    lengths = {trial.values["sample.ema"]: trial.reports[0]["ema"] for trial in trials}
    assert lengths == {0.1: "0.100", 0.2: "0.200"}

    checkpoint = trials[0].reports[0]["checkpoint"]
    again = {key: value for key, value in sweep.items() if key != "base"}
    drawn = load_sweep({**again, "checkpoint": checkpoint, "space": {"sample.steps": {"choice": [5]}}, "trials": 3},
                       ["metric.names=[sw, nfe]", "metric.samples=64", "study.name=drawn"])  # fmt: skip
    same = Study(drawn, ROOM).run()
    assert {trial.state for trial in same} == {"done"}
    assert len({json.dumps(trial.metrics) for trial in same}) == 1
    assert not runs_of(drawn)
    records = [key for key, _ in study_store(drawn.sweep).list("evaluations/") if key.endswith("record.json")]
    assert len(records) == 1  # three trials that draw alike are one evaluation


def test_a_trial_that_diverges_fails_alone(ray_cluster: None, sweep: dict[str, Any]) -> None:
    """As soon as its loss is not finite; or, where the only step has ruined the weights, when its samples are not.
    Neither is tried again."""
    space = {"data.global_batch_size": {"choice": [64, 1024]}, "optimizer.gradient_clip": {"choice": [0.0]},
             "optimizer.learning_rate": {"choice": [1e-3, 1e18]}}  # fmt: skip
    plan = load_sweep({**sweep, "space": space, "search": {"kind": "grid"}},
                      ["base.duration.images=1024", "metric.names=[sw]", "metric.samples=64"])  # fmt: skip
    trials = Study(plan, ROOM).run()
    found = {(t.values["data.global_batch_size"], t.values["optimizer.learning_rate"]): t for t in trials}
    assert {key: trial.state for key, trial in found.items()} == {
        (64, 1e-3): "done", (1024, 1e-3): "done", (64, 1e18): "failed", (1024, 1e18): "failed"
    }  # fmt: skip
    assert "loss" in found[64, 1e18].error
    assert "not finite" in found[1024, 1e18].error
    assert "loss" not in found[1024, 1e18].error
    assert {trial.deaths for trial in trials} == {0}
    best = trials[make_report(plan, trials).record["best"]["number"]]
    assert best.state == "done"
    seen = analysis(plan)
    assert [str(trial) for trial in sorted(seen.trials, key=str)] == [f"{trial.number:05d}" for trial in trials]
    theirs = seen.get_best_trial("sw", "min")
    assert theirs.config == best.values
    assert theirs.last_result["sw"] == best.reports[0]["metrics"]["sw"]
    assert {trial.error for trial in trials if trial.state == "failed"} <= set(seen.results_df["error"])


def test_a_config_in_s3_is_read_as_one_on_disk(local_s3: Any, s3_url: str, sweep: dict[str, Any]) -> None:
    """Where a study's best.yaml is stored, and how the command line passes its name on."""
    text = yaml.safe_dump({**sweep["base"], "run": {"name": "best", "storage": s3_url}})
    open_store(s3_url).put("best.yaml", text.encode())
    assert load_config(Path(f"{s3_url}/best.yaml")).duration.images == 2048
    with pytest.raises(UserError, match="no such config file"):
        load_config(f"{s3_url}/worst.yaml")


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on_to_a_best_config_that_trains(
    local_s3: Any, s3_url: str, sweep: dict[str, Any], tmp_path: Path
) -> None:
    """A study in S3, stopped as a terminal does it (the whole group gets SIGINT) long before a commit is due."""
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**sweep, "study": {"name": "study", "storage": s3_url}, "trials": 3}))
    plan = load_sweep(file, ["base.duration.images=65536"])
    tune = [sys.executable, "-m", "scoreray.cluster.cli", "tune", str(file), "base.duration.images=65536"]
    driver = subprocess.Popen(tune, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    store, deadline = study_store(plan.sweep), time.monotonic() + PATIENCE_S
    while not any(key.endswith("/config.yaml") for key, _ in store.list("runs/")):
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.2)
    family = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)
    out, errors = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130, errors
    assert out == ""
    assert errors.splitlines()[-1] == "scoreray: stopped; the same command goes on from what is committed"
    assert "Traceback" not in errors
    assert "Unhandled error" not in errors  # Ray's, with a stack but without that word
    assert not psutil.wait_procs(family, timeout=PATIENCE_S)[1]
    saved = {trial.number: latest(run_store(trial_config(plan, trial.values))) for trial in read_trials(store)}
    assert not any(checkpoint and checkpoint.images_seen >= plan.total for checkpoint in saved.values())

    done = subprocess.run(tune, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stderr
    trials = read_trials(store)
    assert [trial.state for trial in trials] == ["done"] * 3
    for trial in trials:
        start = json.loads(store.get(f"runs/{trial.run}/metrics/{plan.total:012d}.jsonl").splitlines()[0])["images"]
        before = saved.get(trial.number)
        assert len(trial.reports) == 1
        assert start > (before.images_seen if before else 0)
    assert {"report.html", "report.json", "best.yaml"} <= {key for key, _ in store.list()}
    assert len(analysis(plan, start=2).trials) == 3
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [
        key for key, _ in store.list("ray/") if secret in store.get(key) or secret.hex().encode() in store.get(key)
    ]

    train = [sys.executable, "-m", "scoreray.cluster.cli", "train", store.url("best.yaml"), "--json"]
    trained = subprocess.run(train, capture_output=True, text=True, timeout=300)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["images_seen"] == plan.total
    assert json.loads(trained.stdout)["run"] == f"{s3_url}/study-best"


@pytest.mark.slow
def test_a_trial_of_two_workers_is_a_sharded_run(ray_cluster: None, sweep: dict[str, Any]) -> None:
    plan = load_sweep({**sweep, "trials": 1}, ["base.scaling.workers=2", "base.engine.zero_stage=2"])
    groups = placement_groups()
    (trial,) = Study(plan, {"CPU": 4.0}).run()
    assert placement_groups() == groups
    assert trial.state == "done", trial.error
    config = trial_config(plan, trial.values)
    assert config.engine.zero_stage == 2
    checkpoint = latest(run_store(config))
    assert checkpoint is not None
    assert checkpoint.images_seen == plan.total
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= checkpoint.marker.files.keys()
