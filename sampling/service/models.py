"""Which models a service answers with, what each can do, and when a newer checkpoint has been committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from scoreray.data.errors import UserError, nearest
from scoreray.data.storage.store import open_store
from scoreray.sampling.grids.optimise import OPTIMISED
from scoreray.sampling.guidance.steering import joint_dropout, own_dropout
from scoreray.sampling.model.adapters import find_adapters
from scoreray.sampling.model.describe import PROCESS_GRID, ModelInfo, describe
from scoreray.sampling.model.prompts import prompt_conditions
from scoreray.sampling.offline.generate import Request, RequestError
from scoreray.sampling.samplers.options import Option, options_of
from scoreray.sampling.samplers.sample import SAMPLERS, sampler_of
from scoreray.sampling.samplers.sigmas import GRIDS
from scoreray.sampling.service.answers import can_be_pictures
from scoreray.sampling.service.config import Limits, Refused, refused_at
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.config.condition_values import described
from scoreray.trainer.diffusion.condition import HAS_LENGTH, ConditionSpec
from scoreray.trainer.diffusion.process import PROCESSES
from scoreray.trainer.optim.ema import choose_length

MOST_STDS = 2.5  # of Gaussian numbers 99% are within so many standard deviations


@dataclass(frozen=True)
class ServedModel:
    """A model under a name. `url` is what the command line names; `info.url` the checkpoint that answers now.

    emas: EMA lengths that requests may name, `info.ema` the default. follows: whether `url` is a run, whose newest
    checkpoint is taken. adapters: LoRAs that requests may name. samplers: those of somebody else's that they may.
    """

    name: str
    url: str
    info: ModelInfo
    emas: tuple[str, ...]
    follows: bool
    adapters: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()

    def ema(self, wanted: str | None) -> str:
        """The length meant by a request. Raises Refused."""
        if wanted is None:
            return self.info.ema
        with refused_at("ema"):
            return choose_length(wanted, self.emas, f"model '{self.name}'", self.info.config.ema.stds)

    def adapter(self, wanted: str | None, ema: str) -> str:
        """The LoRA meant by a request at an EMA length; "" for none. Raises Refused."""
        if wanted is None:
            return ""
        if wanted not in self.adapters:
            accepted = nearest(wanted, self.adapters) if self.adapters else "none is served; leave it out"
            raise Refused("invalid", f"adapter '{wanted}': {accepted}", field="adapter")
        if ema != self.info.ema:
            message = f"adapters were trained on EMA {self.info.ema} of this model: leave ema out"
            raise Refused("invalid", message, field="ema")
        return wanted

    def newer(self) -> bool:
        """Whether the run has committed another checkpoint since. Reads the store."""
        if not self.follows:
            return False
        folders = committed(open_store(self.url))
        return bool(folders) and not self.info.url.endswith("/" + folders[-1])

    def defaults(self) -> dict[str, Any]:
        """The sampler, steps and grid of a request that names none, and the network calls that a sample takes then."""
        request = Request(1).fitted(self.info)
        calls = request.calls(self.info)
        return {"sampler": request.sampler, "steps": request.steps, "grid": request.grid, "calls": calls}

    def page(self, limits: Limits) -> dict[str, Any]:
        """The JSON of it in GET /v1/model."""
        info = self.info
        return {
            "name": self.name,
            "url": self.url,
            "checkpoint": info.url,
            "images_seen": info.images_seen,
            "follows_run": self.follows,
            "ema": info.ema,
            "emas": list(self.emas),
            "adapters": list(self.adapters),
            "shape": list(info.sample_shape),
            "sizes": list(info.sizes),
            "pictures": info.is_picture,
            "target": _target(info),
            "conditions": {
                name: {**_condition(info.conditions[name]), "dropout": rate} for name, rate in own_dropout(info).items()
            },
            "label_dropout": joint_dropout(info),
            "prompt": list(prompt_conditions(info)),
            "classes": list(info.classes),
            "process": type(info.config.process).__name__,
            "map": info.map,
            "defaults": self.defaults(),
            "grids": [*GRIDS, PROCESS_GRID, *([OPTIMISED] if info.grids else [])],
            "optimised_grids": [
                {"sampler": one.sampler, "steps": one.steps, "levels": one.levels, "checkpoint": one.checkpoint}
                for one in info.stored_grids
            ],
            "samplers": {
                name: _options(name, fitted)
                for name in (*SAMPLERS, *self.samplers)
                if (fitted := _fitted(name, info)) is not None
            },
            "limits": {
                "count": limits.max_count,
                "steps": limits.max_steps,
                "calls": limits.max_calls,
                "condition_bytes": limits.max_condition_bytes,
            },
        }


def look_up(
    name: str,
    url: str,
    ema: str | None = None,
    samplers: tuple[str, ...] = (),
    adapters: Sequence[tuple[str, str]] = (),
) -> ServedModel:
    """The model at a URL as it is now, without its weights. Raises UserError, DataError, StorageError.

    adapters: (name, URL) pairs of LoRAs of this very model.
    """
    found = describe(url, ema)
    if found.info.source is not None:
        raise UserError(
            f"{url}: begins from samples of {found.info.source}, which a request does not bring; `scoreray sample` "
            "draws from it"
        )
    if found.info.instead_of_denoiser:
        raise UserError(f"{url}: {found.info.instead_of_denoiser}")
    served = ServedModel(name, url, found.info, found.stored.lengths, found.follows_run, samplers=samplers)
    return replace(served, adapters=tuple(find_adapters(adapters, found.stored)))


def _target(info: ModelInfo) -> dict[str, Any]:
    """What samples are: of which field, the shape, type and units of their values, and whether they can be seen."""
    kind = "image" if info.is_picture else "array"
    name, kind = (info.target.name, info.target.kind) if info.target is not None else (kind, kind)
    if info.encoding is not None:
        name, kind = info.encoding.of, info.encoding.of_kind
    units = "0 to 255" if info.is_picture else "those of the data"
    return {
        "name": name,
        "kind": kind,
        "shape": list(info.sample_shape),
        "dtype": info.sample_dtype,
        "units": units,
        "png": can_be_pictures(info.sample_shape),
    }


def _condition(spec: ConditionSpec) -> dict[str, Any]:
    """What a request may give for one condition, `takes` in words. low, high: of each of a vector's numbers, where most
    data are."""
    page: dict[str, Any] = {"kind": spec.kind, "shape": list(spec.shape), "takes": described(spec)}
    if spec.kind == "class":
        page["classes"] = list(spec.classes)
    if spec.kind in HAS_LENGTH:
        page["max_length"] = spec.shape[0]
    if spec.kind == "vector" and spec.normaliser is not None and spec.normaliser.kind != "none":
        reach = 1.0 if spec.normaliser.kind == "range" else MOST_STDS
        ends = reach * torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, *spec.shape)
        page["low"], page["high"] = spec.normaliser.invert(ends).tolist()
    return page


def _fitted(sampler: str, info: ModelInfo) -> Request | None:
    """A request by a sampler; None where the model's network does not give what the sampler needs."""
    try:
        return Request(1, sampler).fitted(info)
    except RequestError:
        return None


def _options(sampler: str, fitted: Request) -> dict[str, Any]:
    """Those that JSON has a word for; `default` is what a request gets that does not name the option."""
    filled_in = fitted.options
    return {
        name: {"accepted": option.accepted, "default": filled_in.get(name, option.default), "choices": _choices(option)}
        for name, option in options_of(sampler_of(sampler)).items()
        if option.kind in (bool, int, float, str) or option.is_process
    }


def _choices(option: Option) -> list[str]:
    """All values that an option may have, as words; empty for numbers."""
    words = ["true", "false"] if option.kind is bool else list(PROCESSES if option.is_process else option.choices)
    return [*words, "none"] if words and option.optional else words
