"""Options of `scoreray serve`, from words to checked values: where a service runs, its limits, its models."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.own_code import is_own, name_in_command
from scoreray.data.units import whole_number
from scoreray.data.yaml_text import parse_value
from scoreray.sampling.samplers.sample import sampler_of
from scoreray.sampling.service.access import VARIABLE, is_loopback, read_tokens
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.sampling.service.idempotency import PASSWORD
from scoreray.trainer.checkpoints.stored_model import find_model

REDIS = "SCORERAY_REDIS"  # environment variable: redis://HOST:PORT, where idempotency keys are stored on a cluster
MOST = 1e15  # of any limit
MOST_OF_PLACEMENT = 1e6  # CPUs, GPUs, seconds
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
TIMES_AND_SHARES = ("cpus_per_replica", "gpus_per_replica", "reload_s", "drain_s")


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


class ServeOptions(BaseModel):
    """Options of `scoreray serve`, which are the `args` of the application in a Serve config too.

    Tokens come from SCORERAY_TOKENS of the pods, never from here: the dashboard shows a Serve config. Ray and KubeRay
    read it as YAML 1.1, where 1e1 is a string and off is false; they are read here by the rule of our configs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoints: list[str]
    lora: list[str] = []
    replicas: str = "1"
    ema: str | None = None
    max_batch: int = 32
    max_models: int = 4
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    threads: int | None = None
    parallel: bool = False
    reload_s: float = 10.0
    drain_s: float = 60.0
    limit: list[str] = []
    no_auth: bool = False
    samplers: list[str] = []

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

    def checked(self, host: str, port: int = 8000, token_file: Path | None = None) -> tuple[ServeConfig, Placement]:
        """What is served, and where. Raises UserError, also where anybody could reach a service without tokens."""
        placement = Placement(
            host,
            port,
            parse_replicas(self.replicas),
            self.cpus_per_replica,
            self.gpus_per_replica,
            max(128, 4 * self.max_batch),
            self.drain_s,
        )
        models, adapters = self.checkpoints, [_name_and_url(one) for one in self.lora]
        if adapters:  # of a run the checkpoint that is its newest now: a LoRA is of one checkpoint
            models = [f"{name}={find_model(url, self.ema).url}" for name, url in map(_name_and_url, models)]
            adapters = [(name, find_model(url).url) for name, url in adapters]
        config = make_config(
            models,
            token_file,
            host,
            self.no_auth,
            adapters=tuple(adapters),
            ema=self.ema,
            max_batch=self.max_batch,
            max_models=self.max_models,
            precision=self.precision,
            compile=self.compile,
            threads=self.threads,
            parallel=self.parallel,
            reload_s=self.reload_s,
            limits=make_limits(self.limit),
            samplers=_own_samplers(self.samplers),
        )
        return config, placement


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
    settings = {"keys": _redis_url(), **settings}
    return ServeConfig(tuple(_name_and_url(model) for model in models), tokens=tokens, hosts=hosts, **settings)


def _redis_url() -> str:
    """What SCORERAY_REDIS names, empty where it is not set. Raises UserError, which shows no password."""
    url = os.environ.get(REDIS, "")
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("redis", "rediss") and parts.hostname is not None and parts.port != 0
    except ValueError:  # of a port that is no number, or a bracket
        raise UserError(f"{REDIS}: no url; write redis://HOST:PORT, or rediss:// for TLS") from None
    if parts.password:
        raise UserError(f"{REDIS}: holds a password, which would show in logs; put it into {PASSWORD}")
    if url and not is_one:
        raise UserError(f"{REDIS} = {shortened(url)}: write redis://HOST:PORT, or rediss:// for TLS")
    return url


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


def _own_samplers(names: list[str]) -> tuple[str, ...]:
    """Raises UserError where one can't be had."""
    for name in name_in_command(names):
        sampler_of(name)
    return tuple(name for name in names if is_own(name))


def parse_replicas(text: str) -> tuple[int, int]:
    """MIN,MAX or one number for both. Raises UserError."""
    low, _, high = (part.strip() for part in text.partition(","))
    ends = whole_number(low), whole_number(high or low)
    if ends[0] is None or ends[1] is None:
        raise UserError(f"--replicas {shortened(text)}: write a number, or MIN,MAX to start more while many rows wait")
    return ends[0], ends[1]


def _name_and_url(model: str) -> tuple[str, str]:
    """NAME=URL, or a URL whose last part is the name."""
    name, equals, url = model.partition("=")
    if equals and name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return name, url
    return model.rstrip("/").rpartition("/")[2] or model, model
