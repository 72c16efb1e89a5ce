"""Which models a service answers with, what each can do, and when a newer checkpoint has been committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scoreray.data.errors import UserError
from scoreray.data.storage.store import open_store
from scoreray.sampling.model.describe import PROCESS_GRID, ModelInfo, describe
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.samplers.options import Option, options_of
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.sampling.samplers.sigmas import GRIDS
from scoreray.sampling.service.config import Limits, Refused
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.optim.ema import choose_length


@dataclass(frozen=True)
class ServedModel:
    """A model under a name. `url` is what the command line names; `info.url` the checkpoint that answers now.

    emas: EMA lengths that requests may name, `info.ema` the default. follows: whether `url` is a run, whose newest
    checkpoint is taken.
    """

    name: str
    url: str
    info: ModelInfo
    emas: tuple[str, ...]
    follows: bool

    def ema(self, wanted: str | None) -> str:
        """The length meant by a request. Raises Refused."""
        if wanted is None:
            return self.info.ema
        try:
            return choose_length(wanted, self.emas, f"model '{self.name}'", self.info.config.ema.stds)
        except UserError as error:
            raise Refused("invalid", str(error), field="ema") from None

    def newer(self) -> bool:
        """Whether the run has committed another checkpoint since. Reads the store."""
        if not self.follows:
            return False
        folders = committed(open_store(self.url))
        return bool(folders) and not self.info.url.endswith("/" + folders[-1])

    def defaults(self) -> dict[str, Any]:
        """The sampler, steps and grid of a request that names none."""
        request = Request(1).fitted(self.info)
        return {"sampler": request.sampler, "steps": request.steps, "grid": request.grid}

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
            "shape": list(info.image_shape),
            "pictures": info.is_picture,
            "classes": list(info.classes),
            "process": type(info.config.process).__name__,
            "defaults": self.defaults(),
            "grids": [*GRIDS, PROCESS_GRID],
            "samplers": {name: _options(name, info) for name in SAMPLERS},
            "limits": {"count": limits.max_count, "steps": limits.max_steps, "calls": limits.max_calls},
        }


def look_up(name: str, url: str, ema: str | None = None) -> ServedModel:
    """The model at a URL as it is now, without its weights. Raises UserError, DataError, StorageError."""
    found = describe(url, ema)
    if found.info.is_machine:
        kind = found.info.config.network.kind
        raise UserError(f"{url}: network.kind '{kind}' has no denoiser; `scoreray sample` draws from it")
    return ServedModel(name, url, found.info, found.lengths, found.follows_run)


def _options(sampler: str, info: ModelInfo) -> dict[str, Any]:
    """Those that JSON has a word for; `default` is what a request gets that does not name the option."""
    filled_in = Request(1, sampler).fitted(info).options
    return {
        name: {"accepted": option.accepted, "default": filled_in.get(name, option.default), "choices": _choices(option)}
        for name, option in options_of(SAMPLERS[sampler]).items()
        if option.kind in (bool, int, float, str)
    }


def _choices(option: Option) -> list[str]:
    """All values that an option may have, as words; empty for numbers."""
    words = ["true", "false"] if option.kind is bool else list(option.choices)
    return [*words, "none"] if words and option.optional else words
