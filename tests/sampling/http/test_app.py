"""The service's HTTP, in process: every answer, every refusal, keys, limits, and bodies that nobody should send."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from waiting import PATIENCE_S

from scoreray.cluster.cli import main as cli
from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser, to_uint8
from scoreray.data.packing.inspect import field_pictures
from scoreray.sampling.guidance.guidance import ClassifierFree
from scoreray.sampling.http.app import make_app
from scoreray.sampling.http.images import GENERATIONS, ImagesBody
from scoreray.sampling.http.parse import parse
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.driver import in_same_rows
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.options import options_of
from scoreray.sampling.samplers.sample import SAMPLERS, num_calls, sample
from scoreray.sampling.service.access import NOBODY, hash_of, is_loopback, read_tokens
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import ERRORS, Limits, Refused, ServeConfig
from scoreray.sampling.service.metrics import REPLICA_METRICS, SERVICE_METRICS
from scoreray.sampling.service.models import ServedModel
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import Event, Lost, SampleRequest
from scoreray.sampling.service.service import LocalBackend, Service
from scoreray.trainer.config.condition_values import described
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec

JSON = {"Content-Type": "application/json"}
SECRET = "a-secret-of-thirty-characters!"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["code"]


class Caller:
    """Calls an ASGI application as a server would."""

    def __init__(self, app: Any, service: Service, replica: Replica) -> None:
        self.app, self.service, self.replica = app, service, replica

    async def __call__(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        leave_after: float = 1e9,
        send_fails: bool = False,
    ) -> Reply:
        reply, ended = Reply(0, {}, b""), asyncio.Event()
        waiting = [body]

        async def receive() -> dict[str, Any]:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), leave_after)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if send_fails:
                raise OSError("the connection is closed")
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode("latin-1") for k, v in message["headers"]}
            else:
                reply.body += message.get("body", b"")

        raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in {"Host": "localhost", **(headers or {})}.items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "headers": raw, "scheme": "http", "root_path": "",
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await self.app(scope, receive, send)
        ended.set()
        return reply

    async def post(self, body: Any = None, **headers: str) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self("POST", "/v1/samples", raw, {**JSON, **named})


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "small"))


@pytest.fixture(scope="module")
def points_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "points"), shape=(2,), classes=0)


@pytest.fixture(scope="module")
def plain_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures of one pixel by a perceptron: as quick as points."""
    network = {"kind": "mlp", "hidden_size": 16}
    return new_run(str(tmp_path_factory.mktemp("runs") / "pixels"), shape=(1, 1, 1), classes=0, network=network)


def config(url: str, **settings: Any) -> ServeConfig:
    return ServeConfig((("small", url),), precision="fp32", compile="off", **settings)


@contextlib.asynccontextmanager
async def serving(settings: ServeConfig, wrap: Callable[[Replica], Any] = LocalBackend) -> AsyncIterator[Caller]:
    replica = Replica(settings)
    service = Service(settings, wrap(replica))
    await service.start()
    try:
        yield Caller(make_app(service), service, replica)
    finally:
        await service.stop()
        await replica.close()


def picture(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def metric(page: str, name: str) -> float:
    return sum(
        float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith((name + " ", name + "{"))
    )


def test_what_is_served_is_what_is_drawn_offline(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            fields = {"count": 4, "sampler": "edm_sde", "steps": 5, "seed": 7, "options": {"s_churn": 4.0}}
            reply = await call.post(fields, X_Request_ID="one")
            assert reply.status == 200
            answer = reply.json
            assert (answer["id"], reply.headers["x-request-id"]) == ("one", "one")
            assert answer["checkpoint"].startswith(run_url)
            assert (answer["images_seen"], answer["ema"], answer["seed"]) == (64, "0.050", 7)
            request = Request(4, "edm_sde", 5, 7, options={"s_churn": 4.0})
            ((samples, labels),) = list(generate(load(run_url), request))
            wanted = to_uint8(samples)[:, 0].numpy().astype(int)
            got = np.stack([picture(item) for item in answer["data"]]).astype(int)
            assert np.abs(got - wanted).max() <= 1  # a CPU's sums differ with the batch in the last bit
            assert [item["class"] for item in answer["data"]] == labels.tolist() == [0, 1, 2, 0]

            sheet = await call.post(fields, Accept="image/png")
            assert sheet.headers["content-type"] == "image/png"
            assert Image.open(io.BytesIO(sheet.body)).width > 16
            assert sheet.headers["x-scoreray-checkpoint"] == answer["checkpoint"]
            arrays = np.load(io.BytesIO((await call.post(fields, Accept="application/x-npz")).body))
            assert np.array_equal(arrays["images"][..., 0], np.stack([picture(i) for i in answer["data"]]))
            exact = np.load(io.BytesIO((await call.post({**fields, "format": "npy"}, Accept="application/x-npz")).body))
            assert np.allclose(exact["samples"], samples.numpy(), atol=1e-4)
            other = await call.post({**fields, "ema": "none"})
            assert other.json["ema"] == "none"
            for spelling in (0.1, "0.1", ".1", "1e-1", "0.100"):
                assert (await call.post({"ema": spelling, "steps": 1})).json["ema"] == "0.100"
            assert (await call.post({"class_label": "class-2", "count": 2})).json["data"][1]["class"] == 2

    asyncio.run(main())


def test_a_request_says_which_size_it_draws(new_run: Callable[..., str], tmp_path: Path) -> None:
    url = new_run(str(tmp_path / "sizes"), other_shapes=((1, 6, 12),))

    async def main() -> None:
        async with serving(config(url)) as call:
            assert (await call("GET", "/v1/model")).json["sizes"] == ["8x8", "12x6"]
            fields = {"count": 2, "steps": 2, "seed": 5}
            for size, shape in {None: (8, 8), "8x8": (8, 8), "12x6": (6, 12)}.items():
                reply = await call.post(fields | ({} if size is None else {"size": size}))
                model = load(url)
                model.info = model.info.at_size(size)
                ((samples, _),) = list(generate(model, Request(2, steps=2, seed=5, size=size)))
                wanted = to_uint8(samples)[:, 0].numpy().astype(int)
                got = np.stack([picture(item) for item in reply.json["data"]]).astype(int)
                assert got.shape[1:] == shape
                assert np.abs(got - wanted).max() <= 1
            refused = await call.post({**fields, "size": "9x9"})
            assert (refused.status, refused.code, refused.json["field"]) == (422, "invalid", "size")
            assert "12x6, 8x8" in refused.json["message"]

    asyncio.run(main())


PLAIN = [name for name in SAMPLERS if name != "flow_map"]  # all that a denoiser is drawn by
FITTED: list[dict[str, Any]] = [
    {}, *({"grid": grid} for grid in ("karras", "geometric", "linear", "process")),
    {"sampler": "heun", "grid": "process", "steps": 4}, {"sampler": "ncsnv2", "grid": "karras", "steps": 3},
    {"sampler": "langevin", "options": {"warm_start": False}},
    *({"sampler": name} | ({"options": {"num_steps": 3}} if name == "ncsn" else {}) for name in PLAIN),
]  # fmt: skip


def test_a_request_is_fitted_to_its_model_as_the_command_line_does(points_url: str, tmp_path: Path) -> None:
    """The same words give the same samples: sampler, levels, grid and options that are left out are the same ones."""

    model = load(points_url, device="cpu")

    def by_command(number: int, fields: dict[str, Any]) -> np.ndarray:
        words = [f"--{name}={value}" for name, value in fields.items() if name != "options"]
        words += [f"--option={name}={str(value).lower()}" for name, value in fields.get("options", {}).items()]
        out = str(tmp_path / f"{number}.npz")
        cli.app(["sample", points_url, "--out", out, "--count=6", "--seed=3", *words], standalone_mode=False)
        return np.load(out)["images"]

    async def main() -> None:
        async with serving(config(points_url)) as call:
            for number, fields in enumerate(FITTED):
                reply = await call.post({"count": 6, "seed": 3, **fields}, Accept="application/x-npz")
                served = np.load(io.BytesIO(reply.body))["samples"]
                ((offline, _),) = generate(model, Request(6, seed=3, **fields))
                assert np.allclose(served, offline, rtol=1e-3, atol=1e-4), fields
                if not fields:
                    about = (await call("GET", "/v1/model")).json["models"][0]
                    assert about["defaults"] == {"sampler": "heun", "steps": 18, "grid": "karras", "calls": 35}
                    assert about["samplers"]["langevin"]["warm_start"]["default"] is True
                if number in (0, 5, 6, 7):
                    assert np.allclose(offline, by_command(number, fields), rtol=1e-3, atol=1e-4), fields
                sent = {name: str(value) for name, value in fields.items() if name != "options"}
                assert sent == {name: reply.headers[f"x-scoreray-{name}"] for name in sent}

    asyncio.run(main())


def test_samplers_that_stay_at_a_level_begin_near_the_data(points_url: str) -> None:
    """From noise at the largest level a chain at the smallest one stays noise: of std 80 instead of the data's."""
    model = load(points_url, "none", "cpu")
    for sampler in ("langevin", "sgld", "baoab", "cld"):
        chain, cold = (
            next(iter(generate(model, Request(64, sampler, options=options))))[0]
            for options in ({}, {"warm_start": False})
        )
        (heun, _) = next(iter(generate(model, Request(64, "heun"))))
        assert chain.std() == pytest.approx(heun.std().item(), rel=0.1)
        assert cold.std() > 4 * heun.std()
        with pytest.raises(UserError, match="give 2 steps or more"):
            Request(1, sampler, 1).fitted(model.info)


@pytest.mark.parametrize("kind", ["pictures", "points", "points of a width that fills no vectors"])
def test_without_bf16_and_compiler_a_request_has_the_same_bits_alone_and_among_others(
    kind: str, run_url: str, points_url: str, new_run: Callable[..., str], tmp_path: Path
) -> None:
    """What docs/serving.md promises of --precision fp32 --compile off, to the last bit of float32."""
    url = {"pictures": run_url, "points": points_url}.get(kind)
    url = url or new_run(str(tmp_path / "odd"), shape=(50,), classes=0, hidden_size=37)
    bodies = [{"count": 1 + i % 3, "steps": 5 + i, "seed": i, "format": "npy"} for i in range(8)]
    for request in bodies[:2]:
        request["sampler"] = "edm_sde"
    if kind == "pictures":
        bodies[3]["guidance"] = 2.0
    others = [{"count": 7, "steps": 4 + i, "seed": 100 + i, "sampler": "euler"} for i in range(6)]

    async def main() -> None:
        async with serving(config(url)) as call:
            alone = [(await call.post(request)).json["data"] for request in bodies]
            rows = []
            replica = call.replica
            observe = replica._observe
            replica._models[next(iter(replica._models))].batcher._observe = lambda n, s: (rows.append(n), observe(n, s))
            replies = await asyncio.gather(*(call.post(request) for request in [*others, *bodies]))
            among = [reply.json["data"] for reply in replies[len(others) :]]
            assert max(rows) > 20, "nobody shared a call"
            assert [a == b for a, b in zip(alone, among, strict=True)] == [True] * 8

    asyncio.run(main())


def test_points_are_numbers_not_pictures(points_url: str) -> None:
    async def main() -> None:
        async with serving(config(points_url)) as call:
            answer = (await call.post({"count": 3})).json
            assert answer["format"] == "npy"
            assert np.load(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).shape == (2,)
            assert (await call.post({}, Accept="image/png")).status == 422
            assert (await call.post({"guidance": 2.0})).json["field"] == "guidance"

    asyncio.run(main())


CONDITIONS = {
    "caption": ConditionSpec("text", (12,)),
    "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (50.0, 8.0), (10.0, 4.0))),
    "coarse": ConditionSpec("concat", (1, 4, 4), normaliser=Normaliser("range", (280.0,), (20.0,))),
    "label": ConditionSpec("class", classes=("dry", "wet")),
}


@pytest.fixture(scope="module")
def weather_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fields of temperature, float32 [1, 8, 8] in kelvins, given a text, a place, a coarser field and a class."""
    target = TargetField("t2m", "array", "float32", Normaliser("channel", (280.0,), (20.0,)))
    folder, classes = tmp_path_factory.mktemp("runs") / "weather", ["dry", "wet"]
    return new_run(str(folder), target=target, conditions=CONDITIONS, classes=classes)


def npy(array: np.ndarray) -> dict[str, str]:
    file = io.BytesIO()
    np.save(file, array)
    return {"npy": base64.b64encode(file.getvalue()).decode()}


def test_conditions_over_http_give_what_the_sampler_gives_in_the_datas_units(weather_url: str) -> None:
    """Text, vector, grid and class in each spelling, alone and among others: to the last bit of float32."""
    coarse = np.linspace(270, 290, 16, dtype=np.float32).reshape(1, 4, 4)
    given = {"caption": "küste", "place": [48.5, 2.5], "coarse": npy(coarse), "label": "wet"}
    listed = {"caption": "küste", "place": npy(np.array([48.5, 2.5])), "coarse": coarse[0].tolist(), "label": 1}
    fields = {"count": 3, "steps": 4, "seed": 5, "guidance": {"coarse": 2.0, "caption": 1.5}}
    others = [{"steps": 3 + i, "condition": one} for i, one in enumerate([{}, {"caption": "a"}, {"place": [1, 2]}])]

    async def main() -> None:
        async with serving(config(weather_url)) as call:
            first = await call.post({**fields, "condition": given})
            assert first.status == 200, first.body
            assert first.json["conditions"] == sorted(CONDITIONS)
            assert [item["class"] for item in first.json["data"]] == [1, 1, 1]
            replies = await asyncio.gather(*map(call.post, [*others, {**fields, "condition": listed}]))
            assert {reply.status for reply in replies} == {200}
            assert replies[-1].json["data"] == first.json["data"]

            denoiser = in_same_rows(load(weather_url, device="cpu"), 32)
            request = make_request(parse(json.dumps({**fields, "condition": given}).encode()),
                                   call.service.models["small"], Limits(), "application/json", 5)  # fmt: skip
            x = request.sigmas[0] * SampleNoise(request.seeds).normal((3, 1, 8, 8), torch.float32)
            guided = ClassifierFree(denoiser, 1.0, fields["guidance"])
            alone = sample(guided, x, request.sigmas, generator=request.seeds, condition=request.condition)
            values = [np.load(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in first.json["data"]]
            assert np.array_equal(np.stack(values), (20 * alone + 280).numpy())

            arrays = await call.post({**fields, "condition": given}, Accept="application/x-npz")
            assert np.array_equal(np.load(io.BytesIO(arrays.body))["samples"], np.stack(values))
            assert json.loads(arrays.headers["x-scoreray-guidance"]) == fields["guidance"]
            sheet = await call.post({**fields, "condition": given}, Accept="image/png")
            assert np.asarray(Image.open(io.BytesIO(sheet.body))).shape[2] == 3
            pictures = await call.post({**fields, "condition": given, "format": "png"})
            shown = np.stack([picture(item) for item in pictures.json["data"]])
            assert np.array_equal(shown, field_pictures(np.stack(values)).transpose(0, 2, 3, 1))
            events = await call.post({**fields, "condition": given, "stream": True})
            assert b"event: preview\ndata: {" in events.body
            assert b'"b64_json"' in events.body

            plain = (await call.post({"count": 2, "steps": 3, "seed": 1})).json
            assert [item["class"] for item in plain["data"]] == [0, 1]
            null = {"label": None, "caption": None}
            nothing = (await call.post({"count": 2, "steps": 3, "seed": 1, "condition": null})).json
            assert nothing["data"][0]["class"] is None
            metrics = (await call("GET", "/metrics")).body.decode()
            assert 'scoreray_condition_rows_total{condition="coarse"}' in metrics

    asyncio.run(main())


def test_the_model_page_says_what_it_draws_and_takes(weather_url: str, run_url: str, points_url: str) -> None:
    async def page(url: str) -> dict[str, Any]:
        async with serving(config(url)) as call:
            return (await call("GET", "/v1/model")).json

    weather, pictures, points = (asyncio.run(page(url)) for url in (weather_url, run_url, points_url))
    never = {"dropout": 0.0}  # on its own, in training
    field = {"name": "t2m", "kind": "array", "dtype": "float32", "units": "those of the data"}
    assert weather["target"] == {**field, "shape": [1, 8, 8], "png": True}
    assert weather["pictures"] is False
    assert weather["conditions"] == {
        "caption": {"kind": "text", "shape": [12], "takes": "a text of up to 12 bytes", "max_length": 12, **never},
        "place": {
            "kind": "vector",
            "shape": [2],
            "takes": "2 numbers",
            "low": [25.0, -2.0],
            "high": [75.0, 18.0],
            **never,
        },
        "coarse": {
            "kind": "concat",
            "shape": [1, 4, 4],
            "takes": described(ConditionSpec("concat", (1, 4, 4))),
            **never,
        },
        "label": {"kind": "class", "shape": [], "takes": "one of 2 classes", "classes": ["dry", "wet"], **never},
    }
    image = {"name": "image", "kind": "image", "dtype": "uint8", "units": "0 to 255"}
    assert pictures["target"] == {**image, "shape": [1, 8, 8], "png": True}
    assert list(pictures["conditions"]) == ["label"]
    assert (points["target"]["png"], points["conditions"]) == (False, {})


def test_a_condition_is_limited_and_a_key_covers_it(weather_url: str, run_url: str) -> None:
    limits = Limits(max_body_bytes=500, max_condition_bytes=1000)

    async def main() -> None:
        async with serving(config(weather_url, limits=limits)) as call:
            cases: list[tuple[Any, int, str, str | None]] = [
                ({"coarse": npy(np.zeros((1, 20, 14), np.float32))}, 413, "condition_too_large", "condition.coarse"),
                ({"coarse": npy(np.zeros((1, 30, 30), np.float32))}, 413, "body_too_large", None),
                ({"coarse": npy(np.zeros((2, 4, 4), np.float32))}, 422, "invalid", "condition.coarse"),
                ({"coarse": npy(np.full((1, 4, 4), np.inf, np.float32))}, 422, "invalid", "condition.coarse"),
                ({"caption": "a text too long"}, 422, "invalid", "condition.caption"),
                ({"tokens": [1]}, 422, "invalid", "condition.tokens"),
            ]
            for condition, status, code, field in cases:
                reply = await call.post({"condition": condition})
                assert (reply.status, reply.code, reply.json.get("field")) == (status, code, field)
            nan = await call.post(b'{"condition": {"place": [NaN, 1]}}')
            assert (nan.status, nan.code) == (400, "bad_json")

            first = await call.post({"condition": {"caption": "a"}}, Idempotency_Key="k")
            again = await call.post({"condition": {"caption": "a"}}, Idempotency_Key="k")
            assert again.headers["idempotent-replayed"] == "true"
            assert again.json["data"] == first.json["data"]
            other = await call.post({"condition": {"caption": "b"}}, Idempotency_Key="k")
            assert (other.status, other.code) == (422, "key_reused")
        async with serving(config(run_url, limits=limits)) as call:
            reply = await call.post(b'{"count": 1}' + b" " * 500)
            assert reply.code == "body_too_large", "a model of classes alone takes no larger bodies"

    asyncio.run(main())


def test_every_mistake_has_its_code(run_url: str) -> None:
    limits = Limits(max_body_bytes=2000, max_count=8, max_steps=50, max_calls=200)

    async def main() -> None:
        async with serving(config(run_url, limits=limits, hosts=("localhost",))) as call:
            cases: list[tuple[Any, dict[str, str], int, str, str]] = [
                (b"{", {}, 400, "bad_json", "JSON"),
                (b"\xff\xfe", {}, 400, "bad_json", "UTF-8"),
                (b"[" * 1990, {}, 400, "bad_json", ""),
                (b'{"guidance": NaN}', {}, 400, "bad_json", "NaN"),
                (b'{"count": ' + b"9" * 100 + b"}", {}, 400, "bad_json", "digits"),
                (b'{"guidance": 1e999}', {}, 400, "bad_json", "too large"),
                (b"[]", {}, 422, "invalid", "object"),
                (b'{"count": 1, "count": 2}', {}, 400, "bad_json", "'count' stands twice"),
                (b'{"options": {"eta": 1, "eta": 1}}', {}, 400, "bad_json", "'eta' stands twice"),
                ({"count": 0}, {}, 422, "invalid", "count = 0: must be a whole number, 1 or more"),
                ({"class_label": 1.5}, {}, 422, "invalid", "a whole number or a string of at most 256 characters"),
                ({"seed": 2**31}, {}, 422, "invalid", "from 0 to 2,147,483,647"),
                ({"guidance": 101}, {}, 422, "invalid", "guidance = 101: must be a number from -100 to 100"),
                ({"previews": 33}, {}, 422, "invalid", "from 1 to 32"),
                ({"format": "jpg"}, {}, 422, "invalid", 'must be "png" or "jpeg" or "webp" or "npy"'),
                ({"stream": 1}, {}, 422, "invalid", "stream = 1: must be true or false"),
                ({"idempotency_key": "a b"}, {}, 422, "invalid", "printable ASCII characters, no spaces"),
                ({"options": {"eta": [1]}}, {}, 422, "invalid", "options = "),
                ({"options": {f"o{i}": 1 for i in range(17)}}, {}, 422, "invalid", "at most 16 values"),
                ({"cuont": 1}, {}, 422, "invalid", "did you mean 'count'"),
                ({"count": "3"}, {}, 422, "invalid", "count"),
                ({"count": True}, {}, 422, "invalid", "count"),
                ({"count": 9}, {}, 422, "too_many", "at most 8"),
                ({"steps": 51}, {}, 422, "too_many", "at most 50"),
                ({"sampler": "ncsn"}, {}, 422, "too_many", "200 calls"),
                ({"sampler": "ncsn", "steps": 51}, {}, 422, "too_many", "steps = 51: at most 50"),
                ({"sampler": "huen"}, {}, 422, "invalid", "did you mean 'heun'"),
                ({"sampler": "gibbs"}, {}, 422, "invalid", "is for RBMs"),
                ({"grid": "karas"}, {}, 422, "invalid", "did you mean 'karras'"),
                ({"grid": 3}, {}, 422, "invalid", "grid = 3: must be a string"),
                ({"ema": 0.9}, {}, 422, "invalid", "EMA length '0.9' ('0.900')"),
                ({"options": {"s_churm": 1}}, {}, 422, "invalid", "s_churm"),
                ({"sampler": "ddim", "options": {"eta": 7}}, {}, 422, "invalid", "eta = 7"),
                ({"class_label": "dog"}, {}, 422, "invalid", "unknown"),
                ({"class_label": "²"}, {}, 422, "invalid", "unknown"),
                ({"class_label": "--5"}, {}, 422, "invalid", "unknown"),
                ({"class_label": "dog\ud800"}, {}, 422, "invalid", "class_label"),
                ({"class_label": 3}, {}, 422, "invalid", "class '3'"),
                ({"ema": "0.9"}, {}, 422, "invalid", "0.050"),
                ({"model": "other"}, {}, 404, "no_model", "small"),
                ({"sampler": "langevin", "options": {"step_size": 1e30}}, {}, 422, "not_finite", "finite"),
                ({"idempotency_key": "a"}, {"Idempotency-Key": "b"}, 400, "bad_header", "differ"),
                ({}, {"Idempotency-Key": "a b"}, 400, "bad_header", "printable"),
                ({}, {"Content-Type": "text/plain"}, 415, "not_json", "Content-Type"),
                ({}, {"Content-Length": "x"}, 400, "bad_header", "Content-Length"),
                ({}, {"Host": "evil.example"}, 400, "bad_header", "Host"),
                (b" " * 3000, {}, 413, "body_too_large", "2000"),
                ({}, {"Content-Length": "99999"}, 413, "body_too_large", "2000"),
            ]
            for body, headers, status, code, words in cases:
                reply = await call.post(body, **{name.replace("-", "_"): value for name, value in headers.items()})
                assert (reply.status, reply.code) == (status, code), (body, reply.json)
                assert words in reply.json["message"], (body, reply.json)
                for ours in ("constrained", "pattern", "valid ", "Input", "Union"):
                    assert ours not in reply.json["message"], (body, reply.json)
                assert ERRORS[code][0] == status
                assert reply.json["request_id"] == reply.headers["x-request-id"]
            for method, path, status, code in (
                ("GET", "/v1/nothing", 404, "no_path"),
                ("GET", "/v1/samples", 405, "bad_method"),
                ("PUT", "/v1/samples", 405, "bad_method"),
                ("POST", "/v1/samples/", 404, "no_path"),
            ):
                reply = await call(method, path)
                assert (reply.status, reply.code) == (status, code)

    asyncio.run(main())


def test_tokens(run_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# who may ask\nana:{SECRET}\nben:sha256:{hashlib.sha256(b'another-secret-word').hexdigest()}\n")
    tokens = read_tokens(file)
    assert SECRET not in repr(tokens)
    monkeypatch.setenv("SCORERAY_TOKENS", f"eve:{SECRET}x,fay:{SECRET}y")
    assert [name for name, _ in read_tokens(None)] == ["eve", "fay"]
    for bad in ("short:abc", "no-colon-here-at-all", "x:sha256:12", f"a:{SECRET}\na:{SECRET}z", ""):
        file.write_text(bad)
        with pytest.raises(UserError) as error:
            read_tokens(file)
        assert "abc" not in str(error.value)
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1")] == [True] * 3 + [
        False
    ] * 2

    async def main() -> None:
        async with serving(config(run_url, tokens=tokens)) as call:
            for header in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {SECRET}"}):
                reply = await call("POST", "/v1/samples", b"{}", {**JSON, **header})
                assert (reply.status, reply.code) == (401, "no_token")
                assert reply.headers["www-authenticate"].startswith("Bearer")
            assert (await call("GET", "/metrics")).status == (await call("GET", "/v1/model")).status == 401
            for method in ("GET", "HEAD"):
                assert [(await call(method, p)).status for p in ("/", "/docs", "/healthz", "/readyz")] == [200] * 4
            assert (await call("GET", "/openapi.json")).status == 200
            assert "Authorization: Bearer TOKEN" in (await call("GET", "/docs")).body.decode()
            assert (await call.post({}, Authorization=f"Bearer {SECRET}")).status == 200
            assert (await call.post({}, Authorization="bearer another-secret-word")).status == 200
            page = await call("GET", "/metrics", headers={"Authorization": f"Bearer {SECRET}"})
            assert 'scoreray_billed_rows_total{token="ana"} 1.0' in page.body.decode()

    caplog.set_level("DEBUG")
    asyncio.run(main())
    assert " ana " in caplog.text
    assert SECRET not in caplog.text
    assert hash_of(SECRET) not in caplog.text


def test_a_key_is_drawn_once_and_billed_once(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url, limits=Limits(remember_bytes=8_000))) as call:
            twins = await asyncio.gather(*[call.post({"count": 3}, Idempotency_Key="k") for _ in range(5)])
            again = await call.post({"count": 3}, Idempotency_Key="k")
            assert {reply.json["data"][0]["b64_json"] for reply in [*twins, again]} == {
                again.json["data"][0]["b64_json"]
            }
            assert len({reply.json["id"] for reply in [*twins, again]}) == 6
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_samples_total") == metric(page, "scoreray_billed_rows_total") == 3
            assert metric(page, "scoreray_replayed_total") == 5
            assert sum("idempotent-replayed" in reply.headers for reply in twins) == 4
            assert again.headers["idempotent-replayed"] == "true"
            stream = await call.post({"count": 3, "stream": True}, Idempotency_Key="k")
            assert stream.headers["idempotent-replayed"] == "true"
            refused = await call.post({"count": 4}, Idempotency_Key="k")
            assert (refused.status, refused.code) == (422, "key_reused")
            other = await call.post({"count": 3}, Idempotency_Key="k", Accept="image/png")
            assert (other.status, other.code) == (422, "key_reused")
            assert "another Accept" in other.json["message"]

            for i in range(4):  # answers that push the first one out of memory
                await call.post({"count": 3}, Idempotency_Key=f"other-{i}")
            third = await call.post({"count": 3}, Idempotency_Key="k")
            assert "idempotent-replayed" not in third.headers
            assert third.json["data"] == again.json["data"]
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_samples_total") == 18  # drawn again, the same
            assert metric(page, "scoreray_billed_rows_total") == 15  # and not billed again

    asyncio.run(main())


def test_a_client_that_goes_and_comes_back_at_once_is_answered(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            body, options = SampleBody(count=2, steps=3), {"token": "t", "key": "k", "media": "application/json"}
            first = await call.service.submit(body, **options)
            call.service.leave(first)
            second = await call.service.submit(body, **options)
            assert second is not first
            assert (await second.answer()).about["count"] == 2
            third = await call.service.submit(body, **options)
            assert (await third.answer()).body == (await second.answer()).body
            assert third.replayed
            assert second.request.origin == first.request.origin

    asyncio.run(main())


def test_a_client_that_hangs_up_while_it_sends_is_no_bug(run_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"50"), (b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "POST", "path": "/v1/samples", "raw_path": b"/v1/samples", "root_path": "",
                 "headers": headers, "query_string": b"", "scheme": "http", "server": ("127.0.0.1", 80)}  # fmt: skip
        messages = iter([{"type": "http.request", "body": b'{"co', "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> dict[str, Any]:
            return next(messages)

        async def send(message: dict[str, Any]) -> None:
            pass

        async with serving(config(run_url)) as call:
            await make_app(call.service)(scope, receive, send)
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_requests_total") == metric(page, "scoreray_cancels_total") == 1

    asyncio.run(main())
    assert "Traceback" not in caplog.text


def test_a_client_that_goes_frees_its_rows(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            slow = json.dumps({"count": 64, "steps": 900}).encode()
            for body in (slow, slow[:-1] + b', "stream": true}'):
                gone = asyncio.create_task(call("POST", "/v1/samples", body, JSON, leave_after=0.3))
                await asyncio.sleep(0.2)
                assert call.replica.waiting_rows() == 64
                with contextlib.suppress(Exception):
                    await gone
                for _ in range(50):
                    await asyncio.sleep(0.02)
                    if call.replica.waiting_rows() == 0:
                        break
                assert call.replica.waiting_rows() == call.service.under_way() == 0
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_cancelled_rows_total") == 128
            assert 'scoreray_requests_total{code="cancelled"} 2.0' in page
            assert metric(page, "scoreray_requests_total") == metric(page, "scoreray_cancels_total") == 2
            assert metric(page, "scoreray_billed_rows_total") == 0
            assert (await call.post({"steps": 3})).status == 200

    asyncio.run(main())


def test_a_stream_whose_client_took_nothing_is_cancelled_and_frees_its_rows(run_url: str) -> None:
    """Gone between the request and the first event: the generator of events never began."""

    async def main() -> None:
        async with serving(config(run_url)) as call:
            body = json.dumps({"count": 64, "steps": 900, "stream": True}).encode()
            with contextlib.suppress(Exception):
                await call("POST", "/v1/samples", body, JSON, send_fails=True)
            while call.replica.waiting_rows() or call.service.under_way():
                await asyncio.sleep(0.01)
            page = (await call("GET", "/metrics")).body.decode()
            assert 'scoreray_requests_total{code="cancelled"} 1.0' in page
            assert metric(page, "scoreray_requests_total") == 1

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_stream_is_counted_by_how_it_ended(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url, limits=Limits(max_calls=20))) as call:
            assert b"event: done" in (await call.post({"stream": True, "steps": 4})).body
            assert (await call.post({"stream": True, "steps": 900})).status == 422
            page = (await call("GET", "/metrics")).body.decode()
            assert 'scoreray_requests_total{code="ok"} 1.0' in page
            assert 'scoreray_requests_total{code="too_many"} 1.0' in page

    asyncio.run(main())


def test_head_works_where_get_does(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            for path in ("/", "/docs", "/openapi.json", "/v1/model", "/metrics", "/healthz", "/readyz"):
                head, whole = await call("HEAD", path), await call("GET", path)
                assert head.status == whole.status == 200
                assert head.headers["content-type"] == whole.headers["content-type"]
                if path != "/metrics":
                    assert head.headers["content-length"] == whole.headers["content-length"]
            assert [(await call("HEAD", path)).status for path in ("/v1/samples", "/nothing")] == [405, 404]
            call.service.ready = False
            reply = await call("GET", "/readyz")
            assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "starting", "1")
            call.service.draining = call.service.ready = True
            assert (await call("GET", "/readyz")).code == "draining"

    asyncio.run(main())


def test_a_stream_shows_estimates_and_ends_in_the_answer(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            reply = await call.post({"count": 4, "steps": 10, "seed": 3, "stream": True, "previews": 3})
            blocks = [block.split("\n") for block in reply.body.decode().strip().split("\n\n")]
            events = [(b[0].removeprefix("event: "), json.loads(b[1].removeprefix("data: "))) for b in blocks]
            assert [name for name, _ in events] == ["start", "preview", "preview", "preview", "done"]
            progress = [data["progress"] for name, data in events if name == "preview"]
            assert progress == sorted(progress)
            assert picture(events[1][1]).ndim == 3
            plain = await call.post({"count": 4, "steps": 10, "seed": 3})
            assert events[-1][1]["data"] == plain.json["data"]
            refused = await call.post({"stream": True, "sampler": "langevin", "options": {"step_size": 1e30}})
            assert "event: error" in refused.body.decode()
            assert (await call.post({"stream": True, "count": 0})).status == 422

    asyncio.run(main())


def test_a_replica_that_dies_is_replaced_by_another_with_the_same_answer(run_url: str) -> None:
    class Dying(LocalBackend):
        """The first draws break off at their second event, or before the first."""

        deaths = 3

        async def draw(self, request: SampleRequest) -> AsyncIterator[Event]:
            events = 0
            async for event in self.replica.draw(request):
                if self.deaths and events == self.deaths % 2:
                    self.deaths -= 1
                    raise Lost("killed")
                events += 1
                yield event

    async def main() -> None:
        async with serving(config(run_url), Dying) as call:
            body = {"count": 3, "seed": 1, "steps": 6}
            first = await call.post(body, Idempotency_Key="k")
            assert first.status == 200
            assert first.json["data"] == (await call.post(body)).json["data"]
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_retries_total") == 3
            assert metric(page, "scoreray_billed_rows_total") == 6

    asyncio.run(main())


def test_a_token_has_a_limit_of_requests_under_way(run_url: str) -> None:
    limits = Limits(token_requests=2, token_rows=8)

    async def main() -> None:
        async with serving(config(run_url, limits=limits)) as call:
            for under_way in ([8], [1, 1]):  # rows of each request
                stack = contextlib.ExitStack()
                for rows in under_way:
                    stack.enter_context(call.service.access.under_way(NOBODY, rows))
                reply = await call.post({"steps": 2})
                assert (reply.status, reply.code) == (429, "token_busy")
                assert int(reply.headers["retry-after"]) >= 1
                stack.close()
                assert (await call.post({"steps": 2})).status == 200
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_sheds_total") == 2

    asyncio.run(main())


def test_what_would_wait_too_long_is_shed_by_the_rows_before_it(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url, limits=Limits(max_waiting_rows=40))) as call:
            first = asyncio.create_task(call.post({"count": 30, "steps": 100}))
            while call.replica.waiting_rows() < 30:
                await asyncio.sleep(0)
            reply = await call.post({"count": 30, "steps": 2})
            assert (reply.status, reply.code) == (503, "overloaded")
            assert int(reply.headers["retry-after"]) >= 1
            assert (await first).status == 200
            assert (await call.post({"count": 30, "steps": 2})).status == 200
            page = (await call("GET", "/metrics")).body.decode()
            assert metric(page, "scoreray_sheds_total") == 1

    asyncio.run(main())


def test_what_takes_longer_than_a_request_may_is_cut_off(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url, limits=Limits(max_request_s=0.05))) as call:
            reply = await call.post({"count": 30, "steps": 500})
            assert (reply.status, reply.code) == (503, "timed_out")
            assert int(reply.headers["retry-after"]) >= 1
            assert call.service.under_way() == 0

    asyncio.run(main())


def test_a_newer_checkpoint_is_taken_without_a_failed_request(
    new_run: Callable[..., str], tmp_path: Any, run_url: str
) -> None:
    url = new_run(str(tmp_path / "growing"), 64)

    async def main() -> None:
        settings = replace(config(url, reload_s=0.05, max_models=2), models=(("growing", url), ("still", run_url)))
        async with serving(settings) as call:
            seen: list[int] = []

            async def post_until_all_are_seen() -> None:
                while len(set(seen)) < 3:
                    reply = await call.post({"steps": 4})
                    assert reply.status == 200, reply.body
                    seen.append(reply.json["images_seen"])

            tasks = [asyncio.create_task(post_until_all_are_seen()) for _ in range(3)]
            for images in (128, 192):
                while not seen or seen[-1] != images - 64:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(new_run, url, images, seed=images)
            await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
            assert sorted(set(seen)) == [64, 128, 192]
            model = (await call("GET", "/v1/model")).json
            assert model["images_seen"] == 192
            assert [page["name"] for page in model["models"]] == ["growing", "still"]
            assert (await call.post({"model": "still"})).json["images_seen"] == 64
            assert metric((await call("GET", "/metrics")).body.decode(), "scoreray_models_loaded") <= 2

    asyncio.run(main())


def test_a_store_that_fails_or_hangs_stops_nothing(
    new_run: Callable[..., str], tmp_path: Any, monkeypatch: Any
) -> None:
    """The run is deleted under the service, the store raises what nobody expects and then hangs: what is in memory is
    drawn all the same, while one poll hangs no other begins, and a checkpoint committed later is taken."""
    url = new_run(str(tmp_path / "vanishing"), 64)
    release, polls = threading.Event(), []

    async def main() -> None:
        async with serving(config(url, reload_s=0.05)) as call:
            shutil.rmtree(url)
            await asyncio.sleep(0.2)
            gone = await call.post({"ema": "none"})
            assert (gone.status, gone.code) == (503, "storage")

            def broken(served: ServedModel) -> bool:
                polls.append(served)
                release.wait()
                raise OSError("nobody expects this")

            with monkeypatch.context() as patch:
                patch.setattr(ServedModel, "newer", broken)
                while not polls:
                    await asyncio.sleep(0.01)
                waiting = [asyncio.create_task(call.post({"ema": "none"})) for _ in range(40)]
                await asyncio.sleep(0.1)
                assert (await asyncio.wait_for(call.post({"steps": 2}), PATIENCE_S)).status == 200
                assert len(polls) == 1
                release.set()
                assert {reply.code for reply in await asyncio.gather(*waiting)} == {"storage"}
            await asyncio.to_thread(new_run, url, 128, seed=1)
            while (await call.post({"ema": "none", "steps": 2})).status != 200:
                await asyncio.sleep(0.05)
            assert (await call.post({"steps": 2})).json["images_seen"] == 128

    try:
        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    finally:
        release.set()


def test_draining_answers_what_is_under_way_and_takes_nothing_more(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            under_way = [asyncio.create_task(call.post({"count": 8, "steps": 60})) for _ in range(4)]
            while call.service.under_way() < 4:
                assert not any(task.done() for task in under_way), "one was drawn before all had come"
                await asyncio.sleep(0.005)
            left = asyncio.create_task(call.service.drain(100))
            await asyncio.sleep(0)
            refused = await call.post({})
            assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "draining", "5")
            assert (await call("GET", "/readyz")).status == 503
            assert (await call("GET", "/healthz")).status == 200
            assert await left == 0
            assert [task.result().status for task in under_way] == [200] * 4

    asyncio.run(main())


def test_what_a_drain_cuts_off_is_refused_as_draining(run_url: str) -> None:
    """Each is answered before the drain ends: alone, with a key that two share, in a stream."""

    async def main() -> None:
        async with serving(config(run_url)) as call:
            slow = {"count": 64, "steps": 1000}
            posts = [call.post(slow), call.post({**slow, "stream": True})]
            posts += [call.post(slow, Idempotency_Key="k") for _ in range(2)]
            under_way = [asyncio.create_task(one) for one in posts]
            while call.service.under_way() < 3 or len(call.service.answering) < 4:
                await asyncio.sleep(0.005)
            assert await call.service.drain(0.2) == 3
            assert all(task.done() for task in under_way)
            alone, stream, *shared = [task.result() for task in under_way]
            for reply in (alone, *shared):
                assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "draining", "5")
            assert b"event: error" in stream.body
            assert b'"draining"' in stream.body
            while call.replica.waiting_rows():
                await asyncio.sleep(0.01)
            assert 'scoreray_sheds_total{code="draining"} 4.0' in (await call("GET", "/metrics")).body.decode()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_pages_need_nothing_from_elsewhere_and_metrics_are_those_of_the_list(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            for path in ("/", "/docs"):
                page = await call("GET", path)
                assert page.headers["content-type"].startswith("text/html")
                assert b"http://" not in page.body.replace(b"http://www.w3.org", b"").replace(b"http://localhost", b"")
                assert b"https://" not in page.body
                assert "default-src 'none'" in page.headers["content-security-policy"]
            docs = (await call("GET", "/docs", headers={"Host": "models.example:9000"})).body.decode()
            assert "curl -s http://models.example:9000/v1/samples" in docs
            assert "Bearer" not in docs
            assert "localhost" not in docs
            assert "from 0 to 2,147,483,647" in docs
            assert "default false" in docs
            assert "`" not in docs
            strange = (await call("GET", "/docs", headers={"Host": "x'; reboot '"})).body.decode()
            assert "http://HOST/v1/samples" in strange
            schema = (await call("GET", "/openapi.json")).json
            assert schema["info"]["description"].startswith("Draws samples")
            openais = {"/v1/images/generations", "/v1/models"}
            ours = {"/v1/samples", "/v1/cost", "/v1/model", "/metrics", "/healthz", "/readyz"}
            assert set(schema["paths"]) == ours | openais
            text = (await call("GET", "/metrics")).body.decode()
            assert all(f"# HELP {m.name}" in text for m in (*REPLICA_METRICS, *SERVICE_METRICS))

    asyncio.run(main())


def test_the_docs_name_every_field_limit_and_code() -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    words = set(re.findall(r"`([\w]+)(?:\{\w+\})?`", page))
    assert {*SampleBody.model_fields, *ImagesBody.model_fields} <= words
    assert set(vars(Limits())) <= words
    assert set(ERRORS) - {"bug"} <= words


def test_requests_of_one_and_two_calls_share_those_of_long_ones(run_url: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"sampler": "heun", "steps": 12, "guidance": 2},
        {"sampler": "consistency", "steps": 1},
        {"sampler": "consistency", "steps": 2, "stream": True},
        {"max_calls": 2, "class_label": 1},
    ]

    def samples(reply: Reply) -> Any:
        text = reply.body.decode()
        answer = json.loads(text.split("event: done\ndata: ")[1]) if text.startswith("event") else reply.json
        return answer["data"], answer["calls"]

    async def main() -> None:
        async with serving(config(run_url)) as call:
            (batcher,) = (model.batcher for model in call.replica._models.values())
            drawn = [call.post({**body, "count": 3, "seed": i}) for i, body in enumerate(bodies)]
            together = [samples(reply) for reply in await asyncio.gather(*drawn)]
            shared = batcher.calls
            alone = [samples(await call.post({**body, "count": 3, "seed": i})) for i, body in enumerate(bodies)]
            assert together == alone, "what is drawn depends on no other request, and costs the same"
            assert [calls for _, calls in alone] == [23, 1, 2, 2]
            assert shared < batcher.calls - shared, "calls are shared"

    asyncio.run(main())


def test_a_service_in_parallel_in_time_says_so_where_steps_shared_calls(run_url: str) -> None:
    body = {"count": 1, "sampler": "euler", "steps": 18, "seed": 3}

    async def drawn(parallel: bool) -> tuple[dict[str, Any], int]:
        async with serving(config(run_url, parallel=parallel)) as call:
            found = await call.post(body)
            (model,) = call.replica._models.values()
            return found.json, model.batcher.calls

    (plain, sequential), (found, calls) = (asyncio.run(drawn(parallel)) for parallel in (False, True))
    assert "parallel" not in plain
    assert (plain["calls"], sequential) == (18, 18)
    assert found["parallel"] is True
    assert calls < 18 < found["calls"] == found["rows"]


def test_an_answer_says_what_it_cost_as_it_was_said_before(run_url: str) -> None:
    async def go() -> None:
        async with serving(config(run_url)) as call:

            async def expected(body: dict[str, Any]) -> Any:
                reply = await call("POST", "/v1/cost", json.dumps(body).encode(), JSON)
                assert reply.status == 200, reply.json
                return reply.json

            for body, made in (
                ({"max_calls": 1}, {"sampler": "dpmpp_2m", "steps": 1, "grid": "interior", "calls": 1, "rows": 3}),
                ({"max_calls": 2, "guidance": 2}, {"sampler": "dpmpp_2m", "steps": 2, "calls": 2, "rows": 12}),
                ({"max_calls": 20, "sampler": "heun"}, {"steps": 10, "grid": "karras", "calls": 19, "rows": 57}),
                ({}, {"sampler": "heun", "steps": 18, "grid": "karras", "calls": 35, "rows": 105}),
            ):
                said = await expected({**body, "count": 3})
                assert made.items() <= said.items()
                assert said.pop("exact")
                streamed = await call.post({**body, "count": 3, "stream": True, "previews": 32})
                events = [block.split("\n") for block in streamed.body.decode().split("\n\n") if block]
                assert [lines[0] for lines in events[1:-1]] == ["event: preview"] * (len(events) - 2)
                assert said.items() <= json.loads(events[-1][1].removeprefix("data: ")).items()
                assert said.items() <= (await call.post({**body, "count": 3})).json.items()
            adaptive = await expected({"sampler": "rk45"})
            answer = (await call.post({"sampler": "rk45"})).json
            assert not adaptive["exact"]
            assert answer["calls"] == answer["rows"] > 20
            images = await call("POST", GENERATIONS, json.dumps({"prompt": "class-1", "max_calls": 2}).encode(), JSON)
            assert images.json["scoreray"]["calls"] == 2
            for body, field, words in (
                (
                    {"max_calls": 9, "sampler": "heun", "steps": 18},
                    "max_calls",
                    "takes 35 calls a sample; give at most 5",
                ),
                ({"max_calls": 9, "sampler": "rk45"}, "sampler", "chooses its steps as it goes"),
                ({"max_calls": 0}, "max_calls", "max_calls"),
            ):
                for path in ("/v1/cost", "/v1/samples"):
                    refused = await call("POST", path, json.dumps(body).encode(), JSON)
                    assert (refused.status, refused.code, refused.json["field"]) == (422, "invalid", field)
                    assert words in refused.json["message"]

    asyncio.run(go())


@pytest.mark.parametrize("sampler", sorted(set(PLAIN) - {"rk45"}))
def test_the_calls_that_a_request_is_charged_with_are_those_it_takes(sampler: str, run_url: str) -> None:
    from scoreray.sampling.service.models import look_up

    served = look_up("small", run_url)
    options = {"num_steps": 3} if sampler in ("ncsn", "ncsnv2") else {}
    for steps in (2, 7) if "warm_start" in options_of(SAMPLERS[sampler]) else (1, 2, 7):
        body = SampleBody(sampler=sampler, steps=steps, options=options)
        request = make_request(body, served, Limits(), "image/png", 0)
        assert request.expected_calls == num_calls(sampler, request.sigmas, **request.options)


def test_an_adaptive_sampler_is_thought_to_take_what_its_tolerance_wants(run_url: str) -> None:
    from scoreray.sampling.service.models import look_up

    served = look_up("small", run_url)

    def calls(limits: Limits = Limits(), **options: Any) -> int:  # noqa: B008
        body = SampleBody(sampler="rk45", options=options)
        return make_request(body, served, limits, "image/png", 0).expected_calls

    assert calls(rtol=1e-2, atol=1e-2) < 60 < calls() < 150 < calls(rtol=1e-6, atol=1e-6) < 250
    assert calls(rtol=1e-9, atol=1e-9) <= 1001
    assert calls(max_steps=1) < 10
    with pytest.raises(Refused, match="more than 20 calls"):
        calls(Limits(max_calls=20))


NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, "", "heun", "a" * 300, "\u0000",
    "\ud800", "💥", [], {}, [1], {"a": 1}, "NaN", "1", "none", "0.050", [[]], {"eta": 1.0}, {"num_steps": 10**9},
    {"rtol": 1e-300}, {"s_churn": 1e300}, {"step_size": 1e-300}, {"max_steps": 1},
]  # fmt: skip


def strange_body(random_: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A request for samples, by our own path or by OpenAI's, in which something or nothing is wrong."""
    is_ours = random_.random() < 0.7
    count = {"count": random_.randint(1, 2)} if is_ours else {"n": random_.randint(1, 2), "prompt": ""}
    fields: dict[str, Any] = {**count, "steps": random_.randint(1, 3)}
    names = [*(SampleBody if is_ours else ImagesBody).model_fields, "cuont", "", "__class__"]
    for _ in range(random_.randint(0, 3)):
        fields[random_.choice(names)] = random_.choice(NASTY)
    if random_.random() < 0.5:
        fields["sampler"] = random_.choice(list(SAMPLERS))
    body = json.dumps(fields).encode()
    if random_.random() < 0.2:
        at = random_.randrange(len(body))
        body = body[:at] + random_.randbytes(random_.randint(0, 3)) + body[at + random_.randint(0, 4) :]
    headers = {"Content-Type": "application/json"}
    if random_.random() < 0.1:
        name = random_.choice(["Content-Type", "Content-Length", "Idempotency-Key", "Accept", "X-Request-ID"])
        headers[name] = random_.choice(["", "0", "-1", "é", "x" * 400, "image/png;q=x", "application/json; charset=x"])
    return "/v1/samples" if is_ours else GENERATIONS, body, headers


@pytest.mark.parametrize("bodies", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_strange_bodies_get_one_clear_answer_each(bodies: int, plain_url: str) -> None:
    """No 500, no hang, nothing left behind; a refusal is JSON with a code of the list, or of OpenAI's form."""
    limits = Limits(
        max_count=2, max_steps=4, max_calls=16, max_request_s=PATIENCE_S, token_requests=1000, token_rows=10_000
    )

    async def main() -> None:
        async with serving(config(plain_url, limits=limits, max_batch=64)) as call:
            random_ = random.Random(6)
            statuses: dict[int, int] = {}
            drawn_by_openais = 0

            async def some() -> None:
                for _ in range(bodies // 50):
                    nonlocal drawn_by_openais
                    path, body, headers = strange_body(random_)
                    reply = await asyncio.wait_for(call("POST", path, body, headers), PATIENCE_S)
                    statuses[reply.status] = statuses.get(reply.status, 0) + 1
                    if path == GENERATIONS:
                        drawn_by_openais += reply.status == 200
                        assert reply.status in (200, 400, 404, 413, 415), (body, headers, reply.json)
                        if reply.status != 200:
                            assert set(reply.json["error"]) == {"message", "type", "param", "code"}
                    elif reply.status != 200:
                        assert ERRORS[reply.code][0] == reply.status != 500, (body, headers, reply.json)

            await asyncio.gather(*[some() for _ in range(50)])
            assert sum(statuses.values()) == bodies
            assert statuses[200] > bodies // 20, statuses
            assert drawn_by_openais > bodies // 100
            assert {200, 400, 422} <= set(statuses) <= {200, 400, 404, 413, 415, 422}, statuses
            assert call.replica.waiting_rows() == call.service.under_way() == 0

    asyncio.run(main())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_any_json_is_answered(points_url: str) -> None:
    limits = Limits(max_count=2, max_steps=4, max_calls=16)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        call = runner.run(stack.enter_async_context(serving(config(points_url, limits=limits))))

        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(st.dictionaries(st.sampled_from(list(SampleBody.model_fields)), values, max_size=4) | values)
        def send_one(body: Any) -> None:
            reply = runner.run(call("POST", "/v1/samples", json.dumps(body).encode(), JSON))
            assert reply.status in (200, 400, 404, 422), reply.body
            assert reply.status == 200 or ERRORS[reply.code][0] == reply.status

        send_one()
        runner.run(stack.aclose())


@pytest.mark.parametrize("wrong", [False, True], ids=["as the schema says", "against the schema"])
def test_the_published_schema_is_the_truth(points_url: str, wrong: bool) -> None:
    """What schemathesis makes of /openapi.json: nothing that fits it fails, nothing that does not is drawn."""
    import schemathesis

    limits = Limits(max_count=2, max_steps=4, max_calls=16)
    mode = schemathesis.GenerationMode.NEGATIVE if wrong else schemathesis.GenerationMode.POSITIVE
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        call = runner.run(stack.enter_async_context(serving(config(points_url, limits=limits))))
        operation = schemathesis.openapi.from_dict(call.app.openapi())["/v1/samples"]["POST"]

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(operation.as_strategy(generation_mode=mode))
        def send_one(case: Any) -> None:
            raw = case.body if isinstance(case.body, bytes) else json.dumps(case.body, default=str).encode()
            headers = {**JSON, **{name: str(value) for name, value in (case.headers or {}).items()}}
            reply = runner.run(call(case.method, case.formatted_path, raw, headers))
            expected = (400, 404, 413, 415, 422) if wrong else (200, 404, 422)
            two_keys = reply.status == 400 and "differ" in reply.json["message"]
            assert reply.status in expected or two_keys, (raw, headers, reply.body)
            assert reply.status == 200 or ERRORS[reply.code][0] == reply.status

        send_one()
        runner.run(stack.aclose())


def test_two_rows_with_guidance_and_the_models_range(run_url: str) -> None:
    async def main() -> None:
        async with serving(config(run_url)) as call:
            reply = await call.post({"count": 2, "guidance": 2.0, "class_label": 1, "steps": 3, "seed": 5})
            request = Request(2, steps=3, seed=5, class_label=1, guidance=2.0)
            ((samples, _),) = list(generate(load(run_url), request))
            wanted = to_uint8(samples)[:, 0].numpy().astype(int)
            got = np.stack([picture(item) for item in reply.json["data"]]).astype(int)
            assert np.abs(got - wanted).max() <= 1
            assert torch.isfinite(samples).all()

    asyncio.run(main())
