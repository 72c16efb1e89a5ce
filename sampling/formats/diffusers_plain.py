"""A network of diffusers' own as a folder of diffusers' own: its class, its weights, a scheduler of the same noise.

<out>/model_index.json                                     the pipeline that its class belongs to
<out>/unet/ or transformer/                                config.json and diffusion_pytorch_model.safetensors
<out>/scheduler/scheduler_config.json                      the betas or flow shift, and what the network predicts

Other parts of a pipeline (an autoencoder, text encoders) are none of ours: they are passed to `from_pretrained`. What
stands for no prompt is theirs to encode, and left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from scoreray.data.errors import UserError
from scoreray.data.storage.store import Store, open_store
from scoreray.sampling.imports.scheduler import BETAS, PREDICTIONS
from scoreray.sampling.model.export import ModelToExport, file_name, put_weights
from scoreray.trainer.checkpoints.exported import MODEL_JSON, ModelManifest
from scoreray.trainer.checkpoints.unfinished import being_written
from scoreray.trainer.config import Config
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig


@dataclass(frozen=True)
class PipelinePart:
    """Where a class stands in a pipeline of diffusers, and whether it and a scheduler are all of that."""

    folder: str
    pipeline: str
    whole: bool = False


PARTS = {
    "UNet2DModel": PipelinePart("unet", "DDIMPipeline", whole=True),
    "UNet2DConditionModel": PipelinePart("unet", "StableDiffusionPipeline"),
    "DiTTransformer2DModel": PipelinePart("transformer", "DiTPipeline"),
    "PixArtTransformer2DModel": PipelinePart("transformer", "PixArtSigmaPipeline"),
    "SanaTransformer2DModel": PipelinePart("transformer", "SanaPipeline"),
    "SD3Transformer2DModel": PipelinePart("transformer", "StableDiffusion3Pipeline"),
    "AuraFlowTransformer2DModel": PipelinePart("transformer", "AuraFlowPipeline"),
}
INDEX_JSON = "model_index.json"
VERSION = "0.36.0"  # of diffusers, from which on folders of this form are known to load


def write_plain_folder(model: ModelToExport, network: DiffusersNetworkConfig, store: Store) -> ModelManifest:
    """Writes the folder; returns its page, with the files. Raises UserError where no scheduler takes its output."""
    if (info := model.info(model.default)).map != "none":
        raise UserError(
            f"{info.url}: no scheduler of diffusers draws from objective.kind "
            f"'{info.config.objective.kind}'; export --format scoreray"
        )
    part, (name, scheduler) = PARTS[network.class_name], scheduler_of(model.config, network)
    if open_store(model.page.checkpoint).root == store.root:
        raise UserError(f"{store.url()}: is the folder that it was imported from; give another one")
    infix = {length: "" if length == model.default else f".{variant(length)}" for length in model.states}
    keys = {length: f"{part.folder}/diffusion_pytorch_model{infix[length]}.safetensors" for length in model.states}
    configs = {
        f"{part.folder}/config.json": as_json({**network.config, "_class_name": network.class_name}),
        "scheduler/scheduler_config.json": as_json({**scheduler, "_class_name": name}),
    }
    parts = {part.folder: ["diffusers", network.class_name], "scheduler": ["diffusers", name]}
    files = {}
    with being_written(store, INDEX_JSON, [*keys.values(), *configs]) as folder:
        store.delete([MODEL_JSON])  # of an earlier export in our own form
        for length, weights in model.states.items():
            state = {key: value for key, value in weights().items() if key.startswith(network.wrapped_prefix)}
            own = {key.removeprefix(network.wrapped_prefix): value for key, value in state.items()}
            files[length] = put_weights(store, keys[length], own)
        for key, data in configs.items():
            store.put(key, data)
        folder.commit(as_json({**parts, "_class_name": part.pipeline}))
    return replace(model.page, files=files)


def scheduler_of(config: Config, network: DiffusersNetworkConfig) -> tuple[str, dict[str, Any]]:
    """The class and config of a scheduler by whose times the network knows noise levels. Raises UserError."""
    schedule, process, output = network.schedule, config.process, config.denoiser.parameterization
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if schedule.kind == "edm" and output == "edm":
        ends = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        return "EDMEulerScheduler", {**ends, "sigma_data": config.denoiser.resolved_sigma_data}
    if schedule.kind == "flow_matching" and output == "velocity":
        shift = process.shift if process.kind == "flow_matching" else 1.0
        return "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": shift}
    if schedule.kind != "ddpm" or output not in predictions or output == "velocity":
        raise UserError(
            f"denoiser.parameterization '{output}' of a network that knows the times of '{schedule.kind}': no "
            "scheduler of diffusers takes it so; export --format scoreray"
        )
    betas: dict[str, Any] = {"trained_betas": list(schedule.betas)}
    if not schedule.betas:
        names = {ours: theirs for theirs, ours in BETAS.items()}
        ends = {"beta_start": schedule.beta_min, "beta_end": schedule.beta_max}
        betas = {**ends, "beta_schedule": names[schedule.schedule]}
    steps = {"num_train_timesteps": schedule.num_steps, "prediction_type": predictions[output], "clip_sample": False}
    return "DDIMScheduler", {**betas, **steps}


def variant(length: str) -> str:
    """What diffusers calls the weights of an EMA length that is not the first: "ema-0_100" (it allows no dot)."""
    return file_name(length).replace(".", "_")


def as_json(fields: dict[str, Any]) -> bytes:
    """A config of diffusers."""
    return (json.dumps({**fields, "_diffusers_version": VERSION}, indent=2) + "\n").encode()
