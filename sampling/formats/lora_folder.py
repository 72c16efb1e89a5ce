"""A LoRA as a folder of peft's: PeftModel.from_pretrained loads it beside its base, and every verb of ours takes it.

<out>/adapter_config.json                  which layers, of which rank and scale
<out>/adapter_model.safetensors            the adapters at one EMA length; names as in the network that they adapt
<out>/pytorch_lora_weights.safetensors     the same for load_lora_weights, of classes whose diffusers pipeline has it
<out>/model.json                           ours, written last: its lineage names the base
"""

from __future__ import annotations

from dataclasses import replace

from safetensors.torch import save

from scoreray.data.errors import UserError
from scoreray.data.scratch import scratch_folder
from scoreray.data.storage.store import Store
from scoreray.sampling.formats.diffusers_plain import PARTS
from scoreray.sampling.model.export import ModelToExport, write_model
from scoreray.trainer.checkpoints.exported import ADAPTERS, ModelManifest, State
from scoreray.trainer.config import Config
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig
from scoreray.trainer.networks.lora import ADAPTER_CONFIG, LoRAConfig, layers_of

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"  # where diffusers' pipelines look for LoRAs
LOADING_PIPELINES = {"StableDiffusionPipeline", "StableDiffusion3Pipeline", "SanaPipeline", "AuraFlowPipeline"}
"""Of diffusers: those with load_lora_weights, whose networks have load_lora_adapter."""


def lora_prefix(config: Config) -> str:
    """What names of the network's tensors begin with in diffusers' own LoRA files; "" where its pipeline has none."""
    network = config.network
    if not isinstance(network, DiffusersNetworkConfig):
        return ""
    part = PARTS[network.class_name]
    return f"{part.folder}." if part.pipeline in LOADING_PIPELINES else ""


def write_lora_folder(model: ModelToExport, store: Store) -> ModelManifest:
    """Writes the folder; returns its model.json. model: with adapters alone as its states. Raises UserError for a model
    that is no LoRA, and for several EMA lengths."""
    lora = model.config.lora
    if lora is None:
        raise UserError(f"--format lora: {model.page.checkpoint} holds no adapters: it was trained "
                        "without lora, or exported with them merged into it")  # fmt: skip
    if len(model.states) > 1:
        raise UserError(f"--format lora: a folder holds one EMA length, not {', '.join(model.states)}; give one --ema")
    adapters, inside = model.states[model.default](), model.config.network.wrapped_prefix
    state = {name.removeprefix(inside): tensor.contiguous() for name, tensor in adapters.items()}
    beside = {ADAPTER_CONFIG: _peft_config(lora, state, model.page.lineage[0].checkpoint)}
    if prefix := lora_prefix(model.config):
        beside[DIFFUSERS_LORA] = save({prefix + name: tensor for name, tensor in _scaled(lora, state).items()})
    store.delete([DIFFUSERS_LORA])
    alone = replace(model, states={model.default: lambda: state})
    return write_model(alone, store, {model.default: ADAPTERS}, beside)


def _peft_config(lora: LoRAConfig, state: State, base: str) -> bytes:
    settings = lora.for_peft(layers_of(state))
    settings.base_model_name_or_path, settings.inference_mode = base, True
    with scratch_folder() as folder:
        settings.save_pretrained(str(folder))
        return (folder / ADAPTER_CONFIG).read_bytes()


def _scaled(lora: LoRAConfig, state: State) -> State:
    """With alpha / rank in lora_B: older versions of diffusers know no scale but 1, and all read such a file alike."""
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in state.items()}
