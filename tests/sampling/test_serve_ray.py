"""The service on Ray Serve, over real HTTP: replicas are killed, too much is asked, checkpoints arrive, it must end.

One service for most of the tests: two replicas in the session's cluster.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import urllib3

from scoreray.cluster import cli
from scoreray.cluster.serving import Placement, make_config, make_limits, parse_replicas, replicas_wanted, served
from scoreray.data.errors import StorageError, UserError
from scoreray.sampling.client import Client, Declined
from scoreray.sampling.serve_config import Limits

NUM_KILLS = 10
LIMITS = Limits(max_waiting_rows=96, max_request_s=60, token_requests=4000, token_rows=100_000)


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "served"))


@pytest.fixture(scope="module")
def service(ray_cluster: None, run_url: str) -> Iterator[str]:
    settings: dict[str, Any] = {"precision": "fp32", "compile": "off", "threads": 1, "reload_s": 0.5, "limits": LIMITS}
    config = make_config([run_url], None, "127.0.0.1", False, **settings)
    with served(config, Placement(port=0, replicas=(2, 2), cpus_per_replica=0.1)) as url:
        yield url


def metrics(url: str) -> dict[str, float]:
    """Sums over labels, by name."""
    page, found = urllib3.request("GET", url + "/metrics").data.decode(), Counter[str]()
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
    return found


def replica_pids() -> list[int]:
    """Of the processes that hold a model, by how Ray names them."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica:scoreray:model" in " ".join(process.info["cmdline"] or [])
        and any(parent.pid == os.getpid() for parent in process.parents())
    ]


def test_samples_previews_and_the_model_through_the_client(service: str) -> None:
    client = Client(service)
    assert client.ready()
    a = client.sample(count=5, steps=4, seed=3)
    assert (a.images.shape, a.images.dtype, a.labels.tolist()) == ((5, 8, 8, 1), np.uint8, [0, 1, 2, 0, 1])
    assert a.about["seed"] == "3"
    exact = client.sample(count=2, steps=4, seed=3, format="npy")
    assert exact.images.dtype == np.float32
    events = list(client.stream(count=2, steps=30, seed=3))
    assert [events[0][0], events[1][0], events[-1][0]] == ["start", "preview", "done"]
    assert events[-1][1]["count"] == 2
    assert client.model()["samplers"]["ddim"]["eta"]["default"] == 0.0
    with pytest.raises(Declined, match="did you mean 'heun'"):
        client.sample(sampler="huen")
    page = metrics(service)
    assert page["scoreray_samples_total"] >= 9
    text = urllib3.request("GET", service + "/metrics").data.decode()
    assert len(set(re.findall(r'replica="(\w+)"', text))) == 2


def test_replicas_killed_under_load_lose_nothing_and_double_nothing(service: str) -> None:
    """SIGKILL of one of two replicas, ten times; every request is answered once, with what it would get in peace."""
    pool = urllib3.PoolManager(maxsize=16, retries=False, timeout=90)
    before, stop = metrics(service), threading.Event()
    answers: list[tuple[str, int, bytes]] = []

    def ask(worker: int) -> None:
        number = 0
        while not stop.is_set():
            name = f"w{worker}-{number}"
            body = {"count": 2, "steps": 12 + number % 9, "seed": number, "idempotency_key": name}
            headers = {"Content-Type": "application/json", "X-Request-ID": name}
            reply = pool.request("POST", service + "/v1/samples", body=json.dumps(body), headers=headers)
            answers.append((reply.headers["x-request-id"], reply.status, reply.data))
            number += 1

    workers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    killed: set[int] = set()
    deadline = time.monotonic() + 120
    while len(killed) < NUM_KILLS and time.monotonic() < deadline:
        there = [pid for pid in replica_pids() if pid not in killed]
        if len(there) >= 2:
            killed.add(there[0])
            os.kill(there[0], signal.SIGKILL)
        time.sleep(0.2)
    stop.set()
    for worker in workers:
        worker.join()
    assert len(killed) == NUM_KILLS
    bad = [(name, status, data[:200]) for name, status, data in answers if status != 200]
    assert not bad, bad
    names = Counter(name for name, _, _ in answers)
    assert max(names.values()) == 1
    after = metrics(service)
    assert after["scoreray_billed_rows_total"] - before["scoreray_billed_rows_total"] == 2 * len(answers)
    assert after["scoreray_retries_total"] > before["scoreray_retries_total"]
    by_request: dict[tuple[int, int], set[str]] = {}
    for _, _, data in answers:
        answer = json.loads(data)
        pictures = "".join(item["b64_json"] for item in answer["data"])
        by_request.setdefault((answer["seed"], answer["steps"]), set()).add(pictures)
    assert len(by_request) > 1
    different = sum(len(found) > 1 for found in by_request.values())
    assert different <= 0.05 * len(by_request), "the same request drew other samples"  # last bits may round otherwise


def test_ten_times_too_much_is_shed_and_what_is_taken_is_quick(service: str) -> None:
    pool = urllib3.PoolManager(maxsize=128, retries=False, timeout=60)
    body = json.dumps({"count": 8, "steps": 25})
    headers = {"Content-Type": "application/json"}

    def ask(_: int) -> tuple[int, float, str | None]:
        started = time.monotonic()
        reply = pool.request("POST", service + "/v1/samples", body=body, headers=headers)
        return reply.status, time.monotonic() - started, reply.headers.get("retry-after")

    [ask(0) for _ in range(4)]
    with ThreadPoolExecutor(96) as many:
        first = list(many.map(ask, range(150)))
        memory = [psutil.Process(pid).memory_info().rss for pid in replica_pids()]
        second = list(many.map(ask, range(300)))
    replies = first + second
    statuses = Counter(status for status, _, _ in replies)
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] >= 20, statuses
    assert statuses[503] >= 50, statuses
    assert all(retry is not None for status, _, retry in replies if status != 200)
    taken = sorted(took for status, took, _ in replies if status == 200)
    assert taken[int(0.99 * len(taken))] < 20, taken[-5:]
    assert sum(psutil.Process(pid).memory_info().rss for pid in replica_pids()) < sum(memory) + (100 << 20)
    assert pool.request("POST", service + "/v1/samples", body=body, headers=headers).status == 200


def test_a_client_that_disconnects_frees_its_rows(service: str) -> None:
    before = metrics(service)["scoreray_cancelled_rows_total"]
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        urllib3.request("POST", service + "/v1/samples", json={"count": 32, "steps": 1000}, timeout=1.0, retries=False)
    for _ in range(100):
        page = metrics(service)
        if page["scoreray_waiting_rows"] == 0 and page["scoreray_requests_under_way"] == 0:
            break
        time.sleep(0.05)
    assert page["scoreray_waiting_rows"] == page["scoreray_requests_under_way"] == 0
    assert page["scoreray_cancelled_rows_total"] - before == 32


def test_a_newer_checkpoint_is_taken_while_requests_run(
    service: str, run_url: str, new_run: Callable[..., str]
) -> None:
    seen: list[int] = []
    stop = threading.Event()
    failures: list[Any] = []

    def ask() -> None:
        while not stop.is_set():
            reply = urllib3.request("POST", service + "/v1/samples", json={"steps": 6}, retries=False)
            if reply.status != 200:
                failures.append((reply.status, reply.data))
            else:
                seen.append(reply.json()["images_seen"])

    workers = [threading.Thread(target=ask) for _ in range(4)]
    for worker in workers:
        worker.start()
    new_run(run_url, 640, seed=5)
    deadline = time.monotonic() + 30
    while 640 not in seen and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures
    assert set(seen) == {64, 640}


def test_the_client_waits_where_it_is_told_to(service: str) -> None:
    client = Client(service, tries=20)
    with ThreadPoolExecutor(32) as many:
        found = list(many.map(lambda i: client.sample(count=8, steps=25, seed=i, key=f"busy-{i}"), range(40)))
    assert len(found) == 40
    with pytest.raises(StorageError, match="2 tries"):
        Client("http://127.0.0.1:9", tries=2).sample()


def test_told_to_end_it_answers_what_it_has_taken(run_url: str, tmp_path: Any) -> None:
    """`scoreray serve` in a process of its own, on a Ray of its own: SIGTERM while requests run; exit status 0."""
    tokens = tmp_path / "tokens"
    tokens.write_text("test:a-token-for-this-test\n")
    command = [sys.executable, "-m", "scoreray.cluster.cli", "serve", f"mine={run_url}", "--port", "0", "--json"]
    options = ["--precision", "fp32", "--compile", "off", "--threads", "1", "--token-file", str(tokens)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        client = Client(url, "a-token-for-this-test", tries=1)
        assert client.model()["name"] == "mine"
        with pytest.raises(Declined, match="no_token"):
            Client(url).sample()
        with ThreadPoolExecutor(12) as many:
            under_way = [many.submit(client.sample, count=8, steps=60, seed=i) for i in range(12)]
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in under_way]
        assert [len(answer.images) for answer in answers] == [8] * 12
        assert process.wait(60) == 0
        assert process.stderr is not None
        told = process.stderr.read()
        assert "draining" in told
        assert process.stdout.read() == ""
        assert "Traceback" not in told
        assert "a-token-for-this-test" not in told
    finally:
        process.kill()
        process.wait()


def test_more_rows_want_more_replicas() -> None:
    def wanted(rows: list[float]) -> int:
        context = SimpleNamespace(
            aggregated_metrics={"waiting_rows": dict(enumerate(rows))},
            config=SimpleNamespace(get_target_ongoing_requests=lambda: 128.0),
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=4,
        )
        return replicas_wanted(context)[0]

    assert [wanted(rows) for rows in ([], [0], [128], [129], [200, 100], [900, 900])] == [1, 1, 1, 2, 3, 4]


def test_mistakes_are_one_line_before_ray_starts(
    run_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    for words, told in (
        ([str(tmp_path / "absent")], "absent"),
        ([run_url, "--host", "0.0.0.0"], "tokens are needed"),
        ([run_url, "--precision", "fp8"], "fp32"),
        ([run_url, "--ema", "0.3"], "0.3"),
        ([run_url, "--limit", "count=3"], "did you mean 'max_count'"),
        ([], "CHECKPOINT"),
    ):
        monkeypatch.setattr(sys, "argv", ["scoreray", "serve", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2
        assert line.startswith("scoreray: ")
        assert told in line
    signal.signal(signal.SIGTERM, handler)


def test_words_of_the_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCORERAY_TOKENS", raising=False)
    config = make_config(["s3://b/runs/mine/", "other=s3://b/x"], None, "127.0.0.1", False)
    assert config.models == (("mine", "s3://b/runs/mine/"), ("other", "s3://b/x"))
    assert "localhost" in config.hosts
    with pytest.raises(UserError, match="tokens are needed"):
        make_config(["a"], None, "0.0.0.0", False)
    assert make_config(["a"], None, "0.0.0.0", True).hosts == ()
    with pytest.raises(UserError, match="twice"):
        make_config(["x/a", "y/a"], None, "127.0.0.1", False)
    assert parse_replicas("2") == (2, 2)
    assert parse_replicas("1,4") == (1, 4)
    for wrong in ("x", "a,2", "1,b"):
        with pytest.raises(UserError, match="--replicas"):
            parse_replicas(wrong)
    with pytest.raises(UserError, match="MIN <= MAX"):
        Placement(replicas=(2, 1))
    with pytest.raises(UserError, match="did you mean 'max_count'"):
        make_limits(["max_cuont=3"])
    assert make_limits(["max_count=3"]).max_count == 3
    with pytest.raises(UserError, match="positive"):
        make_limits(["max_count=0"])
    with pytest.raises(UserError, match="can't be read"):
        make_config(["a"], tmp_path / "absent", "127.0.0.1", False)
