"""`scoreray serve`: a service from its first replica to the end of its last request."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scoreray.cluster import display
from scoreray.cluster.connect.local_ray import connected, interruptible
from scoreray.cluster.connect.room import wait_for_room
from scoreray.cluster.connect.start import load_line
from scoreray.cluster.connect.watch import STOPPING
from scoreray.cluster.display import say, waiting
from scoreray.cluster.serve.deployments import application
from scoreray.cluster.serve.listener import check_port, free_port, reason_of, start_listening
from scoreray.cluster.serve.log import relayed
from scoreray.cluster.serve.options import REDIS, Placement
from scoreray.data.errors import ScorerayError
from scoreray.data.scratch import SCRATCH
from scoreray.data.threads import in_daemon_thread
from scoreray.sampling.service.answers import can_be_pictures
from scoreray.sampling.service.config import ServeConfig
from scoreray.sampling.service.models import look_up
from scoreray.trainer.checkpoints.stored_model import find_model

APP = "scoreray"
SAY_EVERY_S = 15.0
SHUTDOWN_S = 60.0
T = TypeVar("T")


class Ended(ScorerayError):
    """Ctrl-C (or SIGTERM) where there was nothing to drain yet, or again while it drained."""

    exit_status = 130


@contextlib.contextmanager
def served(config: ServeConfig, placement: Placement, errors: str = "") -> Iterator[str]:
    """The service on the Ray cluster that this process is connected to; yields its url once it is ready.

    errors: as of `application`. At its end Serve is shut down, unless it ran already or has other applications.

    Raises UserError where the port is taken or Serve listens elsewhere already, ScorerayError where it can't start.
    """
    from ray import serve

    port = placement.port or free_port(placement.host)
    check_port(placement.host, port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    http = {"host": placement.host, "port": port, "keep_alive_timeout_s": 60}
    with contextlib.ExitStack() as stack:
        with _progress(config), interruptible():
            ran_already = start_listening(http, quiet)
            stack.callback(_end, ran_already)
            try:
                serve.run(application(config, placement, errors), name=APP, route_prefix="/", logging_config=quiet)
            except (RuntimeError, TimeoutError) as error:
                raise ScorerayError(f"the service did not start: {reason_of(error)}") from None
        host = "127.0.0.1" if placement.host in ("0.0.0.0", "") else placement.host
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _end(ran_already: bool) -> None:
    """Ends the application, and Serve with it where nobody else uses it: on a cluster it may have other applications.

    Not looked for on an embedded Ray, which may have ended: Serve's status would be waited for.
    """
    from ray import serve

    def end() -> None:
        shared = "RAY_ADDRESS" in os.environ and serve.status().applications.keys() - {APP}
        if ran_already or shared:
            serve.delete(APP)
        else:
            serve.shutdown()

    with contextlib.suppress(TimeoutError):
        _within(SHUTDOWN_S, end)


@contextlib.contextmanager
def _progress(config: ServeConfig) -> Iterator[None]:
    """A line now and then while a service starts: which of its deployments are not up yet."""
    over, began = threading.Event(), time.monotonic()
    compiling = ""
    if config.compile == "auto":
        compiling = f"; compiling takes {config.warmup_s:g} s at most, --compile off leaves it out"

    def report() -> None:
        while not over.wait(SAY_EVERY_S):
            after = f"{time.monotonic() - began:.0f} s ({load_line()})"
            say(f"the service is still starting after {after}{states()}{compiling}")

    threading.Thread(target=report, name="serve-progress", daemon=True).start()
    spinner = waiting("starting the service: replicas load the model")
    try:
        with spinner if display.console.is_terminal else contextlib.nullcontext():
            yield
    finally:
        over.set()


def states() -> str:
    """ "; ingress: 1 RUNNING; model: 1 STARTING", as Serve reports it; "" where it does not yet."""
    from ray import serve

    with contextlib.suppress(Exception):
        deployments = serve.status().applications[APP].deployments
        counts = {name: one.replica_states for name, one in sorted(deployments.items())}
        return "".join(
            f"; {name}: " + ", ".join(f"{number} {getattr(state, 'value', state)}" for state, number in one.items())
            for name, one in counts.items()
        )
    return ""


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """The result of `call`. Raises TimeoutError after `limit_s`: where Ray has ended, as where all of a process group
    got SIGTERM, its calls wait for it without a limit, and in C++, where no signal is seen."""
    return in_daemon_thread(call, "serve-call").result(limit_s)


def drain(timeout_s: float) -> int:
    """Takes no more requests and waits for those under way; returns how many are left then."""
    from ray import serve

    try:
        return _within(
            timeout_s + 10, lambda: serve.get_app_handle(APP).drain.remote(timeout_s).result(timeout_s=timeout_s + 10)
        )
    except Exception as error:
        logging.getLogger("scoreray").warning("the service could not be drained: %s", error)
        return 0


def serve_until_stopped(
    config: ServeConfig, placement: Placement, ready: Callable[[str], None] = lambda url: None, *, verbose: bool = False
) -> int:
    """Serves until SIGTERM or Ctrl-C, then drains; `ready(url)` once requests are answered.

    Returns how many requests were cut off because they did not end in time. A second signal ends it at once.
    """
    stopping = threading.Event()
    try:
        left = _serve(config, placement, ready, stopping, verbose)
    except KeyboardInterrupt:
        if stopping.is_set():
            raise Ended("ended at once; requests under way were cut off") from None
        raise Ended("ended while it was starting; requests under way were cut off") from None
    say("ended" if not left else f"ended; {left} requests did not finish in time and were cut off")
    return left


def _serve(
    config: ServeConfig, placement: Placement, ready: Callable[[str], None], stopping: threading.Event, verbose: bool
) -> int:
    # A wrong URL is refused before Ray starts, as a taken port is.
    models = [look_up(name, url, config.ema, adapters=config.adapters) for name, url in config.models]
    for _, url in config.adapters:  # small: a damaged one is named here, where Ray Serve would only say that it failed
        find_model(url).stored_weights()
    if placement.port:
        check_port(placement.host, placement.port)
    low = placement.replicas[0]
    slots = max(os.cpu_count() or 1, math.ceil(placement.replicas[1] * placement.cpus_per_replica))
    with connected(num_cpus=slots, verbose=verbose):
        replica = {"CPU": placement.cpus_per_replica, "GPU": placement.gpus_per_replica}
        otherwise = "give fewer, less to each (--gpus-per-replica, --cpus-per-replica), or another RAY_ADDRESS"
        wait_for_room(f"--replicas: {low} of them need", [replica] * low, otherwise)
        if not config.keys:
            config = replace(config, keys=_key_file())
        with _errors(verbose) as errors, served(config, placement, errors) as url, _signals(stopping):
            say(f"{', '.join(f'{n} ({u})' for n, u in config.models)}: served at {url} by {low} replica(s)")
            say(_curl(url, bool(config.tokens), can_be_pictures(models[0].info.sample_shape)))
            ready(url)
            stopping.wait()
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
    """The file whose lines go to standard error, as an embedded Ray's logs are removed with its folder.

    None on a cluster, whose logs stay, and with `verbose`, where Ray prints every line.
    """
    folder = os.environ.get(SCRATCH)
    if verbose or not folder:
        yield ""
        return
    with relayed(Path(folder, "errors.log")):
        yield str(Path(folder, "errors.log"))


def _curl(url: str, tokens: bool, pictures: bool) -> str:
    token = "-H 'Authorization: Bearer TOKEN' " if tokens else ""
    media, file = ("image/png", "samples.png") if pictures else ("application/x-npz", "samples.npz")
    return (
        f"  curl {url}/v1/samples {token}-H 'Content-Type: application/json' -H 'Accept: {media}' "
        f"-d '{{\"count\": 16}}' -o {file}\n"
        f"  {url}/ is its page, {url}/docs its HTTP interface; Ctrl-C ends it"
    )


@contextlib.contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C sets `stopping`; from the second on they interrupt, as everywhere else."""

    def first(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        STOPPING.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, first)
    yield
