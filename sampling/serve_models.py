"""Which models a service answers with, what each can do, and when a newer checkpoint has been committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.store import open_store
from scoreray.sampling.export import RAW, ExportedModel, find_exported
from scoreray.sampling.load import ModelInfo
from scoreray.sampling.options import options_of
from scoreray.sampling.samplers import SAMPLERS
from scoreray.sampling.serve_answers import is_picture
from scoreray.sampling.serve_config import Limits, Refused
from scoreray.trainer.checkpoint import FOLDER, committed, find
from scoreray.trainer.config import load_config
from scoreray.trainer.rbm import MachineConfig


@dataclass(frozen=True)
class Served:
    """A model under a name. `url` is what was asked for; `info.url` the checkpoint that answers now.

    emas: EMA lengths that can be asked for, `info.ema` the default. follows: whether `url` is a run, whose newest
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
        if wanted in self.emas:
            return wanted
        try:
            return self.info.config.ema.choose(wanted)
        except UserError:
            message = f"EMA length '{wanted}' is not served: {nearest(wanted, self.emas)}"
            raise Refused("invalid", message, field="ema") from None

    def newer(self) -> bool:
        """Whether the run has committed another checkpoint since. Reads the store."""
        if not self.follows:
            return False
        folders = committed(open_store(self.url))
        return bool(folders) and not self.info.url.endswith("/" + folders[-1])

    def page(self, limits: Limits) -> dict[str, Any]:
        """What GET /v1/model tells of it."""
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
            "pictures": is_picture(info.image_shape),
            "classes": list(info.classes),
            "process": type(info.config.process).__name__,
            "samplers": {name: _options(name) for name in SAMPLERS},
            "limits": {"count": limits.max_count, "steps": limits.max_steps, "calls": limits.max_calls},
        }


def look_up(name: str, url: str, ema: str | None = None) -> Served:
    """The model at a URL as it is now, without its weights. Raises UserError, DataError, StorageError."""
    source = find_exported(url) or find(url)
    page: dict[str, Any] = source.page if isinstance(source, ExportedModel) else source.marker
    try:
        config = load_config(page["config"])
        shape, classes, images_seen = tuple(page["image_shape"]), tuple(page["classes"]), int(page["images_seen"])
        emas = tuple(page["files"]) if isinstance(source, ExportedModel) else (*config.ema.names, RAW)
    except (KeyError, TypeError, UserError) as error:
        raise DataError(f"{url}: does not describe a model: {error}") from None
    if isinstance(config.network, MachineConfig):
        raise UserError(f"{url}: network.kind '{config.network.kind}' has no denoiser; `scoreray sample` draws from it")
    if isinstance(source, ExportedModel):
        chosen, at, follows = ema or source.chosen or emas[0], url, False
        if chosen not in emas:
            raise UserError(f"EMA length '{chosen}' is not in {url}; {nearest(chosen, emas)}")
    else:
        chosen, at = RAW if ema == RAW else config.ema.choose(ema), source.url
        follows = source.folder.startswith(FOLDER + "/")
    return Served(name, url, ModelInfo(at, images_seen, chosen, shape, classes, config), emas, follows)


def _options(sampler: str) -> dict[str, Any]:
    return {
        name: {"accepted": option.accepted, "default": option.default}
        for name, option in options_of(SAMPLERS[sampler]).items()
    }
