"""Evaluation on Ray: any number of workers, and one that is killed, give the same record; the process beside a run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from waiting import PATIENCE_S

from scoreray.cluster.verbs.beside_run import beside
from scoreray.cluster.verbs.evaluate import workers_of
from scoreray.data.packing.pack import pack
from scoreray.data.storage.store import open_store
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.evaluation.follow import METRICS, follow
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store


@pytest.fixture(scope="module")
def run(local_s3: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(a short run's URL, its data set's), both in S3."""
    rng = np.random.default_rng(0)
    source = tmp_path_factory.mktemp("source") / "pictures.npz"
    np.savez(source, images=rng.integers(0, 256, (300, 8, 8), dtype=np.uint8), labels=np.arange(300) % 3)
    base = f"s3://scoreray-tests/{os.getpid()}-evaluating"
    pack(str(source), f"{base}/data", samples_per_shard=100)
    train(load_config(settings(base)))
    return f"{base}/runs/short", f"{base}/data"


def settings(base: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": "short", "storage": f"{base}/runs"},
        "data": {"url": f"{base}/data", "global_batch_size": 16},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 64},
        "checkpoint": {"every_images": 16, "keep": 9},
        **changes,
    }


def evaluation_settings(run: tuple[str, str], out: str) -> EvaluationSettings:
    return EvaluationSettings(*run, metrics=("fid", "kid", "sw", "loss"), out=out, extractor="identity", count=600,
                              steps=6, batch_size=64, loss_count=300)  # fmt: skip


@pytest.mark.slow
def test_workers_and_kills_do_not_change_a_record(
    ray_cluster: None, run: tuple[str, str], tmp_path: Path, s3_url: str, new_listeners: Any
) -> None:
    """Two workers of which one dies by SIGKILL, and none but this process: the same bytes, wherever they go."""
    folder, _, name = evaluate(evaluation_settings(run, s3_url)).url.rpartition("/")
    records = [open_store(folder).get(name)]
    killed: list[int] = []
    with new_listeners() as listeners, workers_of(2, 1) as run_on_ray:
        watcher = threading.Thread(target=_kill_one, args=(tmp_path / "killed", killed))
        watcher.start()
        made = evaluate(evaluation_settings(run, str(tmp_path / "killed")), run=run_on_ray)
        watcher.join()
    listeners.check()
    assert killed
    records.append(Path(made.url).read_bytes())
    assert records[0] == records[1]
    assert json.loads(records[0])["metrics"]["fid"]["value"] > 0


def _kill_one(out: Path, killed: list[int]) -> None:
    """SIGKILL to an actor that is at work, once the first chunk of samples is stored."""
    deadline = time.monotonic() + PATIENCE_S
    while not killed and time.monotonic() < deadline:
        if list(out.glob("*/samples/*.npz")):
            for process in psutil.Process().children(recursive=True):
                if "Worker.call" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.01)


def test_mistakes_on_a_worker_are_one_line(ray_cluster: None, run: tuple[str, str], tmp_path: Path) -> None:
    from scoreray.data.errors import UserError

    def wrong() -> int:
        raise UserError("fix this")

    with workers_of(1, 1) as run_on_ray, pytest.raises(UserError, match=r"^fix this$"):
        run_on_ray(wrong, [()], lambda n: None)


def test_each_checkpoint_is_measured_and_drawn(run: tuple[str, str], tmp_path: Path) -> None:
    """Followed at its end, a run's newest checkpoint is taken once; a failing function is noted and fails nothing."""
    base = run[0].removesuffix("/runs/short")
    section = {"metrics": ["loss", "fid"], "sheet": 4, "count": 32, "reference_count": 64, "steps": 3,
               "extractor": "identity"}  # fmt: skip
    config = load_config(settings(base, evaluation=section))
    notes: list[str] = []
    assert follow(config, lambda: True, notes.append) == 1
    found = json.loads(run_store(config).get(f"{METRICS}/000000000064.json"))
    assert found["images"] == 64
    assert found["fid"] > 0
    assert found["loss_error"] > 0
    assert run_store(config).get("evaluations/sheets/000000000064.png")[:4] == b"\x89PNG"
    assert b"evaluation/fid" in run_store(config).get("tensorboard/evaluation/events.out.tfevents.000000000064")
    assert "64 images" in notes[0]
    assert follow(config, lambda: True) == 0  # done already

    def broken(config: Any, checkpoint: Any) -> dict[str, Any]:
        raise RuntimeError("no\nway")

    other = load_config(settings(base, run={"name": "other", "storage": f"{base}/runs"}))
    train(other)
    lines: list[str] = []
    assert follow(other, lambda: True, lines.append, functions=[broken]) == 1
    assert lines == ["evaluation at 64 images failed: broken: RuntimeError: no way"]


@pytest.mark.slow
def test_evaluation_beside_a_run(ray_cluster: None, run: tuple[str, str]) -> None:
    """An actor at the lowest priority: what it finds is reported while the run goes on, and its errors end nothing."""
    base = run[0].removesuffix("/runs/short")
    section = {"metrics": ["loss"]}
    config = load_config(settings(base, run={"name": "beside", "storage": f"{base}/runs"}, evaluation=section))
    notes: list[str] = []
    priorities: list[int] = []
    with beside(config, notes.append):
        train(config)
        deadline = time.monotonic() + PATIENCE_S
        while 19 not in priorities and time.monotonic() < deadline:
            time.sleep(0.1)
            family = psutil.Process().children(recursive=True)
            priorities = [process.nice() for process in family if "CheckpointEvaluator" in " ".join(process.cmdline())]
    assert priorities == [19]
    assert [key for key, _ in run_store(config).list(METRICS)] == [f"{METRICS}/000000000064.json"]
    assert any("64 images: loss" in note for note in notes)
    missing = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"reference": f"{base}/nothing", "count": 20}),
                "run": config.run.model_copy(update={"name": "beside-2"})}
    )  # fmt: skip
    train(missing)
    with beside(missing, notes.append):
        pass
    assert any("failed: measure: UserError" in note for note in notes)


def test_evaluate_and_compare_as_commands(
    scoreray: Any, ray_cluster: None, run: tuple[str, str], tmp_path: Path
) -> None:
    """evaluate leaves a record, compare refuses with exit status 2 by what differs, mistakes are one line each."""
    common = ["evaluate", run[0], "--reference", run[1], "--extractor", "identity", "--metrics", "fid,loss",
              "--count", "40", "--reference-count", "100", "--loss-count", "32", "--out", str(tmp_path)]  # fmt: skip
    records = []
    for steps in ("2", "3"):
        done = scoreray(*common, "--steps", steps, "--workers", "1", "--json")
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout)["url"])
        assert json.loads(done.stdout)["subject"]["sampling"]["steps"] == int(steps)
    done = scoreray("compare", *records)
    assert done.returncode == 2
    assert "sampling.steps: 2 in the first, 3 in the second" in done.stderr
    done = scoreray("compare", *records, "--vary", "steps", "--json")
    assert done.returncode == 0
    assert set(json.loads(done.stdout)["metrics"]) == {"fid", "loss"}
    for mistake, word in (
        (["--metrics", "fid,ais"], "ais does not fit"),
        (["--metrics", "fidd"], "did you mean 'fid'"),
        (["--extractor", "inception:/nowhere.pth"], "no such file"),
        (["--workers", "99"], "--workers 99"),
        (["--ema", "0.3"], "0.3"),
        (["--sampler", "huen"], "did you mean 'heun'"),
    ):
        done = scoreray(*common, *mistake)
        assert done.returncode == 2, (mistake, done.stderr)
        assert word in done.stderr, (mistake, done.stderr)
        assert "Traceback" not in done.stderr
    assert scoreray("compare", str(tmp_path / "absent.json"), records[0]).returncode == 2
    for verb in ("evaluate", "compare"):
        assert "Usage" in scoreray(verb, "--help").stdout
