"""The client against the service on a port, and against urls where no service will ever answer."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import StorageError, UserError
from scoreray.data.reading.decode import npy_array
from scoreray.sampling.http.client import Client, Declined, _body
from scoreray.sampling.samplers.sample import num_calls
from scoreray.sampling.samplers.sigmas import karras
from scoreray.sampling.service.config import ServeConfig


@pytest.fixture(scope="module")
def url(new_run: Callable[..., str], served: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service on a port of this machine."""
    run = new_run(str(tmp_path_factory.mktemp("runs") / "small"))
    with served(ServeConfig((("small", run),), precision="fp32", compile="off")) as (url, _):
        yield url.rstrip("/")


def test_what_made_the_samples_is_named_and_typed_as_in_json(url: str) -> None:
    client = Client(url)
    fields: dict[str, Any] = {"count": 2, "steps": 3, "sampler": "euler", "guidance": 1.5, "class_label": 1}
    in_json = client.sample_json(seed=7, **fields)
    about = client.sample(seed=7, **fields).about
    per_answer = {"id", "queued_s", "took_s"}
    assert about.keys() == in_json.keys() - {"data"}
    for name in about.keys() - per_answer:
        assert (type(about[name]), about[name]) == (type(in_json[name]), in_json[name]), name
    assert {type(about[name]) for name in per_answer} == {str, float}
    chosen = client.sample(**fields)
    again = client.sample(seed=chosen.about["seed"], **fields)
    assert np.array_equal(chosen.images, again.images)


def test_an_answer_of_a_metropolis_sampler_has_its_acceptance(url: str) -> None:
    client, fields = Client(url), {"count": 3, "sampler": "mala", "steps": 4, "options": {"anneal": True}}
    about = client.sample(seed=7, **fields).about
    assert about["acceptance"] == client.sample_json(seed=7, **fields)["acceptance"]
    assert 0 < about["acceptance"] < 1
    assert round(about["acceptance"] * 3 * 4 * 5, 3) in range(60)  # of 3 samples, 4 levels and 5 steps
    calls = num_calls("mala", karras(4), anneal=True)
    assert (about["calls"], about["rows"]) == (calls, 3 * calls)
    assert "acceptance" not in client.sample(seed=7, count=1, sampler="baoab", steps=4).about


def test_numbers_of_numpy_are_numbers(url: str) -> None:
    fields = {"count": np.int64(2), "steps": np.array(3), "guidance": np.float32(1.5), "class_label": torch.tensor(1)}
    options = {"s_churn": np.float64(2.0), "s_noise": np.float32(1.0)}
    about = Client(url).sample(sampler="edm_sde", grid="linear", seed=np.uint32(5), options=options, **fields).about
    assert (about["count"], about["steps"], about["guidance"], about["seed"]) == (2, 3, 1.5, 5)
    assert about["grid"] == "linear"


def test_conditions_are_sent_as_they_are_and_arrays_as_npy() -> None:
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    condition = {
        "caption": "ö",
        "hour": np.float32(1.5),
        "place": [1, 2],
        "grid": transposed,
        "tokens": torch.ones(1, 2),
    }
    sent = json.loads(_body({"count": 2, "condition": condition}))
    assert sent["count"] == 2
    arrays = {name: sent["condition"].pop(name)["npy"] for name in ("grid", "tokens")}
    assert sent["condition"] == {"caption": "ö", "hour": 1.5, "place": [1, 2]}
    assert np.array_equal(npy_array(base64.b64decode(arrays["grid"])), transposed)
    assert np.array_equal(npy_array(base64.b64decode(arrays["tokens"])), np.ones((1, 2)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guidance": float("nan")}, "guidance = nan: must be a finite number"),
        ({"options": {"eta": float("inf")}}, "options = {'eta': inf}: must be a finite number"),
        ({"count": np.array([1, 2])}, "count = array"),
        ({"condition": {"place": [1.0, float("nan")]}}, "condition: Out of range float values"),
        ({"condition": {"place": np.array([object()])}}, "condition: Object arrays cannot be saved"),
        ({"condition": {"place": {1, 2}}}, "condition: a set: must be text"),
        ({"stream": True}, "call `stream`"),
        ({"idempotency_key": "a"}, "as `key`"),
    ],
)
def test_fields_that_can_not_be_sent_are_refused_before_they_are(fields: dict[str, Any], reason: str) -> None:
    client = Client("http://127.0.0.1:9")
    for call in (client.sample, client.sample_json):
        with pytest.raises(UserError, match=r"(?s)^[^\n]*$") as refused:
            call(**fields)
        assert reason in str(refused.value)


def test_an_unknown_host_or_a_bad_url_is_refused_at_once() -> None:
    for url in ("http://no-such-host.invalid:8000", "nonsense://127.0.0.1:1", "http://:0:x"):
        started = time.monotonic()
        with pytest.raises(UserError, match="check the url"):
            Client(url).sample()
        assert time.monotonic() - started < 5


def test_a_service_that_is_not_up_yet_is_tried_again(url: str) -> None:
    with pytest.raises(StorageError, match="2 tries"):
        Client("http://127.0.0.1:9", tries=2).sample()
    with pytest.raises(Declined, match="did you mean 'heun'"):
        Client(url).sample(sampler="huen")


def test_https_to_a_service_without_tls_is_refused_at_once(url: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="plain http"):
        Client(url.replace("http:", "https:")).sample()
    assert time.monotonic() - started < 5


@pytest.fixture
def scripted() -> Iterator[Callable[[list[tuple[int, dict[str, str], Any]]], tuple[str, list[Any]]]]:
    """A server that gives the answers of a list in turn: (status, headers, body); a body None cuts the connection."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: list[tuple[int, dict[str, str], Any]]) -> tuple[str, list[Any]]:
        sent: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                sent.append((time.monotonic(), self.headers["idempotency-key"]))
                status, headers, body = answers.pop(0)
                if body is None:
                    self.connection.shutdown(2)
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


BUSY = {"code": "overloaded", "message": "later"}


def test_retries_keep_their_key_and_wait_as_long_as_retry_after_says(scripted: Any) -> None:
    url, sent = scripted([(200, {}, None), (503, {"Retry-After": "1"}, BUSY), (429, {}, BUSY), (200, {}, {"id": "a"})])
    assert Client(url).sample_json() == {"id": "a"}
    times, keys = zip(*sent, strict=True)
    assert len(set(keys)) == 1
    assert 1.0 <= times[2] - times[1] <= 1.25 + 1.0
    assert times[1] - times[0] < 1.0


def test_what_another_try_would_not_change_is_not_tried_again(scripted: Any) -> None:
    for status, code in ((422, "invalid"), (503, "timed_out"), (302, "unknown")):
        url, sent = scripted([(status, {"Retry-After": "1"}, {"code": code, "message": "no"})] * 2)
        with pytest.raises(Declined, match=rf"{code} \({status}\)"):
            Client(url).sample_json()
        assert len(sent) == 1


def test_after_the_last_try_the_last_reason_is_reported(scripted: Any) -> None:
    url, sent = scripted([(503, {"Retry-After": "soon"}, BUSY), (200, {}, None), (503, {}, BUSY)])
    with pytest.raises(StorageError, match=r"no answer in 3 tries; the last: overloaded \(503\): later"):
        Client(url, tries=3).sample_json()
    assert len(sent) == 3


def test_a_stream_that_breaks_off_begins_again_with_its_key(scripted: Any) -> None:
    start, done = b'event: start\ndata: {"id": 1}\n\n', b'event: done\ndata: {"id": 2}\n\n'
    url, sent = scripted([(200, {}, start), (200, {"Content-Length": "900"}, start), (200, {}, start + done)])
    assert [name for name, _ in Client(url).stream()] == ["start", "start", "start", "done"]
    assert len({key for _, key in sent}) == 1
    url, _ = scripted([(200, {}, start)] * 2)
    with pytest.raises(StorageError, match="2 tries; the last: the stream broke off"):
        list(Client(url, tries=2).stream())
