"""The sampling service for Ray Serve's config files (RayService): `import_path: scoreray.cluster.serve_app:build`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from scoreray.cluster.serving import Placement, application, make_config, make_limits, parse_replicas


class Settings(BaseModel):
    """`args` of the application: the words of `scoreray serve`, with the same meaning and defaults.

    Tokens come from SCORERAY_TOKENS of the pods, never from here: the dashboard shows a Serve config.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoints: list[str]
    replicas: str = "1"
    ema: str | None = None
    max_batch: int = 32
    max_models: int = 4
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    threads: int | None = None
    reload_s: float = 10.0
    drain_s: float = 60.0
    limit: list[str] = []
    no_auth: bool = False


def build(args: Settings) -> Any:
    """The application. Raises UserError: on a cluster others can reach the listener, so tokens are needed."""
    host, max_batch = "0.0.0.0", args.max_batch
    placement = Placement(
        host,
        8000,
        parse_replicas(args.replicas),
        args.cpus_per_replica,
        args.gpus_per_replica,
        max(128, 4 * max_batch),
        args.drain_s,
    )
    config = make_config(
        args.checkpoints,
        None,
        host,
        args.no_auth,
        ema=args.ema,
        max_batch=max_batch,
        max_models=args.max_models,
        precision=args.precision,
        compile=args.compile,
        threads=args.threads,
        reload_s=args.reload_s,
        limits=make_limits(args.limit),
    )
    return application(config, placement)
