"""The service on Ray Serve, over real HTTP: replicas are killed, requests are too many, checkpoints arrive, it ends.

One service for most of the tests: two replicas in the session's cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import urllib3

from scoreray.cluster.cli import main as cli
from scoreray.cluster.serve.command import served
from scoreray.cluster.serve.deployments import replicas_wanted
from scoreray.cluster.serve.options import Placement, make_config, make_limits, parse_replicas
from scoreray.data.errors import StorageError, UserError
from scoreray.sampling.http.client import Client, Declined
from scoreray.sampling.service.access import hash_of
from scoreray.sampling.service.config import Limits
from scoreray.sampling.service.idempotency import open_key_store

NUM_KILLS = 10
PATIENCE_S = 600.0  # of a busy machine; nothing here waits longer than it must
OVERLOAD = 10
LIMITS = Limits(max_waiting_rows=96, max_wait_s=PATIENCE_S, max_request_s=PATIENCE_S, token_requests=4000,
                token_rows=100_000)  # fmt: skip
HTTP = urllib3.PoolManager(maxsize=16, retries=False, timeout=PATIENCE_S)
SECRET = "a-token-for-this-test"
QUICK = ("--precision", "fp32", "--compile", "off", "--threads", "1")  # to start


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "served"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("keys") / "keys.sqlite")


@pytest.fixture(scope="module")
def service(ray_cluster: None, run_url: str, keys: str) -> Iterator[str]:
    settings: dict[str, Any] = {"precision": "fp32", "compile": "off", "threads": 1, "reload_s": 0.5, "limits": LIMITS}
    config = make_config([run_url], None, "127.0.0.1", False, keys=keys, **settings)
    with served(config, Placement(port=0, replicas=(2, 2), cpus_per_replica=0.1)) as url:
        yield url


@contextlib.contextmanager
def serving(*arguments: str, **streams: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`scoreray serve` in a process and on a Ray of its own: the process, and the folder of that Ray's files."""
    folder = tempfile.mkdtemp(dir="/tmp")  # short: Ray's sockets are in it
    command = [sys.executable, "-m", "scoreray.cluster.cli", "serve", *arguments, "--port", "0"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    process = subprocess.Popen(command, text=True, env={**env, "RAY_TMPDIR": folder}, **streams)
    try:
        yield process, folder
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def metrics(url: str) -> dict[str, float]:
    """Sums over labels, by name."""
    page, found = HTTP.request("GET", url + "/metrics").data.decode(), Counter[str]()
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
    return found


def pids(name: str) -> list[int]:
    """Of our cluster's processes of an actor, by how Ray names them."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if name in " ".join(process.info["cmdline"] or []) and os.getpid() in {p.pid for p in process.parents()}
    ]


def replica_pids() -> list[int]:
    return pids("ServeReplica:scoreray:model")


def answering(url: str) -> int:
    """Replicas that are loaded and answer."""
    page = HTTP.request("GET", url + "/metrics").data.decode()
    return len(set(re.findall(r'replica="(\w+)"', page)))


def until(true: Callable[[], bool], what: str, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(every_s)


def test_samples_previews_and_the_model_through_the_client(service: str) -> None:
    client = Client(service)
    assert client.ready()
    a = client.sample(count=5, steps=4, seed=3)
    assert (a.images.shape, a.images.dtype, a.labels.tolist()) == ((5, 8, 8, 1), np.uint8, [0, 1, 2, 0, 1])
    assert a.about["seed"] == 3
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
    assert answering(service) == 2
    one = HTTP.request("POST", service + "/v1/samples", json={}, headers={"X-Request-ID": "mine-1"})
    assert (one.headers["x-request-id"], one.json()["id"]) == ("mine-1", "mine-1")  # once, not also by Serve's proxy


def test_a_service_listens_on_loopback_only(service: str, new_listeners: Any) -> None:
    """Also the gRPC servers of its replicas and ingress, which Ray Serve starts for all addresses."""
    with new_listeners() as listeners:
        Client(service).sample(count=1, steps=2)
        until(lambda: len(listeners.seen) > 5, "they are listed")
    listeners.check()
    assert {"ServeReplica", "ProxyActor"} <= {
        name.removeprefix("ray::").partition(":")[0] for name, *_ in listeners.seen
    }


def test_serves_own_listener_refuses_in_json_and_hangs_up(service: str) -> None:
    host, _, port = service.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["code"] == "bad_request"
    for path in ("/", "/v1/model", "/metrics", "/healthz", "/readyz", "/docs", "/openapi.json"):
        head, whole = (HTTP.request(method, service + path) for method in ("HEAD", "GET"))
        assert (head.status, head.data) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.slow
def test_replicas_killed_under_load_lose_nothing_and_double_nothing(service: str) -> None:
    """SIGKILL of one of two replicas, ten times; every request is answered once, as it would be without kills."""
    pool = urllib3.PoolManager(maxsize=16, retries=False, timeout=PATIENCE_S)
    before, stop = metrics(service), threading.Event()
    answers: list[tuple[str, int, bytes]] = []

    def send_until_stopped(worker: int) -> None:
        number = 0
        while not stop.is_set():
            name = f"w{worker}-{number}"
            body = {"count": 2, "steps": 12 + number % 9, "seed": number, "idempotency_key": name}
            headers = {"Content-Type": "application/json", "X-Request-ID": name}
            reply = pool.request("POST", service + "/v1/samples", body=json.dumps(body), headers=headers)
            answers.append((reply.headers["x-request-id"], reply.status, reply.data))
            number += 1

    workers = [threading.Thread(target=send_until_stopped, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    killed: set[int] = set()
    try:
        while len(killed) < NUM_KILLS:
            until(lambda: answering(service) == 2, "two replicas answer")
            victim = next(pid for pid in replica_pids() if pid not in killed)
            killed.add(victim)
            os.kill(victim, signal.SIGKILL)
            until(lambda pid=victim: pid not in replica_pids(), "the killed one is gone")
    finally:
        stop.set()
        for worker in workers:
            worker.join()
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


@pytest.mark.slow
@pytest.mark.parametrize("when", ["between draw and answer", "while it draws", "while it streams"])
def test_a_retry_after_the_death_of_the_ingress_draws_and_bills_nothing_twice(
    service: str, keys: str, when: str
) -> None:
    """SIGKILL of the ingress while it answers a request; the client sends it again with the same key.

    The draw ends with no ingress to take its answer, and then the client comes back; or the client comes first.
    """
    store = open_key_store(keys, LIMITS)

    def stored() -> int:
        return sum(store.bill("test", {}).values())

    until(lambda: answering(service) == 2, "two replicas answer")
    before, stored_before = metrics(service), stored()
    (ingress,) = pids("ServeReplica:scoreray:ingress")
    key, fields = f"killed-{when}".replace(" ", "-"), {"count": 8, "steps": 900, "sampler": "euler"}
    with ThreadPoolExecutor(1) as one:
        body = json.dumps({**fields, "stream": when.endswith("streams")})
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        first = one.submit(HTTP.request, "POST", service + "/v1/samples", body=body, headers=headers, retries=False)
        until(lambda: metrics(service)["scoreray_nfe_total"] > before["scoreray_nfe_total"], "it draws", 0.005)
        os.kill(ingress, signal.SIGKILL)
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            reply = first.result()
            assert reply.status != 200 or b"event: done" not in reply.data, "the answer was out before the kill"
            assert reply.status != 200 or when.endswith("streams"), "the answer was out before the kill"
    if when.startswith("between"):
        until(lambda: stored() == stored_before + 8, "the draw ends without its ingress")
    answer = Client(service, tries=1000).sample_json(key=key, **fields)
    assert len(answer["data"]) == 8
    until(lambda: answering(service) == 2, "two replicas answer")
    billed = before["scoreray_billed_rows_total"]
    until(lambda: metrics(service)["scoreray_billed_rows_total"] >= billed + 8, "what was billed before is known")
    after = metrics(service)
    assert after["scoreray_samples_total"] - before["scoreray_samples_total"] == 8
    assert after["scoreray_billed_rows_total"] - billed == 8


@pytest.mark.slow
def test_ten_times_too_much_is_shed_and_what_is_taken_is_quick(service: str) -> None:
    """Requests come at ten times the rate that the service can answer, whatever it says (an open loop)."""
    pool = urllib3.PoolManager(maxsize=256, retries=False, timeout=PATIENCE_S)
    body = json.dumps({"count": 32, "steps": 60})
    headers = {"Content-Type": "application/json"}

    sent: list[float] = []

    def post(at: float = 0.0) -> tuple[int, float, str | None]:
        time.sleep(max(0.0, at - time.monotonic()))
        started = time.monotonic()
        sent.append(started)
        reply = pool.request("POST", service + "/v1/samples", body=body, headers=headers)
        return reply.status, time.monotonic() - started, reply.headers.get("retry-after")

    def memory() -> dict[str, float]:
        names = ("ServeReplica:scoreray:model", "ServeReplica:scoreray:ingress", "ProxyActor")
        return {name: sum(psutil.Process(pid).memory_info().rss for pid in pids(name)) / 2**20 for name in names}

    until(lambda: answering(service) == 2, "two replicas answer")
    with ThreadPoolExecutor(4) as few:
        list(few.map(lambda _: post(), range(4)))
        started = time.monotonic()
        assert {status for status, _, _ in few.map(lambda _: post(), range(8))} == {200}
        per_s = 8 / (time.monotonic() - started)
    replies: list[tuple[int, float, str | None]] = []
    for _ in range(2):
        before = memory()
        sent.clear()
        with ThreadPoolExecutor(200) as many:
            start = time.monotonic() + 0.2
            replies += many.map(post, [start + i / (OVERLOAD * per_s) for i in range(100)])
        assert 99 / (max(sent) - min(sent)) >= 8 * per_s, "the load was not what this test is about"
    statuses = Counter(status for status, _, _ in replies)
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] >= 6, statuses
    assert statuses[503] >= 100, statuses
    assert all(retry is not None and int(retry) >= 1 for status, _, retry in replies if status != 200)
    queue_s = 2 * LIMITS.max_waiting_rows / 32 / per_s  # full queues of both, at the rate that was measured
    assert max(took for status, took, _ in replies if status == 200) < 4 * queue_s + 5
    assert all(after < before[name] + 50 for name, after in memory().items()), (before, memory())
    assert post()[0] == 200


def test_a_client_that_disconnects_frees_its_rows(service: str) -> None:
    before = metrics(service)["scoreray_cancelled_rows_total"]
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        HTTP.request("POST", service + "/v1/samples", json={"count": 32, "steps": 1000}, timeout=1.0, retries=False)
    until(lambda: metrics(service)["scoreray_waiting_rows"] == 0, "its rows are freed")
    until(lambda: metrics(service)["scoreray_requests_under_way"] == 0, "its request ends")
    page = metrics(service)
    assert page["scoreray_cancelled_rows_total"] - before == 32


def test_a_newer_checkpoint_is_taken_while_requests_run(
    service: str, run_url: str, new_run: Callable[..., str]
) -> None:
    seen: list[int] = []
    stop = threading.Event()
    failures: list[Any] = []

    def send_until_stopped() -> None:
        while not stop.is_set():
            reply = HTTP.request("POST", service + "/v1/samples", json={"steps": 6}, retries=False)
            if reply.status != 200:
                failures.append((reply.status, reply.data))
            else:
                seen.append(reply.json()["images_seen"])

    workers = [threading.Thread(target=send_until_stopped) for _ in range(4)]
    for worker in workers:
        worker.start()
    new_run(run_url, 640, seed=5)
    until(lambda: 640 in seen or bool(failures), "the new one answers")
    time.sleep(0.3)
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures
    assert set(seen) == {64, 640}


def test_the_client_waits_for_retry_after(service: str) -> None:
    client, before = Client(service, tries=200), metrics(service)["scoreray_sheds_total"]
    with ThreadPoolExecutor(32) as many:
        found = list(many.map(lambda i: client.sample(count=8, steps=12, seed=i, key=f"busy-{i}"), range(40)))
    assert len(found) == 40
    assert metrics(service)["scoreray_sheds_total"] > before, "none was turned away"
    with pytest.raises(StorageError, match="2 tries"):
        Client("http://127.0.0.1:9", tries=2).sample()


@pytest.mark.slow
def test_asked_to_end_it_answers_what_it_has_taken(run_url: str, tmp_path: Any) -> None:
    """`scoreray serve` in a process of its own, on a Ray of its own: SIGTERM while requests run; exit status 0."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"test:{SECRET}\n")
    options = ["--json", *QUICK, "--token-file", str(tokens)]
    patient = ["--drain-s", f"{PATIENCE_S}", "--limit", f"max_request_s={PATIENCE_S}", "--limit", "max_wait_s=600"]
    with serving(f"mine={run_url}", *options, *patient, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as (
        process, folder,
    ):  # fmt: skip
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        client = Client(url, SECRET, tries=1)
        assert client.model()["name"] == "mine"
        with pytest.raises(Declined, match="no_token"):
            Client(url).sample()
        with pytest.raises(Declined, match="no_token"):
            Client(url, SECRET + "?").sample()
        page = f"{url}/metrics"
        headers = {"Authorization": f"Bearer {SECRET}"}
        with ThreadPoolExecutor(12) as many:
            under_way = [many.submit(client.sample, count=8, steps=120, seed=i) for i in range(12)]
            taken = "scoreray_requests_under_way 12.0"
            until(lambda: taken in HTTP.request("GET", page, headers=headers).data.decode(), "all are taken", 0.02)
            process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in under_way]
            logs = [file.read_text(errors="replace") for file in Path(folder).glob("sr-*/r/session_2*/logs/**/*.*")]
        assert [len(answer.images) for answer in answers] == [8] * 12
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        printed = process.stderr.read()
        assert "draining" in printed
        assert process.stdout.read() == ""
        assert "Traceback" not in printed
        assert any("POST /v1/samples test " in log for log in logs), "these are not the logs of the service"
        assert not any(secret in text for text in (printed, *logs) for secret in (SECRET, hash_of(SECRET)))


@pytest.mark.slow
def test_requests_that_do_not_end_in_time_are_refused_as_draining(run_url: str) -> None:
    """`scoreray serve` ends with requests that take longer than --drain-s: 503 and its JSON; exit status 130."""
    options = ["--json", *QUICK, "--drain-s", "1"]
    patient = ["--limit", f"max_request_s={PATIENCE_S}", "--limit", "max_wait_s=6000"]
    with serving(f"mine={run_url}", *options, *patient, stdout=subprocess.PIPE) as (process, _):
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        slow = {"count": 128, "steps": 1000}
        with ThreadPoolExecutor(4) as few:
            bodies = [slow, slow, {**slow, "idempotency_key": "a"}, {**slow, "stream": True}]
            futures = [few.submit(HTTP.request, "POST", f"{url}/v1/samples", json=body) for body in bodies]
            until(lambda: metrics(url)["scoreray_requests_under_way"] == 4, "all are taken", 0.02)
            process.send_signal(signal.SIGTERM)
            *replies, stream = [future.result() for future in futures]
        for reply in replies:
            assert (reply.status, reply.json()["code"], reply.headers["retry-after"]) == (503, "draining", "5")
        assert b'"code": "draining"' in stream.data
        assert process.wait(PATIENCE_S) == 130


@pytest.mark.slow
def test_ended_before_it_served_it_says_so(run_url: str) -> None:
    """Ctrl-C while Ray starts: nothing is committed, and nothing goes on."""
    with serving(run_url, stderr=subprocess.PIPE) as (process, folder):
        until(lambda: any(Path(folder).glob("sr-*/r/session_2*")), "Ray starts")
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert printed.splitlines()[-1] == "scoreray: ended while it was starting; requests under way were cut off"
        assert "Traceback" not in printed


@pytest.mark.slow
def test_sigterm_to_all_of_its_process_group_ends_it(run_url: str) -> None:
    """As `timeout` and service managers send it: Ray's daemons end too, and calls to them would wait for ever."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with serving(f"mine={run_url}", "--json", *QUICK, "--drain-s", "1", start_new_session=True, **pipes) as (
        process,
        _,
    ):
        assert process.stdout is not None
        json.loads(process.stdout.readline())
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        _, printed = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - began < 150, printed
        assert process.returncode in (0, 130), printed
        assert printed.splitlines()[-1].startswith(("ended", "scoreray: ")), printed
        assert "Traceback" not in printed


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
    taken = socket.create_server(("127.0.0.1", 0))
    empty, tokens = tmp_path / "empty", tmp_path / "tokens"
    empty.write_text("# nobody yet\n")
    tokens.write_text(f"ana:{SECRET}\n")
    for words, expected in (
        ([run_url, "--token-file", str(empty)], "holds no token"),
        ([run_url, "--token-file", str(tokens), "--no-auth"], "leave one of them out"),
        ([run_url, "--port", str(taken.getsockname()[1])], "can't be listened on"),
        ([run_url, "--host", "203.0.113.7", "--no-auth"], "can't be listened on"),
        ([str(tmp_path / "absent")], "absent"),
        ([run_url, "--host", "0.0.0.0"], "tokens are needed"),
        ([run_url, "--precision", "fp8"], "fp32"),
        ([run_url, "--ema", "0.3"], "0.3"),
        ([run_url, "--limit", "count=3"], "did you mean 'max_count'"),
        ([run_url, "--limit", "max_count=many"], "max_count=256"),
        ([run_url, "--limit", "max_count=-1"], "positive"),
        ([run_url, "--port", "70000"], "65535"),
        ([run_url, "--replicas", "3,1"], "MIN <= MAX"),
        ([run_url, "--replicas", "many"], "MIN,MAX"),
        ([run_url, "--max-batch", "1"], "max-batch"),
        ([run_url, "--compile", "yes"], "off"),
        ([run_url, "--token-file", str(tmp_path / "absent")], "token-file"),
        ([run_url, "--drain-s", "-1"], "drain-s"),
        ([run_url, run_url], "NAME=URL"),
        (["a/b=c"], "a/b=c"),
        ([], "CHECKPOINT"),
    ):
        monkeypatch.setattr(sys, "argv", ["scoreray", "serve", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2
        assert line.startswith("scoreray: ")
        assert expected in line
    signal.signal(signal.SIGTERM, handler)
    taken.close()


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
