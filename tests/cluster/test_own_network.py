"""The repository of examples/own-network, packed, trained, resumed, sampled, measured, searched, served, sent."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command
from waiting import PATIENCE_S

from scoreray.cluster.cli.main import app
from scoreray.cluster.cli.options import parsed
from scoreray.cluster.serve.command import served, states
from scoreray.cluster.serve.options import ServeOptions
from scoreray.cluster.submit.jobs import prepared
from scoreray.data.own_code import bring, code_hash
from scoreray.trainer.checkpoints.checkpoint import find
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run

Command = Callable[..., subprocess.CompletedProcess[str]]
EXAMPLE = Path(__file__).parents[2] / "examples" / "own-network"
SMALL = ("checkpoint.every_images=64", "network.width=8", "data.global_batch_size=16")


@pytest.fixture
def ringnet(own_package: object) -> tuple[str, str]:
    """The words that bring it; forgotten at the end of the test."""
    return "--with", str(EXAMPLE / "ringnet")


def test_its_own_test(ringnet: tuple[str, str]) -> None:
    bring([ringnet[1]])
    spec = importlib.util.spec_from_file_location("test_ringnet", EXAMPLE / "test_ringnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.test_a_few_steps_of_training_lower_the_error_and_any_sampler_draws()


@pytest.mark.slow
def test_the_whole_line_without_a_change_to_ours(
    scoreray: Command, ray_cluster: None, ringnet: tuple[str, str], tmp_path: Path
) -> None:
    def done(*words: str) -> str:
        result = scoreray(*words, *ringnet)
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        return result.stdout

    data, run = str(tmp_path / "rings"), str(tmp_path / "runs" / "rings")
    refused = scoreray("data", "pack", "ringnet.data:Rings", data, "--option", "count=64")
    assert refused.returncode == 2
    assert "bring it by --with PATH" in refused.stderr
    done("data", "pack", "ringnet.data:Rings", data, "--option", "count=64", "--option", "radii=[0.5, 1.0]")

    config = [str(EXAMPLE / "config.yaml"), f"data.url={data}", f"run.storage={tmp_path / 'runs'}", *SMALL]
    bring([ringnet[1]])
    begun = prepare_run(load_config(config[0], [*config[1:], "duration.images=64"])).config
    train(begun, rank=0, world_size=1, device=torch.device("cpu"))
    answer = json.loads(done("train", *config, "duration.images=128", "--json"))
    assert answer["images_seen"] == 128
    assert find(run).marker.own_code == {"ringnet.network:RingNet": code_hash("ringnet.network:RingNet")}

    sampler = ("--sampler", "ringnet.sampling:midpoint", "--option", "where=0.4", "--steps", "4")
    done("sample", run, *sampler, "--count", "6", "--out", str(tmp_path / "a.npz"))
    done("export", run, str(tmp_path / "model"))
    done("sample", str(tmp_path / "model"), *sampler, "--count", "6", "--out", str(tmp_path / "b.npz"))
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        name = next(name for name in a if a[name].shape == (6, 2))
        assert np.array_equal(a[name], b[name])

    measured = json.loads(
        done("evaluate", run, "--reference", data, "--metrics", "fid,match,ringnet.measures:radius_error",
             "--extractor", "ringnet.measures:polar", "--scorer", "ringnet.measures:on_ring", "--count", "32",
             "--ensembles", "4", "--per-condition", "4", *sampler, "--workers", "1", "--json")
    )  # fmt: skip
    own = measured["metrics"]["ringnet.measures:radius_error"]
    assert own["value"] == pytest.approx(own["numbers"]["radius_error"])
    assert measured["protocol"]["extractor"]["kind"] == "ringnet.measures:polar"

    base = [f"base.{word}" for word in (f"data.url={data}", "duration.images=32", *SMALL) if "width" not in word]
    study = f"study.storage={tmp_path / 'studies'}"
    done("tune", str(EXAMPLE / "sweep.yaml"), study, f"metric.reference={data}", "resources.concurrent=1", *base)
    best = (tmp_path / "studies" / "widths" / "best.yaml").read_text()
    assert "ringnet.network:RingNet" in best

    options = ServeOptions(checkpoints=[run], samplers=["ringnet.sampling:midpoint"], cpus_per_replica=0.1)
    with served(*options.checked("127.0.0.1", 0)) as url:
        assert states() == "; ingress: 1 RUNNING; model: 1 RUNNING"
        body = {"count": 2, "sampler": "ringnet.sampling:midpoint", "steps": 3, "seed": 1}
        request = urllib.request.Request(
            f"{url}/v1/samples", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            assert len(json.load(response)["data"]) == 2

    parse = functools.partial(parsed, get_command(app))
    with prepared(["train", *config, *ringnet], [], [], None, parse) as job:
        assert job.runtime_env["py_modules"][1:] == [ringnet[1]]
        assert job.name == "scoreray-train-rings"
