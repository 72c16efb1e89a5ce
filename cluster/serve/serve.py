"""`scoreray serve`: the sampling service on Ray Serve, from its first replica to the end of its last request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import wait_for_room
from scoreray.cluster.display import say
from scoreray.cluster.serve.handles import RayBackend, last_of, prepare_process
from scoreray.cluster.serve.log import relayed
from scoreray.data.errors import ScorerayError, UserError, nearest, shortened
from scoreray.data.scratch import SCRATCH
from scoreray.data.units import whole_number
from scoreray.data.yaml_text import parse_value
from scoreray.sampling.service.access import VARIABLE, is_loopback, read_tokens
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.sampling.service.idempotency import PASSWORD, kept, open_key_store
from scoreray.sampling.service.models import look_up
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import Event, SampleRequest
from scoreray.sampling.service.service import Service

APP = "scoreray"
REDIS = "SCORERAY_REDIS"  # environment variable: redis://HOST:PORT, where idempotency keys are stored on a cluster
MOST = 1e15  # of any limit
MOST_OF_PLACEMENT = 1e6  # CPUs, GPUs, seconds
MANY = 100_000  # requests that Ray Serve may hand on: what is too much is judged by rows, in the replica
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Placement:
    """Where a service runs: its listener, and how many replicas of which size.

    replicas: (min, max); more than min are started while more than `rows_per_replica` rows wait in each.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: tuple[int, int] = (1, 1)
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    rows_per_replica: int = 128
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        low, high = self.replicas
        if not 1 <= low <= high:
            raise UserError(f"replicas = {low},{high}: must be MIN,MAX with 1 <= MIN <= MAX")
        for name in ("cpus_per_replica", "gpus_per_replica", "drain_s"):
            if not 0 <= getattr(self, name) <= MOST_OF_PLACEMENT:
                raise UserError(f"{name} = {getattr(self, name)}: must be a number from 0 to {MOST_OF_PLACEMENT:g}")
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise UserError(
                f"gpus_per_replica = {self.gpus_per_replica}: Ray shares one GPU; above 1, give a whole number"
            )
        if not 0 <= self.port < 65536:
            raise UserError(f"port = {self.port}: must be in [0, 65535]; 0 takes a free one")


class Ended(ScorerayError):
    """Ctrl-C (or SIGTERM) where there was nothing to drain yet, or again while it drained."""

    exit_status = 130


class ModelReplica:
    """The Serve deployment that draws: a `Replica` in an actor of its own."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        prepare_process()
        self._replica = Replica(config)
        self._store = open_key_store(config.keys, config.limits) if config.keys else None
        for name, url in config.models:
            served = await asyncio.to_thread(look_up, name, url, config.ema)
            await self._replica.prepare(served.info.url, served.info.ema)

    async def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(kept(self._store, request, self._replica.draw(request))) as events:
            async for event in events:
                yield event

    async def draw_at_once(self, request: SampleRequest) -> Event:
        return await last_of(kept(self._store, request, self._replica.draw(request)))

    async def prepare(self, checkpoint: str, ema: str) -> str:
        """Loads; the reason where it could not."""
        try:
            await self._replica.prepare(checkpoint, ema)
        except ScorerayError as error:
            return str(error)
        return ""

    async def metrics(self) -> tuple[str, str]:
        from ray import serve

        return serve.get_replica_context().replica_tag, self._replica.metrics()

    async def pid(self) -> int:
        return os.getpid()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"waiting_rows": float(self._replica.waiting_rows())}

    def check_health(self) -> None:
        self._replica.check()


class Ingress:
    """The Serve deployment that answers HTTP: one, so that limits and counters are in one place."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, most_replicas: int, handle: Any, errors: str = ""
    ) -> None:
        prepare_process(errors)
        self._service = Service(config, RayBackend(handle), busy_tries=min(3, most_replicas))
        await self._service.start()

    def __serve_build_asgi_app__(self) -> Any:
        from scoreray.sampling.http.app import make_app

        return _one_request_id(make_app(self._service))

    async def drain(self, timeout_s: float) -> int:
        return await self._service.drain(timeout_s)

    async def under_way(self) -> int:
        return self._service.under_way()


def _one_request_id(app: Any) -> Any:
    """Serve's proxy puts X-Request-ID on every request and every answer: without this, answers would have it twice."""

    async def called(scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"x-request-id")

        async def send_once(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair != (b"x-request-id", given)]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_once)

    return called


def replicas_wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: as many replicas as the waiting rows fill, each with `target_ongoing_requests`."""
    rows = sum(context.aggregated_metrics.get("waiting_rows", {}).values()) if context.aggregated_metrics else 0.0
    wanted = math.ceil(rows / context.config.get_target_ongoing_requests())
    return max(context.capacity_adjusted_min_replicas, min(context.capacity_adjusted_max_replicas, wanted)), {}


def application(config: ServeConfig, placement: Placement, errors: str = "") -> Any:
    """The Serve application: an ingress, and replicas that draw.

    errors: a file that the ingress, through which every error goes, adds tracebacks to.
    """
    from ray import serve

    low, high = placement.replicas
    scaling: dict[str, Any] = {"num_replicas": low}
    if high > low:
        scaling = {
            "autoscaling_config": {
                "min_replicas": low,
                "max_replicas": high,
                "target_ongoing_requests": placement.rows_per_replica,
                "policy": {"policy_function": "scoreray.cluster.serve.serve:replicas_wanted"},
                "metrics_interval_s": 1.0,
                "look_back_period_s": 5.0,
                "upscale_delay_s": 5.0,
                "downscale_delay_s": 60.0,
            }
        }
    common: dict[str, Any] = {
        "max_ongoing_requests": MANY,
        "graceful_shutdown_timeout_s": placement.drain_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 30.0,
    }
    size = {"num_cpus": placement.cpus_per_replica, "num_gpus": placement.gpus_per_replica}
    alone: dict[str, Any] = {**common, "num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    replica = serve.deployment(name="model", ray_actor_options=size, **common, **scaling)(ModelReplica).bind(config)
    ingress = serve.deployment(name="ingress", **alone)(serve.ingress()(Ingress))
    return ingress.bind(config, high, replica, errors)


@contextlib.contextmanager
def served(config: ServeConfig, placement: Placement, errors: str = "") -> Iterator[str]:
    """The service on the Ray cluster that this process is connected to, ready, under the url that is given.

    errors: as of `application`.

    Raises UserError where the port is taken or Serve listens elsewhere already, ScorerayError where it can't start.
    """
    from ray import serve

    port = placement.port or _free_port(placement.host)
    _check_port(placement.host, port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    http = {"host": placement.host, "port": port, "keep_alive_timeout_s": 60}
    client = _started(serve, http, quiet)
    try:
        try:
            serve.run(application(config, placement, errors), name=APP, route_prefix="/", logging_config=quiet)
        except (RuntimeError, TimeoutError) as error:
            raise ScorerayError(f"the service did not start: {_reason(error)}") from None
        host = "127.0.0.1" if placement.host in ("0.0.0.0", "") else placement.host
        yield f"http://{f'[{host}]' if ':' in host else host}:{client or port}"
    finally:
        serve.shutdown()


def drain(timeout_s: float) -> int:
    """Takes no more requests and waits for those under way; returns how many are left then."""
    from ray import serve

    try:
        return serve.get_app_handle(APP).drain.remote(timeout_s).result(timeout_s=timeout_s + 10)
    except Exception as error:
        logging.getLogger("scoreray").warning("the service could not be asked to end: %s", error)
        return 0


def serve_until_stopped(
    config: ServeConfig, placement: Placement, ready: Callable[[str], None] = lambda url: None, *, verbose: bool = False
) -> int:
    """Serves until SIGTERM or Ctrl-C, then drains; `ready(url)` once requests are answered.

    Returns how many requests were cut off because they did not end in time. A second signal ends it at once.
    """
    told = threading.Event()
    try:
        left = _serve(config, placement, ready, told, verbose)
    except KeyboardInterrupt:
        if told.is_set():
            raise Ended("ended at once; requests under way were cut off") from None
        raise Ended("ended before it served; no request was taken") from None
    say("ended" if not left else f"ended; {left} requests did not finish in time and were cut off")
    return left


def _serve(
    config: ServeConfig, placement: Placement, ready: Callable[[str], None], told: threading.Event, verbose: bool
) -> int:
    for name, url in config.models:
        look_up(name, url, config.ema)  # a wrong URL is told before Ray starts, and so is a port that is taken
    if placement.port:
        _check_port(placement.host, placement.port)
    low = placement.replicas[0]
    slots = max(os.cpu_count() or 1, math.ceil(placement.replicas[1] * placement.cpus_per_replica))
    with connected(num_cpus=slots, verbose=verbose):
        replica = {"CPU": placement.cpus_per_replica, "GPU": placement.gpus_per_replica}
        otherwise = "give fewer, less to each (--gpus-per-replica, --cpus-per-replica), or another RAY_ADDRESS"
        wait_for_room(f"--replicas: {low} of them need", [replica] * low, otherwise)
        if not verbose:
            _hush()
        if not config.keys:
            config = replace(config, keys=_key_file())
        with _errors(verbose) as errors, served(config, placement, errors) as url, _signals(told):
            say(f"{', '.join(f'{n} ({u})' for n, u in config.models)}: served at {url} by {low} replica(s)")
            say(_curl(url, bool(config.tokens)))
            ready(url)
            told.wait()
            say(f"draining: no new requests are taken; up to {placement.drain_s:.0f} s for those under way")
            return drain(placement.drain_s)


def _key_file() -> str:
    """Where an embedded Ray's service stores idempotency keys; nowhere on a cluster, whose nodes share no folder."""
    if folder := os.environ.get(SCRATCH):
        return str(Path(folder, "keys.sqlite"))
    say(f"warning: {REDIS} is not set: idempotency keys are forgotten when the process that answers HTTP dies")
    return ""


@contextlib.contextmanager
def _errors(verbose: bool) -> Iterator[str]:
    """The file whose lines are told on standard error, as an embedded Ray's logs go with its folder.

    None on a cluster, whose logs stay, and with `verbose`, where Ray tells every line.
    """
    folder = os.environ.get(SCRATCH)
    if verbose or not folder:
        yield ""
        return
    with relayed(Path(folder, "errors.log")):
        yield str(Path(folder, "errors.log"))


def make_config(models: list[str], token_file: Path | None, host: str, no_auth: bool, **settings: Any) -> ServeConfig:
    """From the words of the command line. Raises UserError, also where anybody could reach a service without tokens."""
    if no_auth and token_file is not None:
        raise UserError(f"--no-auth serves everybody, --token-file {token_file} does not: leave one of them out")
    tokens = () if no_auth else read_tokens(token_file)
    if not tokens and not no_auth and not is_loopback(host):
        raise UserError(
            f"--host {host}: others can reach this, so tokens are needed: --token-file FILE (name:token in each line) "
            f"or {VARIABLE}; --no-auth serves everybody"
        )
    hosts = LOOPBACK_HOSTS if not tokens and is_loopback(host) else ()
    keys = os.environ.get(REDIS, "")
    if keys and urlsplit(keys).scheme not in ("redis", "rediss"):
        raise UserError(f"{REDIS} = {keys}: must be redis://HOST:PORT, or rediss:// for TLS")
    if urlsplit(keys).password:
        raise UserError(f"{REDIS} holds a password, which would show in logs: put it into {PASSWORD}")
    settings = {"keys": keys, **settings}
    return ServeConfig(tuple(_named(model) for model in models), tokens=tokens, hosts=hosts, **settings)


def make_limits(pairs: list[str]) -> Limits:
    """Limits from NAME=VALUE words. Raises UserError."""
    defaults, given = vars(Limits()), {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in defaults:
            raise UserError(f"--limit {shortened(pair)}: unknown limit; {nearest(name, defaults)}")
        kind, value = type(defaults[name]), parse_value(text, f"--limit {shortened(pair)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MOST
        if not number or kind(value) != value:
            raise UserError(
                f"--limit {shortened(pair)}: write NAME=NUMBER, a positive {'whole ' if kind is int else ''}"
                f"number below {MOST:g}, e.g. {name}={defaults[name]}"
            )
        given[name] = kind(value)
    return Limits(**given)


def parse_replicas(text: str) -> tuple[int, int]:
    """MIN,MAX or one number for both. Raises UserError."""
    low, _, high = (part.strip() for part in text.partition(","))
    ends = whole_number(low), whole_number(high or low)
    if ends[0] is None or ends[1] is None:
        raise UserError(f"--replicas {shortened(text)}: write a number, or MIN,MAX to start more while many rows wait")
    return ends[0], ends[1]


def _named(model: str) -> tuple[str, str]:
    """NAME=URL, or a URL whose last part is the name."""
    name, equals, url = model.partition("=")
    if equals and name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return name, url
    return model.rstrip("/").rpartition("/")[2] or model, model


def _curl(url: str, tokens: bool) -> str:
    token = "-H 'Authorization: Bearer TOKEN' " if tokens else ""
    return (
        f"  curl {url}/v1/samples {token}-H 'Content-Type: application/json' -H 'Accept: image/png' "
        "-d '{\"count\": 16}' -o samples.png\n"
        f"  {url}/ is its page, {url}/docs how to ask; Ctrl-C ends it"
    )


@contextlib.contextmanager
def _signals(told: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C set `told`; from the second on they interrupt, as everywhere else."""

    def first(number: int, frame: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, first)
    yield


def _hush() -> None:
    """Ray prints what its daemon says of actors that end on our standard output, which is for answers."""
    import ray._private.worker as worker

    worker.print_to_stdstream = lambda *_, **__: None


def _started(serve: Any, http: dict[str, Any], quiet: dict[str, Any]) -> int:
    """Starts Serve; the port where it listens. Raises UserError where it was there already, with another listener."""
    from ray.exceptions import RayError

    try:
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
    except (RayError, TimeoutError) as error:
        serve.shutdown()
        raise ScorerayError(f"Ray Serve did not start to listen on port {http['port']}: {_reason(error)}") from None
    from ray.serve.context import _get_global_client

    there = _get_global_client().http_config
    if (there.host, there.port) != (http["host"], http["port"]):
        raise UserError(
            f"Ray Serve already runs on this cluster and listens on {there.host}:{there.port}, "
            f"not on {http['host']}:{http['port']}: take these with --host and --port, or shut it down first"
        )
    return int(there.port)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    if os.environ.get("RAY_ADDRESS"):
        return  # the listener is on another machine
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"{host}:{port} can't be listened on: {error.strerror}; choose with --host and --port"
        ) from None


def _reason(error: BaseException) -> str:
    """The line of a Serve failure that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "Error:" in line]
    return (ours or lines or [type(error).__name__])[-1]
