"""The ranges of the engines' versions: every place names the same ones, and whole commands run at both of their ends.

docs/versions.md has what was tried. The environments of the slow tests are kept in pytest's cache, so that only the
first run downloads (some 80 MB).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from waiting import PATIENCE_S

from scoreray.data.packing.pack import pack
from scoreray.sampling.http.client import Client
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store

ROOT = Path(__file__).parent.parent
ENGINES = ("ray", "deepspeed", "torch", "webdataset", "optuna")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    requirement.name: requirement
    for requirement in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tune"]])
}
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
LOWEST = {
    name: one.version for name in ENGINES for one in REQUIREMENTS[name].specifier if one.operator == ">="
}  # fmt: skip
# torch stays the running one: the package index has builds for CPUs of a single version.
ENDS = {"oldest": {**LOWEST, "torch": PINS["torch"]}, "newest": {name: PINS[name] for name in ENGINES}}


@pytest.mark.parametrize("name", ENGINES)
def test_the_pinned_version_is_in_the_range_which_the_page_and_the_readme_name(name: str) -> None:
    requirement = REQUIREMENTS[name]
    assert sorted(one.operator for one in requirement.specifier) == ["<", ">="]
    assert PINS[name] in requirement.specifier
    row = re.search(rf"^\| `{name}` \| `([^`]+)` \| (.+) \|$", (ROOT / "docs/versions.md").read_text(), re.M)
    assert row is not None
    assert Requirement(name + row[1]).specifier == requirement.specifier
    assert {LOWEST[name], PINS[name]} <= set(re.findall(r"[\d.]+\d", row[2])), "both ends were tried"


def test_the_range_of_ray_spans_four_minor_versions_or_more() -> None:
    oldest, newest = Version(LOWEST["ray"]), Version(PINS["ray"])
    assert newest.minor - oldest.minor >= 3
    readme = (ROOT / "README.md").read_text()
    assert f"Ray {oldest.major}.{oldest.minor} to {newest.major}.{newest.minor}" in readme
    assert f"from {LOWEST['deepspeed']}" in readme


def make_environment(folder: Path, versions: dict[str, str]) -> Path:
    """A virtual environment of these versions, and of what this process runs with for the rest; its interpreter."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    venv.create(folder, clear=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    running = sysconfig.get_path("purelib")
    (own / "running.pth").write_text(f"import site; site.addsitedir({running!r})\n")
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={pin}\n" for name, pin in {**PINS, **versions}.items()))
    wanted = [f"{name}{_extras(name)}=={version}" for name, version in versions.items()]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-c", str(constraints), *wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ready.touch()
    return python


def _extras(name: str) -> str:
    extras = sorted(REQUIREMENTS[name].extras)
    return f"[{','.join(extras)}]" if extras else ""


@pytest.fixture(scope="module", params=ENDS)
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter of an environment with the oldest, or the newest, version of each range."""
    versions = ENDS[request.param]
    name = "-".join([f"python{sys.version_info.major}.{sys.version_info.minor}", *map("".join, versions.items())])
    interpreter = str(make_environment(Path(request.config.cache.mkdir("versions")) / name, versions))
    ask = "import importlib.metadata as m, sys; print(*(m.version(name).split('+')[0] for name in sys.argv[1:]))"
    found = subprocess.check_output([interpreter, "-c", ask, *versions], text=True).split()
    assert dict(zip(versions, found, strict=True)) == versions
    return interpreter


@pytest.fixture(scope="module")
def file(python: str, local_s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run with two workers and DeepSpeed, on 600 pictures in S3; runs are in a folder for each end."""
    folder = tmp_path_factory.mktemp("versions")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (600, 8, 8), dtype=np.uint8), rng.integers(0, 3, 600, dtype=np.uint8)
    np.savez(folder / "pictures.npz", images=images, labels=labels)
    url = f"s3://scoreray-tests/{os.getpid()}-{folder.name}"
    pack(str(folder / "pictures.npz"), f"{url}/data", samples_per_shard=100)
    np.savez(folder / "held.npz", images=images[:64, ::-1], labels=labels[:64])
    pack(str(folder / "held.npz"), f"{url}/held")
    settings = {
        "run": {"name": "whole", "storage": f"{url}/runs"},
        "data": {"url": f"{url}/data", "global_batch_size": 32},
        "network": {"kind": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "dropout": 0.1},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "scaling": {"workers": 2},
        "duration": {"images": 6400},
        "checkpoint": {"every_images": 320, "keep": 2},
        "log": {"every_images": 160},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    return folder / "train.yaml"


def scoreray(python: str, *words: str) -> str:
    """What a command that ends with status 0 prints on standard error; the test's own limit is the command's."""
    done = subprocess.run([python, "-m", "scoreray.cluster.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(python: str, file: Path) -> Config:
    """A run that nothing interrupts."""
    scoreray(python, "train", str(file))
    return load_config(file)


def outcome(config: Config) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    """Every tensor of the last checkpoint, and the losses of all records."""
    checkpoint = latest(run_store(config))
    assert checkpoint is not None
    assert checkpoint.images_seen == config.duration.images
    keys = ("master", *checkpoint.marker.state_keys)
    state = {f"{key}/{name}": one for key in keys for name, one in checkpoint.full_state(key).items()}
    return state, [(record.images, record.loss) for record in read_metrics(run_store(config))]


def family(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def wait_for_commit(config: Config, driver: subprocess.Popen[str], after: int) -> int:
    """Images seen of a checkpoint that was committed after that of `after` images, within the test's own limit."""
    while (newest := latest(run_store(config))) is None or newest.images_seen <= after:
        assert driver.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    return newest.images_seen


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first one of an environment installs it, and trains what others use
def test_a_run_whose_worker_and_then_whose_driver_is_killed_ends_bitwise_as_one_that_was_not(
    python: str, file: Path, whole: Config
) -> None:
    words = ["train", str(file), "run.name=killed"]
    config = load_config(file, words[2:])
    log = file.parent / "killed.log"
    with log.open("w") as lines:
        driver = subprocess.Popen([python, "-m", "scoreray.cluster.cli", *words], stderr=lines, text=True)
    try:
        committed = wait_for_commit(config, driver, 0)
        next(one for one in family(driver) if "RayTrainWorker" in " ".join(one.cmdline())).kill()
        committed = wait_for_commit(config, driver, committed + 2 * 320)  # those that were under way
    finally:
        everything = [psutil.Process(driver.pid), *family(driver)]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    driver.wait()
    psutil.wait_procs(everything, timeout=PATIENCE_S)
    assert "died" in log.read_text()
    assert "goes on from" in scoreray(python, *words)
    (expected, losses), (state, again) = outcome(whole), outcome(config)
    assert again == losses
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first one of an environment installs it, and trains what others use
def test_a_sweep_of_two_trials_ends_with_a_report(python: str, file: Path, tmp_path: Path) -> None:
    base = yaml.safe_load(file.read_text())
    base |= {"duration": {"images": 640}, "engine": {"zero_stage": 0, "precision": "fp32"}}
    base = {key: base[key] for key in base if key not in ("run", "scaling", "checkpoint")}
    sweep = {
        "study": {"name": "two", "storage": str(tmp_path)},
        "base": base,
        "space": {"objective.sigma_sampling.P_mean": {"uniform": [-3.0, 1.0]}},
        "metric": {"reference": f"{base['data']['url'].removesuffix('data')}held", "count": 64, "levels": 4},
        "search": {"kind": "optuna"},
        "trials": 2,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    scoreray(python, "tune", str(tmp_path / "sweep.yaml"))
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [trial["state"] for trial in report["trials"]] == ["done", "done"]
    assert load_config(tmp_path / "two" / "best.yaml").duration.images == 640


@contextlib.contextmanager
def service(python: str, url: str) -> Iterator[str]:
    """The address of `scoreray serve`, which SIGTERM ends with status 0."""
    words = ["serve", url, "--port", "0", "--json", "--compile", "off"]
    process = subprocess.Popen([python, "-m", "scoreray.cluster.cli", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first one of an environment installs it, and trains what others use
def test_a_request_is_served(python: str, whole: Config) -> None:
    with service(python, run_store(whole).url()) as url:
        answer = Client(url).sample(count=2, steps=4, seed=1)
    assert len(answer.images) == 2
