"""A folder that diffusers' DiffusionPipeline.from_pretrained loads, and that every verb of ours takes as well.

<out>/model_index.json                                       names the pipeline and its one component
two Python files, pipeline and denoiser/denoiser             name the classes of `diffusers_pipeline.py`
<out>/denoiser/config.json                                   what model.json says, for these
<out>/denoiser/diffusion_pytorch_model.safetensors           the first EMA length; another one is a variant beside it,
<out>/denoiser/diffusion_pytorch_model.ema-0_100.safetensors    from_pretrained(..., variant="ema-0_100")
<out>/vae/                                                   of a model of latents, the autoencoder that decodes them
<out>/model.json                                             ours, written last
"""

from __future__ import annotations

from scoreray.data.errors import UserError
from scoreray.data.storage.store import Store
from scoreray.sampling.formats.diffusers_plain import as_json, variant, write_plain_folder
from scoreray.sampling.model.export import ModelToExport, has_autoencoder, write_model
from scoreray.trainer.checkpoints.exported import AUTOENCODER, DIFFUSERS_WEIGHTS, ModelManifest, with_autoencoder_at
from scoreray.trainer.checkpoints.marker import page_fields
from scoreray.trainer.encoders.load import load_autoencoder
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig

SHIM = '''"""{what} of scoreray, which must be installed."""

from scoreray.sampling.formats.diffusers_pipeline import {name}

__all__ = ["{name}"]
'''


def write_diffusers_folder(model: ModelToExport, store: Store) -> ModelManifest:
    """Writes the folder; returns its model.json. A network of diffusers' own becomes a folder of diffusers' own
    (`diffusers_plain.py`). Raises UserError for a model without a denoiser."""
    network = model.config.network
    if isinstance(network, DiffusersNetworkConfig):
        return write_plain_folder(model, network, store)
    first, *others = model.states
    info = model.info(first)
    if info.instead_of_denoiser:
        raise UserError(
            f"{info.url}: nothing that diffusers could call: {info.instead_of_denoiser}; leave --format out"
        )
    files = {first: f"{DIFFUSERS_WEIGHTS}.safetensors"}
    files |= {length: f"{DIFFUSERS_WEIGHTS}.{variant(length)}.safetensors" for length in others}
    page = with_autoencoder_at(model.page, AUTOENCODER) if has_autoencoder(model.page) else model.page
    config = {"_class_name": "ScorerayDenoiser", "model": page_fields(page), "ema": first}
    index = {"_class_name": ["pipeline", "ScorerayPipeline"], "denoiser": ["denoiser", "ScorerayDenoiser"]}
    if info.encoding is not None and info.encoding.kind == "diffusers":
        index["vae"] = ["diffusers", type(load_autoencoder(info.encoding, "cpu").module).__name__]
    beside = {
        "pipeline.py": SHIM.format(what="The pipeline", name="ScorerayPipeline").encode(),
        "denoiser/denoiser.py": SHIM.format(what="The denoiser", name="ScorerayDenoiser").encode(),
        "denoiser/config.json": as_json(config),
        "model_index.json": as_json(index),
    }
    return write_model(model, store, files, beside)
