"""The sampling service for Ray Serve's config files (RayService): `import_path: scoreray.cluster.serve.app:build`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from scoreray.cluster.serve.serve import Placement, application, make_config, make_limits, parse_replicas
from scoreray.data.yaml_text import parse_value

TIMES_AND_SHARES = ("cpus_per_replica", "gpus_per_replica", "reload_s", "drain_s")


class Settings(BaseModel):
    """`args` of the application: the words of `scoreray serve`, with the same meaning and defaults.

    Tokens come from SCORERAY_TOKENS of the pods, never from here: the dashboard shows a Serve config. Ray and KubeRay
    read it as YAML 1.1, where 1e1 is a string and off is false; what is meant is read here by the rule of configs.
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

    @field_validator("max_batch", "max_models", "threads", *TIMES_AND_SHARES, mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        return parse_value(value, str(info.field_name)) if isinstance(value, str) else value

    @field_validator("replicas", "ema", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("compile", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return ("on" if value else "off") if isinstance(value, bool) else value


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
