"""What a job is made of, and what is refused before anything is sent."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from scoreray.cluster.cli.main import app
from scoreray.cluster.cli.options import parsed
from scoreray.cluster.submit.credentials import refuse_text, shape_of
from scoreray.cluster.submit.jobs import JobMetadata, Submission, prepared
from scoreray.cluster.submit.jobs_api import checked_address
from scoreray.data.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
PARSE = functools.partial(parsed, get_command(app))
GITHUB = "ghp" + "_" + "a1B2c3D4" * 4
SECRET = "wJalrXUtnFEMI" + "/K7MDENGbPxRfiCYEX9" + "AMPLEKEY"  # of no account


ENCODED = ("--field", "image", "--to", "latent")


@pytest.fixture(scope="module")
def config(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "sent.yaml").write_text(json.dumps(small_run("sent", folder / "runs", 1000)))
    return folder / "sent.yaml"


def made(*words: str, env: tuple[str, ...] = (), from_env: tuple[str, ...] = (), name: str | None = None) -> Submission:
    with prepared(list(words), list(env), list(from_env), name, PARSE) as job:
        return job


def test_jobs_hold_references_never_values(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-value-of-ours")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken-value-of-ours")
    with prepared(
        ["train", str(config)], ["AWS_REGION=eu-1"], ["AWS_SECRET_ACCESS_KEY=TEAM_SECRET"], None, PARSE
    ) as job:
        sent = repr((job.entrypoint, job.runtime_env, job.metadata))
        files = b"".join(path.read_bytes() for path in Path(job.runtime_env["working_dir"]).iterdir())
        assert "of-ours" not in sent
        assert b"of-ours" not in files
        assert 'export AWS_SECRET_ACCESS_KEY="$TEAM_SECRET"; exec python -m' in job.entrypoint
        stored = job.metadata.to_ray()
        assert stored == {
            "scoreray_verb": "train", "scoreray_run": "sent", "scoreray_writes": f"{config.parent}/runs/sent",
        }  # fmt: skip
        assert JobMetadata.from_ray(stored) == job.metadata
        assert JobMetadata.from_ray({"of": "another program"}) == JobMetadata("")
        assert job.name == "scoreray-train-sent"


def test_only_what_writes_a_run_keeps_others_from_it(config: Path) -> None:
    writes = f"{config.parent}/runs/sent"
    for words, found in [
        (["train", str(config), "run.name=renamed"], writes.replace("/sent", "/renamed")),
        (["train", "--check", str(config)], ""),
        (["doctor", str(config)], ""),
        (["evaluate", writes, "--reference", "s3://b/d"], ""),
    ]:
        assert made(*words).metadata.writes == found, words


def sweep_of(config: Path, base: str = "./sent.yaml", **more: Any) -> Path:
    page = {
        "study": {"name": "wide", "storage": "s3://b/s"}, "base": base, "trials": 3,
        "space": {"optimizer.learning_rate": {"log": [1e-4, 1e-2]}},
        "metric": {"reference": "s3://b/d", "sigma_min": 0.02, "sigma_max": 5}, **more,
    }  # fmt: skip
    (config.parent / "sweep.yaml").write_text(yaml.safe_dump(page))
    return config.parent / "sweep.yaml"


def test_a_sweep_is_sent_with_its_base_and_its_mistakes_are_reported_before_that(config: Path) -> None:
    sweep = sweep_of(config)
    with prepared(["tune", str(sweep)], [], [], None, PARSE) as job:
        place = Path(job.runtime_env["working_dir"])
        assert job.name == "scoreray-tune-wide"
        assert job.metadata.writes == "s3://b/s/wide"
        assert job.entrypoint.endswith("tune sweep.yaml")
        sent = yaml.safe_load((place / "sweep.yaml").read_text())
        assert (place / sent.pop("base")).read_bytes() == config.read_bytes()
        assert sent["study"] == {"name": "wide", "storage": "s3://b/s"}
    with pytest.raises(UserError, match=re.escape("metric.sigma_min: 9")):
        made("tune", str(sweep_of(config, metric={"reference": "s3://b/d", "sigma_min": 9, "sigma_max": 5})))
    with pytest.raises(UserError, match="no such config file"):
        made("tune", str(sweep_of(config, base="./nope.yaml")))


def test_own_code_is_sent_as_modules_and_by_name(
    config: Path, own_package: Callable[..., Path], tmp_path: Path
) -> None:
    net = "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, width: int = 2): super().__init__()"
    folder = own_package("theirs", brought=False, net=net)
    own = config.parent / "own.yaml"
    own.write_text(json.dumps({**json.loads(config.read_text()), "network": {"kind": "theirs.net:Net", "width": 3}}))
    with prepared(["train", str(own), "--with", str(folder), "network.width=4"], [], [], None, PARSE) as job:
        assert job.runtime_env["py_modules"][1:] == [str(folder)]
        assert job.runtime_env["env_vars"]["SCORERAY_WITH"].split(":")[0] == "theirs"
        assert job.entrypoint.endswith("train own.yaml network.width=4")
    with pytest.raises(UserError, match=r"network\.widht: unknown key; did you mean 'width'"):
        made("train", str(own), f"--with={folder}", "network.widht=4")
    (folder / "notes.py").write_text(f"token = '{GITHUB}'")
    with pytest.raises(UserError, match=r"notes\.py, line 1: looks like a credential"):
        made("train", str(own), "--with", str(folder))


def test_files_of_one_name_are_both_sent(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "sent.yaml"
    other.write_text(config.read_text().replace('"sent"', '"other"'))
    with prepared(["compare", str(config), str(other)], [], [], None, PARSE) as job:
        place = Path(job.runtime_env["working_dir"])
        assert job.entrypoint.endswith("compare sent.yaml sent-2.yaml")
        assert [(place / name).read_text() for name in ("sent.yaml", "sent-2.yaml")] == [
            config.read_text(), other.read_text(),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "env", "named"),
    [
        (["train"], ["AWS_SECRET_ACCESS_KEY=abc"], "--from-env AWS_SECRET_ACCESS_KEY"),
        (["train"], ["SCORERAY_TOKENS=me:abc"], "--from-env"),
        (["train"], ["AWS_ENDPOINT_URL=http://me:word@host"], "--from-env"),
        (["train"], ["HF_PAT=abc"], "--from-env HF_PAT"),
        (["train"], [f"NICE={GITHUB}"], "--from-env NICE"),
        (["train"], [f"NICE={SECRET}"], "--from-env NICE"),
        (["train"], ["no-name"], "NAME=VALUE"),
        (["sample", "s3://AKIAABCDEFGHIJKLMNOP/x"], [], "credential"),
        (["sample", "s3://b/x", "--aws-secret", "abc"], [], "submit --aws-secret: its value looks like a credential"),
        (["sample", "s3://b/x", "--out", "https://abc@host/x"], [], "a user or password in a URL"),
        (["train", "x.yaml", "data.api_key=abc"], [], "submit data.api_key"),
        (["sampel"], [], "sample"),
        (["serve"], [], "not a verb"),
        (["train"], [], "Missing argument 'CONFIG'"),
        (["train", "nope.yaml"], [], "nope.yaml: no such config file"),
        (["train", "--check", "nope"], [], "nope: no such config file"),
        (["compare", "nope.yaml", "b.json"], [], "nope.yaml: no such file on this machine"),
        (["train", "x.yaml", "--detach"], [], "options of submit come before the verb"),
        (["data", "verfy", "s3://b/d"], [], "did you mean 'verify'"),
        (["sample", "s3://b/x", "--out", "samples"], [], "submit samples: is relative to the job's own folder"),
        (["data", "pack", "/mine", "packed"], [], "submit packed: is relative to the job's own folder"),
        (["data", "encode", "s3://b/d", "/out", *ENCODED, "--encoder", "diffusers=vae"], [], "submit vae: is relative"),
    ],
)
def test_what_must_not_be_sent_is_refused(words: list[str], env: list[str], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)) as refused:
        made(*words, env=tuple(env))
    assert "\n" not in str(refused.value)
    assert GITHUB not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("# " + GITHUB, "line 2: looks like a credential (a token of GitHub)"),
        (f"key: {SECRET}", "an AWS secret"),
        ("tracking: {password: hunter2}", "tracking.password"),
        ("tracking: {secrets: {mine: [abc]}}", "tracking.secrets.mine"),
        ("token: hf" + "_" + "abcdEFGH" * 4, "a token of Hugging Face"),
        ("x: xoxb" + "-123456789012-abcdef", "a token of Slack"),
        ("x: |\n  -----BEGIN " + "OPENSSH PRIVATE KEY-----", "line 3: looks like a credential (a private key)"),
    ],
)
def test_every_file_that_is_sent_is_checked(config: Path, tmp_path: Path, line: str, named: str) -> None:
    """As an argument of the command, and as the base of a sweep."""
    for given in ("x.yaml", "base.yaml"):
        (tmp_path / given).write_text(f"a: 1\n{line}\n")
    (tmp_path / "sweep.yaml").write_text("base: base.yaml\n")
    for word in ("x.yaml", "sweep.yaml"):
        with pytest.raises(UserError, match=re.escape(named)) as refused:
            made("compare", str(tmp_path / word), "b.json")
        assert GITHUB not in str(refused.value)
        assert "\n" not in str(refused.value)


def test_the_code_that_is_sent_is_checked(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.cluster import wheel

    files = wheel._files() | {"scoreray/data/mine.py": f"KEY = '{GITHUB}'\n".encode()}
    monkeypatch.setattr(wheel, "_files", lambda: dict(files))
    with pytest.raises(UserError, match=re.escape("scoreray/data/mine.py, line 1")):
        made("train", str(config))


def test_what_is_no_credential_is_sent(config: Path) -> None:
    for text in (
        "s3://bucket/runs/cifar10", "a" * 40, "3bd6b8d0c5e1f2a4b6c8d0e2f4a6b8c0d2e4f6a8",
        "/mnt/Data1/runs/imagenet/sixtyfour/abcdef",
        "1e-4", "sqlite:////tmp/a@b.db", "hf_hub", "checkpoints/00000001",
    ):  # fmt: skip
        assert not shape_of(text), text
    sent = made("train", str(config), env=("TOKENIZERS_PARALLELISM=false", "RAY_AUTH_MODE=token", "PATH=/bin"))
    assert sent.runtime_env["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"
    for example in sorted(Path(__file__).parents[3].glob("configs/*.yaml")):
        refuse_text(example.name, example.read_text(), yaml.safe_load(example.read_text()))


def test_names_of_jobs(config: Path) -> None:
    assert made("train", str(config), name="mine-2.a").name == "mine-2.a"
    for name in ("we ird/na;me", "", "-x", "größe", "x" * 151):
        with pytest.raises(UserError, match="letters, digits"):
            made("train", str(config), name=name)
    with pytest.raises(UserError, match="letters, digits"):
        made("train", str(config), "run.name=größe")


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("", "(none)"), ("http://", "write http(s)://HOST:PORT"), ("http://:8265", "HOST:PORT"), ("ray://h:1", "HOST"),
        ("https://token@host", "no user"), ("http://me:hunter2@host:x", "no user"), ("http://h:99999", "no such port"),
        ("http://h:8265/#/jobs", "HOST:PORT"), ("h:8265", "HOST:PORT"), ("http://[::1", "HOST:PORT"),
    ],
)  # fmt: skip
def test_addresses(address: str, named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)) as refused:
        checked_address(address)
    assert "token@" not in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert checked_address("https://host:8265/ray/") == "https://host:8265/ray"


def test_mistakes_end_in_one_line(scoreray: Command) -> None:
    for words in (
        ["--address", "http://", "list"], ["train", "configs/nope.yaml"], ["train"], ["list", "--address", "x"],
        ["--name", "we ird", "train", "configs/demo.yaml"],
    ):  # fmt: skip
        done = scoreray("submit", *words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
