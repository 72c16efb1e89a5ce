"""What a sweep keeps when it is killed, seen from outside: the command, its exit status and what is in its folder.

Nothing is known of the engine: a moment is chosen by what has been stored by then. The moments are seeded, the machine
adds its own chance; a failure prints what was killed when.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # some 8 s a kill where nothing else runs

MEAN, RATE = "objective.sigma_sampling.P_mean", "optimizer.learning_rate"
LOOK_S = 0.02
# What is waited for before a kill, and how long at most after it. A start takes some 5 s until the first trial trains.
EVENTS = {"start": 6.0, "record": 1.0, "commit": 0.2, "report": 0.3, "end": 0.3}


@dataclass(frozen=True)
class Study:
    """A study's folder, as a stranger reads it."""

    file: Path
    folder: Path

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "scoreray.cluster.cli", "tune", str(self.file)]

    def records(self) -> dict[int, dict[str, Any]]:
        """Each trial's record by its number."""
        found = (json.loads(path.read_text()) for path in self.folder.glob("trials/*.json"))
        return {one["number"]: one for one in found}

    def reports(self) -> int:
        return sum(len(one["reports"]) for one in self.records().values())

    def commits(self) -> set[Path]:
        return set(self.folder.glob("runs/*/checkpoints/*/COMMITTED.json"))

    def newest_commits(self) -> dict[str, int]:
        """Images of each run's newest commit."""
        found: dict[str, int] = {}
        for path in self.commits():
            run, images = path.parents[2].name, int(path.parent.name.partition("-")[0])
            found[run] = max(found.get(run, 0), images)
        return found

    def ended(self) -> dict[int, tuple[dict[str, Any], dict[Path, int]]]:
        """Of each trial that has ended its record, and the files of its run with the time of their last change."""
        return {
            number: (one, {path: path.stat().st_mtime_ns for path in self._files(one["run"]) if path.name != "owner"})
            for number, one in self.records().items()
            if one["state"] != "running"
        }

    def _files(self, run: str) -> list[Path]:
        return [path for path in (self.folder / "runs" / run).rglob("*") if path.is_file()]

    def steps(self, run: str) -> list[tuple[int, float]]:
        """(images, time) of each line that a run's training has stored."""
        files = sorted((self.folder / "runs" / run / "metrics").glob("*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [(line["images"], line["time"]) for line in lines]


def made(sweep: dict[str, Any], folder: Path, **changes: Any) -> Study:
    """A sweep's file whose study is stored in `folder`, with trials of 16 commits each."""
    base = {**sweep["base"], "duration": {"images": 16384}, "checkpoint": {"every_images": 1024}}
    given = {**sweep, "base": base, "study": {"name": "study", "storage": str(folder)}, **changes}
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given))
    return Study(folder / "sweep.yaml", folder / "study")


def finish(study: Study) -> dict[str, Any]:
    """The command until it ends by itself; its report's record."""
    done = subprocess.run(study.command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads((study.folder / "report.json").read_text())


def moments(seed: int, **counts: int) -> Iterator[tuple[str, float]]:
    """What to wait for, and seconds after it: so many of each event in a seeded order, the end last."""
    rng = random.Random(seed)
    events = [event for event, count in counts.items() for _ in range(count)]
    rng.shuffle(events)
    events.sort(key="end".__eq__)
    return ((event, rng.uniform(0, EVENTS[event])) for event in events)


def happened(event: str, study: Study, before: Any) -> bool:
    if event == "record":
        return bool(study.records()) and study.records() != before
    if event == "commit":
        return not study.commits() <= before
    if event == "report":
        return study.reports() > before
    return (study.folder / "best.yaml").exists() or bool(
        before and len(study.ended()) == before  # the number of trials
    )


def wait(driver: subprocess.Popen, event: str, delay: float, study: Study, trials: int) -> None:
    """Until `delay` seconds after the event. Fails where the command ends before that."""
    seen: Any = {"record": study.records, "commit": study.commits, "report": study.reports,
                 "end": lambda: trials, "start": int}[event]()  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while event != "start" and not happened(event, study, seen):
        assert time.monotonic() < deadline, f"waited for a {event} in vain"
        if driver.poll() is not None:
            assert event == "end", f"ended before a {event}: {driver.returncode}"
            return
        time.sleep(LOOK_S)
    time.sleep(delay)


def kill(driver: subprocess.Popen, whole: bool) -> None:
    """SIGKILL to the command and, as when its machine loses power, to all that it has started."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in family if whole else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if whole:
        psutil.wait_procs(family, timeout=PATIENCE_S)


def killed_and_continued(study: Study, trials: int, seed: int, **counts: int) -> list[str]:
    """Kills the command at each of the moments, each time after giving it again; checks after each that nothing that
    had been reached was lost or done again. Returns what was done."""
    log, rng = list[str](), random.Random(f"whole {seed}")
    for event, delay in moments(seed, **counts):
        ended, reported, commits = study.ended(), study.records(), study.newest_commits()
        started = time.time()
        driver = subprocess.Popen(study.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait(driver, event, delay, study, trials)
        finally:
            whole = rng.random() < 0.7
            kill(driver, whole)
        what, now = "all" if whole else "driver alone", study.records()
        log.append(f"{event} + {delay:.2f} s, after {time.time() - started:.1f} s, {what}: {len(now)} trials, "
                   f"{len(study.ended())} ended, {study.reports()} reports")  # fmt: skip
        print(log[-1], flush=True)
        for number, record in reported.items():  # none is forgotten, nor a report changed
            assert now[number]["reports"][: len(record["reports"])] == record["reports"], log
            assert len(now[number]["lineage"]) >= len(record["lineage"]), log
        for number, (record, files) in ended.items():  # what has ended stays as it is
            assert now[number] == record, log
            assert study.ended()[number][1] == files, (number, log)
        for run, images in commits.items():  # no run begins before what it had committed
            assert study.newest_commits()[run] >= images, (run, log)
            after = [step for step, at in study.steps(run) if at > started]
            assert all(step > images for step in after), (run, images, after, log)
    return log


def check_each_step_once(study: Study, runs: int) -> None:
    names = sorted(path.name for path in (study.folder / "runs").iterdir())
    assert len(names) == runs, names
    for name in names:
        steps = [images for images, _ in study.steps(name)]
        assert all(b > a for a, b in pairwise(steps)), (name, steps)


def numbers(record: dict[str, Any]) -> list[Any]:
    """All of a study that its sweep decides, of its report."""
    return [
        (one["number"], one["state"], one["values"], one["metrics"], one["curve"],
         [(report["images"], report["metrics"]) for report in one["reports"]])
        for one in record["trials"]
    ]  # fmt: skip


def ends(record: dict[str, Any]) -> list[str]:
    """How far each trial came, for people."""
    return [f"{one['number']} {one['state']} {one['images']} {one['metrics']}" for one in record["trials"]]


def test_a_grid_killed_at_20_moments_ends_as_one_that_was_not(sweep: dict[str, Any], tmp_path: Path) -> None:
    """Two trials at once; start-up, the first records, in the middle of trials, beside reports, and while the page is
    drawn."""
    grid = {"space": {MEAN: {"uniform": [-3.0, 1.0]}, RATE: {"choice": [1e-3, 2e-3, 5e-3]}},
            "search": {"kind": "grid", "points": 4}, "trials": 12}  # fmt: skip
    whole = finish(made(sweep, tmp_path / "whole", **grid))
    study = made(sweep, tmp_path / "killed", **grid)
    log = killed_and_continued(study, 12, seed=1, start=6, record=5, commit=5, report=3, end=1)
    record = finish(study)
    assert len(log) == 20
    assert numbers(record) == numbers(whole), log
    assert record["best"]["number"] == whole["best"]["number"]
    check_each_step_once(study, runs=12)


def check_experiment(study: Study, record: dict[str, Any]) -> None:
    """Ray Tune's own analysis of the folder that it left has every trial's results, and the same best."""
    from ray import tune

    (folder,) = (study.folder / "ray").iterdir()
    found = tune.ExperimentAnalysis(str(folder))
    trials = {int(str(trial)): trial for trial in found.trials}
    for one in record["trials"]:
        expected = [(report["images"], report["metrics"]["denoising"]) for report in one["reports"]]
        frame = found.trial_dataframes[trials[one["number"]].trial_id]
        assert list(zip(frame["images"], frame["denoising"], strict=True)) == expected
    whole = [trial for trial in found.trials if trial.last_result["images"] == 16384]  # Tune counts stopped ones too
    best = min(whole, key=lambda trial: trial.last_result["denoising"])
    assert best is trials[record["best"]["number"]]
    assert best.config == record["best"]["values"]


def test_asha_decides_after_kills_what_it_would_have_decided(sweep: dict[str, Any], tmp_path: Path) -> None:
    """One trial at a time, so that the order of reports is the same: then who is stopped depends on all of them."""
    asha = {"space": {MEAN: {"uniform": [-5.0, 3.0]}, RATE: {"log": [1e-4, 3e-2]}}, "trials": 10,
            "scheduler": {"kind": "asha", "grace_images": 2048, "reduction": 2},
            "resources": {"concurrent": 1}}  # fmt: skip
    unkilled = made(sweep, tmp_path / "whole", **asha)
    whole = finish(unkilled)
    check_experiment(unkilled, whole)
    study = made(sweep, tmp_path / "killed", **asha)
    log = killed_and_continued(study, 10, seed=2, record=1, commit=2, report=3, end=1)
    record = finish(study)
    assert {one["state"] for one in record["trials"]} == {"done", "stopped"}
    assert ends(record) == ends(whole), log
    assert numbers(record) == numbers(whole), log
    check_each_step_once(study, runs=10)


def test_a_population_goes_on_after_kills(sweep: dict[str, Any], tmp_path: Path) -> None:
    pbt = {"space": {RATE: {"log": [1e-6, 1e-2]}}, "trials": 4, "scheduler": {"kind": "pbt", "every_images": 4096}}
    study = made(sweep, tmp_path / "killed", **pbt)
    log = killed_and_continued(study, 4, seed=3, commit=2, report=2)
    record = finish(study)
    assert [one["state"] for one in record["trials"]] == ["done"] * 4, log
    for one in record["trials"]:
        assert [report["images"] for report in one["reports"]] == [4096, 8192, 12288, 16384], log
    taken = [one for trial in record["trials"] for one in trial["lineage"] if one["source"] is not None]
    assert taken, log


def test_a_killed_trial_goes_on_and_the_others_do_not_notice(sweep: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL to one of Ray's processes that train, as the kernel does when memory is short, and to the monitor's."""
    study = made(sweep, tmp_path / "study", trials=3)
    driver = subprocess.Popen(study.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait(driver, "commit", 0.0, study, 3)
        titles = {process: " ".join(process.cmdline())
                  for process in psutil.Process(driver.pid).children(recursive=True)}  # fmt: skip
        for name in ("Trainable", "TrialMonitor"):
            next(process for process, title in titles.items() if title.startswith("ray::") and name in title).kill()
        _, errors = driver.communicate(timeout=PATIENCE_S)
    finally:
        kill(driver, whole=True)
    assert driver.returncode == 0, errors
    records = study.records().values()
    assert [one["state"] for one in records] == ["done"] * 3
    assert sum(one["deaths"] for one in records) == 1, errors
    check_each_step_once(study, runs=3)
