"""Bad input gets one clear line and the right exit status, and leaves nothing behind that a later run trips over."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from waiting import PATIENCE_S

from scoreray.cluster.cli import options
from scoreray.data.errors import UserError
from scoreray.data.storage.local_s3 import LocalS3

ROOT = Path(__file__).parents[3]


def assert_refused(result: subprocess.CompletedProcess, status: int, *words: str) -> None:
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1] if status != 2 else result.stderr.strip()
    assert line.startswith("scoreray: "), result.stderr
    for word in words:
        assert word in line, line


@pytest.fixture(scope="module")
def packed(scoreray: Any, local_s3: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> str:
    source = tmp_path_factory.mktemp("source") / "pictures.npz"
    rng = np.random.default_rng(0)
    np.savez(source, images=rng.integers(0, 256, (96, 8, 8), dtype=np.uint8), labels=np.arange(96) % 3)
    url = f"s3://scoreray-tests/{os.getpid()}-cli-data"
    result = scoreray("data", "pack", str(source), url, "--samples-per-shard", "40", "--json")
    assert result.returncode == 0, result.stderr
    answer = {"url": url, "num_samples": 96, "num_shards": 3, "left_out": [], "unused": {}}
    assert json.loads(result.stdout) == answer
    return url


@pytest.fixture
def config_file(packed: str, tmp_path: Path) -> Path:
    settings: dict[str, Any] = {
        "run": {"name": "cli", "storage": f"s3://scoreray-tests/{os.getpid()}-cli-runs"},
        "data": {"url": packed, "global_batch_size": 16},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        "duration": {"images": 32},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


VERBS = ("train", "tune", "sample", "grid", "serve", "evaluate", "compare", "export", "doctor", "submit", "demo",
         "data", "data pack", "data verify", "data inspect")  # fmt: skip


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_verb_has_help(scoreray: Any, verb: str) -> None:
    result = scoreray(*verb.split(), "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize("name", ["laptop", "both", "weighting"])
def test_the_overrides_in_the_help_of_tune_are_keys_of_a_sweep(scoreray: Any, name: str) -> None:
    from scoreray.tune.load import load_sweep

    text = " ".join(scoreray("tune", "--help").stdout.split())
    overrides = re.findall(r"[\w.]+=\w+", text.partition("Dotted overrides:")[2].partition("Options:")[0])
    assert len(overrides) == 2
    assert load_sweep(f"configs/tune/{name}.yaml", overrides)


@pytest.mark.parametrize("words", [["--version"], ["--version", "train"], ["--local-s3", "/nope", "--version"]])
def test_the_version_needs_no_verb(words: list[str]) -> None:
    from typer.testing import CliRunner

    from scoreray.cluster.cli.main import app

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.output == f"{version('scoreray')}\n"


def test_a_shell_completes_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from scoreray.cluster.cli.main import app

    words = {"_SCORERAY_COMPLETE": "complete_bash", "COMP_WORDS": "scoreray ex", "COMP_CWORD": "1"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        app(prog_name="scoreray")
    assert capsys.readouterr().out.split() == ["export"]


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("_pydantic_core", "stopped before anything was started"),
        ("libtorch_cpu", "stopped; the same command goes on from what is committed"),  # a verb imports what it needs
    ],
)
def test_ctrl_c_while_the_command_is_being_imported(library: str, line: str) -> None:
    command = [sys.executable, "-m", "scoreray.cluster.cli", "train", "absent.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert errors.splitlines() == [f"scoreray: {line}"]


def test_usage_mistakes(scoreray: Any) -> None:
    assert_refused(scoreray("trian"), 2, "'train'")
    assert_refused(scoreray("train"), 2, "CONFIG")
    assert_refused(scoreray("sample", "x", "--out", "y", "--count", "0"), 2, "count")


def test_the_config_is_checked_before_anything_starts(scoreray: Any, config_file: Path) -> None:
    result = scoreray("train", str(config_file), "optimizer.lr=1", "engine.zero_stage=9")
    assert_refused(result, 2, "optimizer.lr", "engine.zero_stage")
    assert_refused(scoreray("train", "absent.yaml"), 2, "absent.yaml")


def test_storage_that_cannot_be_used(scoreray: Any, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ["train", str(config_file), "--check"]
    assert scoreray(*check).stdout.strip().endswith("good")
    assert_refused(scoreray(*check, "data.url=s3://no-such-bucket/data"), 3, "no-such-bucket")
    assert_refused(scoreray(*check, "run.storage=s3://no-such-bucket/runs"), 3, "no-such-bucket")
    assert_refused(scoreray(*check, "data.url=s3://scoreray-tests/nothing"), 2, "nothing")
    assert_refused(scoreray(*check, "evaluation.reference=/nope"), 2, "evaluation.reference: ", "/nope: no data set")
    with monkeypatch.context() as environment:
        environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert_refused(scoreray(*check), 3, "credentials")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, endpoint)
    assert_refused(scoreray(*check), 3, endpoint)


def test_more_workers_than_the_cluster_has_are_refused(scoreray: Any, ray_cluster: None, config_file: Path) -> None:
    """Before Ray Train would wait for them."""
    result = scoreray("train", str(config_file), "scaling.use_gpu=true", "run.name=gpu")
    assert_refused(result, 2, "GPU", "RAY_ADDRESS")


def test_a_ray_that_cannot_be_started_is_one_line_at_once(config_file: Path) -> None:
    """Ray itself would wait for a daemon that has died, half a minute or more, for each try."""
    few_files = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
        "from scoreray.cluster.cli.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", few_files, "train", str(config_file)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("scoreray: Ray could not be started on this machine (")
    assert last.endswith("): its gcs_server has ended; see docs/faq.md#ray-doesnt-start")


def test_sampling_what_is_not_there(scoreray: Any, config_file: Path, packed: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert_refused(scoreray("sample", "s3://scoreray-tests/no-run", "--out", out), 2, "no-run")
    assert_refused(scoreray("sample", packed, "--out", out), 2, "neither a run")
    assert_refused(scoreray("sample", packed, "--out", out, "--sampler", "huen"), 2, "did you mean 'heun'")
    assert not Path(out).exists()


def test_a_trained_run_is_sampled_from_the_command_line(
    scoreray: Any, ray_cluster: None, config_file: Path, tmp_path: Path
) -> None:
    overrides = ["scaling.workers=1", "engine.zero_stage=1"]
    trained = scoreray("train", str(config_file), *overrides, "--json")
    assert trained.returncode == 0, trained.stderr
    answer = json.loads(trained.stdout)
    assert answer["images_seen"] == 32
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    common = ["sample", answer["run"], "--count", "5", "--steps", "4", "--seed", "3", "--ema", "0.1"]
    assert scoreray(*common, "--out", str(a)).returncode == 0
    assert scoreray(*common, "--out", str(b), "--batch-size", "2").returncode == 0
    with np.load(a) as first, np.load(b) as second:
        assert first["images"].shape == (5, 8, 8, 1)
        assert np.array_equal(first["images"], second["images"])
        assert list(first["labels"]) == [0, 1, 2, 0, 1]
    folder = scoreray(*common[:2], "--count", "3", "--steps", "2", "--out", str(tmp_path / "folder"))
    assert folder.returncode == 0
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "samples.png", "sampling.json"]
    assert_refused(scoreray(*common[:2], "--out", str(a), "--class-label", "9"), 2, "class '9'")
    assert_refused(scoreray(*common[:2], "--out", str(a), "--ema", "0.2"), 2, "0.050, 0.100")
    assert_refused(
        scoreray(*common[:2], "--out", str(tmp_path / "c.npz"), "--option", "s_churm=4", "--sampler", "edm_sde"),
        2,
        "s_churn",
    )


def test_data_commands(scoreray: Any, packed: str, tmp_path: Path) -> None:
    assert scoreray("data", "verify", packed).returncode == 0
    picture = tmp_path / "look.png"
    result = scoreray("data", "inspect", packed, "--picture", str(picture), "--json")
    assert json.loads(result.stdout)["num_samples"] == 96
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert_refused(scoreray("data", "inspect", packed, "--picture", "/proc/x.png"), 2, "/proc/x.png")
    assert_refused(scoreray("data", "pack", str(tmp_path / "absent"), packed), 2, "absent")


def test_a_damaged_data_set_is_named(scoreray: Any, packed: str, tmp_path: Path) -> None:
    from scoreray.data.storage.store import open_store

    store, copy = open_store(packed), open_store(tmp_path)
    for key, _ in store.list():
        data = bytearray(store.get(key))
        if key.endswith(".tar") and "1" in key:
            data[560] ^= 1
        copy.put(key, bytes(data))
    result = scoreray("data", "verify", str(tmp_path))
    assert result.returncode == 3
    assert ".tar" in result.stdout


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    from scoreray.data.errors import UserError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=str(port)), LocalS3(tmp_path / "s3", port=port):
            pass


def test_a_folder_that_cannot_hold_an_s3_server(scoreray: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(scoreray("--local-s3", str(tmp_path / "file"), "data", "verify", "s3://abc/x"), 3, "file")
    assert_refused(scoreray("--local-s3", "/proc/nowhere", "data", "verify", "s3://abc/x"), 3, "/proc/nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_check_reports_what_this_machine_lacks(
    scoreray: Any, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gpu = scoreray("train", "--check", str(config_file), "scaling.use_gpu=true")
    assert_refused(
        gpu, 2, "scaling.workers", "1 GPUs", "this machine has 0", "scaling.use_gpu=false trains on its CPUs"
    )
    crowded = scoreray("train", "--check", str(config_file), "scaling.workers=16")
    assert crowded.returncode == 0, crowded.stderr
    assert "16 workers want 16 cores and share this machine's" in crowded.stderr


def test_a_plan_needs_a_config(scoreray: Any) -> None:
    assert_refused(scoreray("doctor", "--nodes", "4"), 2, "--nodes", "CONFIG")


def test_more_that_people_get_wrong(
    scoreray: Any, config_file: Path, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", "127.0.0.1:99")
        assert_refused(scoreray("train", str(config_file), "--check"), 2, "http://")
    nobody = {"RAY_ADDRESS": "127.0.0.1:1"}
    assert_refused(scoreray("train", str(config_file), "run.name=nobody", env=nobody), 2, "RAY_ADDRESS", "127.0.0.1:1")


def test_a_demo_that_cannot_write_says_so(scoreray: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(scoreray("demo", "--out", str(tmp_path / "file" / "out")), 3, "--out")


def test_prints_of_workers_go_to_standard_error(ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray forwards what workers print: to stderr, as the JSON on stdout may be piped. Lines of raylets are dropped."""
    from ray._private import worker

    for pid, line in ((4711, "printed by a worker"), ("raylet", "a worker died")):
        worker.print_to_stdstream({"is_err": False, "pid": pid, "ip": "127.0.0.1", "lines": [line], "job": None}, False)
    printed = capsys.readouterr()
    assert not printed.out
    assert "printed by a worker" in printed.err
    assert "a worker died" not in printed.err


def test_what_can_not_be_a_bucket_is_refused_before_a_server_of_our_own_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "_servers", [None])
    for url in ("s3:///prefix", "s3://", "s3://A_b/x", "s3://a/x"):
        with pytest.raises(UserError, match="can't be a bucket's name"):
            options.make_bucket(url)


def test_a_config_may_be_a_file_url(tmp_path: Path) -> None:
    path = tmp_path / "a b.yaml"
    path.write_text("run: {name: r}\n")
    assert options.resolve_config(Path(path.as_uri())) == path
    assert options.resolve_config(path) == path
    assert options.resolve_config(None) is None
