"""`scoreray serve`: its words are checked before Ray starts, and tracebacks outlive the service."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
import urllib.request
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import PATIENCE_S

from scoreray.cluster.serve import command
from scoreray.cluster.serve.command import _errors, _key_file, served
from scoreray.cluster.serve.deployments import application
from scoreray.cluster.serve.log import relayed
from scoreray.cluster.serve.options import Placement, make_config, make_limits, parse_replicas
from scoreray.data.errors import UserError
from scoreray.data.scratch import SCRATCH
from scoreray.sampling.service.config import ServeConfig

OTHER_PROCESS = """
import logging, sys
from scoreray.cluster.serve.log import log_here
log_here(sys.argv[1])
log = logging.getLogger("scoreray.serve")
log.info("one request")
try:
    raise KeyError("what nobody expected \\udc80")
except KeyError:
    log.exception("request 7f")
"""


def test_another_process_s_tracebacks_are_relayed_and_its_other_lines_are_not(tmp_path: Path) -> None:
    file, written = tmp_path / "errors.log", list[str]()
    with relayed(file, written.append):
        done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, file], capture_output=True, text=True, check=True)
    text = "".join(written)
    assert "ERROR request 7f\nTraceback (most recent call last):\n" in text
    assert text.endswith("KeyError: 'what nobody expected \\udc80'\n")
    assert "one request" not in text
    assert "INFO one request" in done.stderr  # Ray keeps that with its logs
    assert "Traceback" in done.stderr


def test_what_came_before_a_failure_is_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    with contextlib.suppress(KeyboardInterrupt), _errors(verbose=False) as errors:
        Path(errors).write_bytes(b"Traceback\n\xff\n")
        raise KeyboardInterrupt
    assert capfd.readouterr().err == "Traceback\n\\xff\n"
    with _errors(verbose=True) as errors:
        assert errors == ""  # Ray prints every line
    monkeypatch.delenv(SCRATCH)
    with _errors(verbose=False) as errors:
        assert errors == ""  # a cluster keeps its logs


def test_the_ingress_is_given_the_file() -> None:
    made = application(ServeConfig((("a", "/absent"),)), Placement(), "/errors.log")
    assert made._bound_deployment.init_args[-1] == "/errors.log"


@pytest.mark.parametrize("word", ["²", "--5", "1,²", "1e1", "", ",", "9" * 5000, "1,2,3", "١x", "nan"])
def test_words_that_are_no_numbers_of_replicas_are_one_line(word: str) -> None:
    with pytest.raises(UserError, match=r"^--replicas ") as caught:
        parse_replicas(word)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "word",
    ["max_count=²", "max_count=--5", "max_count=1.5", "max_count=0", "max_count=nan", "max_count=true", "max_count=",
     "max_count=" + "9" * 5000, "max_count=1e300", "max_request_s=.inf", "max_request_s=-1", "max_count=[1",
     "max_cuont=1", "max_count", "x" * 100_000 + "=1", "max_count=*x", "max_count=!!int 1"],
)  # fmt: skip
def test_limits_that_are_no_numbers_are_one_line(word: str) -> None:
    with pytest.raises(UserError, match=r"^--limit ") as caught:
        make_limits([word])
    assert len(str(caught.value)) < 400
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://h:6379", "SCORERAY_REDIS = http://h:6379: write redis://HOST:PORT"),
        ("redis://", "write redis://HOST:PORT"),
        ("redis://h:port", "no url"),
        ("redis://[h", "no url"),
        ("redis://:hidden-word@h:6379", "put it into SCORERAY_REDIS_PASSWORD"),
        ("http://:hidden-word@h:6379", "put it into SCORERAY_REDIS_PASSWORD"),
    ],
)
def test_a_redis_that_is_no_url_of_one_is_one_line(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORERAY_REDIS", url)
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        make_config(["a"], None, "127.0.0.1", True)
    assert reason in str(refused.value)
    assert "hidden-word" not in str(refused.value)
    monkeypatch.setenv("SCORERAY_REDIS", "rediss://h:6379/1")
    assert make_config(["a"], None, "127.0.0.1", True).keys == "rediss://h:6379/1"


def test_keys_are_beside_an_embedded_ray_and_a_cluster_without_redis_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    assert _key_file() == str(tmp_path / "keys.sqlite")
    assert capsys.readouterr().err == ""
    monkeypatch.delenv(SCRATCH)
    assert _key_file() == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert "SCORERAY_REDIS is not set" in line


def test_limits_are_numbers_as_everywhere() -> None:
    made = make_limits(["max_count=1e2", "max_request_s=.5", "max_steps=010"])
    assert (made.max_count, made.max_request_s, made.max_steps) == (100, 0.5, 10)
    assert isinstance(made.max_count, int)


@pytest.mark.parametrize("name", ["cpus_per_replica", "gpus_per_replica", "drain_s"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300])
def test_sizes_that_no_machine_has_are_refused_before_ray_starts(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} = .*: must be a number from 0 to 1e\\+06"):
        Placement(**{name: value})


def test_sizes_that_ray_or_torch_would_fail_on_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"gpus_per_replica = 1\.5: .* whole number"):
        Placement(gpus_per_replica=1.5)
    for name, value in (("max_batch", 10**20), ("max_batch", 0), ("threads", 10**6), ("threads", 0), ("reload_s", 0.0)):
        with pytest.raises(UserError, match=f"{name} = .*: must be above 0, at most"):
            ServeConfig((("a", "/absent"),), **{name: value})
    with pytest.raises(UserError, match="reload_s = inf"):
        ServeConfig((("a", "/absent"),), reload_s=math.inf)


class State(Enum):
    """As Serve's of a replica, which its status gives by name or by value."""

    RUNNING = "RUNNING"


def test_a_slow_start_says_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a service takes minutes to start: without a word it looked as if it hung."""
    applications: dict[str, object] = {}
    status = SimpleNamespace(applications=applications)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=SimpleNamespace(status=lambda: status)))
    monkeypatch.setattr(command, "SAY_EVERY_S", 0.05)
    said: list[str] = []
    monkeypatch.setattr(command, "say", said.append)
    with command._progress(ServeConfig((("small", "run"),), compile="off")):
        while not said:
            time.sleep(0.01)
        states: dict[str, dict[str, int]] = {"model": {"STARTING": 2}, "ingress": {State.RUNNING: 1}}
        deployments = {name: SimpleNamespace(replica_states=one) for name, one in states.items()}
        applications[command.APP] = SimpleNamespace(deployments=deployments)
        while "model" not in said[-1]:
            time.sleep(0.01)
    assert said[0].startswith("the service is still starting after 0 s (load ")
    assert said[0].endswith("cores)")
    assert said[-1].endswith("; ingress: 1 RUNNING; model: 2 STARTING")
    said.clear()
    with command._progress(ServeConfig((("small", "run"),), warmup_s=90)):
        while not said:
            time.sleep(0.01)
    assert said[0].endswith("2 STARTING; compiling takes 90 s at most, --compile off leaves it out")


def test_a_call_to_a_ray_that_has_ended_is_given_up() -> None:
    """Its calls wait in C++ without a limit."""
    with pytest.raises(TimeoutError):
        command._within(0.05, lambda: time.sleep(2))
    assert command._within(10, lambda: 7) == 7
    with pytest.raises(KeyError):
        command._within(10, lambda: {}["absent"])


@pytest.mark.slow
def test_other_applications_of_a_serve_outlive_the_service(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both where they came after it and where Serve ran before it: it shut down all of Serve."""
    from ray import serve

    class Seven:
        def __call__(self) -> str:
            return "7"

    def answer(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            return bytes(response.read())

    seven = serve.deployment(Seven, ray_actor_options={"num_cpus": 0.1}).bind()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster, which this process is connected to already
    monkeypatch.setattr(command, "application", lambda *_: seven)
    config = ServeConfig((("a", "/absent"),))
    try:
        with served(config, Placement(port=0)) as url:
            serve.run(seven, name="other", route_prefix="/other")
        assert serve.status().applications.keys() == {"other"}
        with served(config, Placement(port=int(url.rpartition(":")[2]))):
            assert (answer(url), answer(f"{url}/other")) == (b"7", b"7")
        assert serve.status().applications.keys() == {"other"}
        assert answer(f"{url}/other") == b"7"
    finally:
        serve.shutdown()
    with served(config, Placement(port=0)):
        pass
    assert not serve.status().proxies  # alone it takes Serve with it
