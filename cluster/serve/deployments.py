"""The deployments of a service on Ray Serve: one ingress, which answers HTTP, and the replicas that draw."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator
from typing import Any

from scoreray.cluster.serve.handles import RayBackend, last_of
from scoreray.cluster.serve.listener import keep_grpc_to_loopback
from scoreray.cluster.serve.log import log_here
from scoreray.cluster.serve.options import Placement
from scoreray.data import own_code
from scoreray.data.errors import ScorerayError
from scoreray.sampling.service.config import ServeConfig
from scoreray.sampling.service.idempotency import kept, open_key_store
from scoreray.sampling.service.models import look_up
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.request import Event, SampleRequest
from scoreray.sampling.service.service import Service
from scoreray.trainer.encoders.load import environment as autoencoders

MANY = 100_000  # requests that Ray Serve may hand on: what is too much is judged by rows, in the replica


class ModelReplica:
    """The Serve deployment that draws: a `Replica` in an actor of its own."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        _prepare_process()
        self._replica = Replica(config)
        self._store = open_key_store(config.keys, config.limits) if config.keys else None
        for name, url in config.models:
            served = await asyncio.to_thread(look_up, name, url, config.ema, (), config.adapters)
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

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"waiting_rows": float(self._replica.waiting_rows())}

    def check_health(self) -> None:
        self._replica.check()


class Ingress:
    """The Serve deployment that answers HTTP: one, so that limits and counters are in one place."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, most_replicas: int, handle: Any, errors: str = ""
    ) -> None:
        _prepare_process(errors)
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
                "policy": {"policy_function": "scoreray.cluster.serve.deployments:replicas_wanted"},
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
    brought = _brought()
    size = {"num_cpus": placement.cpus_per_replica, "num_gpus": placement.gpus_per_replica, **brought}
    alone: dict[str, Any] = {**common, "num_replicas": 1, "ray_actor_options": {"num_cpus": 0, **brought}}
    replica = serve.deployment(name="model", ray_actor_options=size, **common, **scaling)(ModelReplica).bind(config)
    ingress = serve.deployment(name="ingress", **alone)(serve.ingress()(Ingress))
    return ingress.bind(config, high, replica, errors)


def _brought() -> dict[str, Any]:
    """Code of somebody else's for the processes of a service: Serve's controller, which starts them, may be of another
    job. Ray has copied the folders there when this process connected; asked before, it would start a cluster."""
    import ray

    variables = own_code.environment() | autoencoders()
    if not variables:
        return {}
    copied = own_code.py_modules() and ray.is_initialized()
    modules = ray.get_runtime_context().runtime_env.get("py_modules") if copied else None
    return {"runtime_env": {"env_vars": variables, **({"py_modules": modules} if modules else {})}}


def _prepare_process(errors: str = "") -> None:
    """For the constructor of a deployment: what holds in each process of a service. errors: as of `log_here`."""
    log_here(errors)
    keep_grpc_to_loopback()
