"""A folder that diffusers' DiffusionPipeline.from_pretrained loads, and that every verb of ours takes as well.

<out>/model_index.json                                       names the pipeline and its one component
<out>/pipeline.py, denoiser/denoiser.py                      name the classes of `diffusers_pipeline.py`
<out>/denoiser/config.json                                   what model.json says, for these
<out>/denoiser/diffusion_pytorch_model.safetensors           the first EMA length; another one is a variant beside it,
<out>/denoiser/diffusion_pytorch_model.ema-0_100.safetensors    from_pretrained(..., variant="ema-0_100")
<out>/model.json                                             ours, written last
"""

from __future__ import annotations

import json
from dataclasses import asdict

from scoreray.data.errors import UserError
from scoreray.data.storage.store import Store
from scoreray.sampling.model.export import ModelToExport, file_name, write_model
from scoreray.trainer.checkpoints.exported import DIFFUSERS_WEIGHTS, ModelManifest

VERSION = "0.36.0"  # of diffusers, from which on folders of this form are known to load
SHIM = '''"""{what} of scoreray, which must be installed."""

from scoreray.sampling.formats.diffusers_pipeline import {name}

__all__ = ["{name}"]
'''


def write_diffusers_folder(model: ModelToExport, store: Store) -> ModelManifest:
    """Writes the folder; returns its model.json. Raises UserError for a model without a denoiser."""
    first, *others = model.states
    info = model.info(first)
    if info.is_machine:
        raise UserError(
            f"{info.url}: network.kind '{info.config.network.kind}' knows no noise level, so it has no denoiser that "
            "diffusers could call; export --format scoreray"
        )
    files = {first: f"{DIFFUSERS_WEIGHTS}.safetensors"}
    files |= {length: f"{DIFFUSERS_WEIGHTS}.{variant(length)}.safetensors" for length in others}
    config = {"_class_name": "ScorerayDenoiser", "model": asdict(model.page), "ema": first}
    index = {"_class_name": ["pipeline", "ScorerayPipeline"], "denoiser": ["denoiser", "ScorerayDenoiser"]}
    beside = {
        "pipeline.py": SHIM.format(what="The pipeline", name="ScorerayPipeline").encode(),
        "denoiser/denoiser.py": SHIM.format(what="The denoiser", name="ScorerayDenoiser").encode(),
        "denoiser/config.json": _json(config),
        "model_index.json": _json(index),
    }
    return write_model(model, store, files, beside)


def variant(length: str) -> str:
    """What diffusers calls the weights of an EMA length that is not the first: "ema-0_100" (it allows no dot)."""
    return file_name(length).replace(".", "_")


def _json(fields: dict) -> bytes:
    return (json.dumps({**fields, "_diffusers_version": VERSION}, indent=2) + "\n").encode()
