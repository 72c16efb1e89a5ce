"""The lines that load an exported folder, as its card and the command show them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from scoreray.data.own_code import VARIABLE, own_kinds
from scoreray.data.storage.store import local_path
from scoreray.sampling.formats.diffusers_plain import PARTS, scheduler_of
from scoreray.sampling.formats.graphs import ONNX, TORCH_EXPORT
from scoreray.sampling.formats.hub import SCHEME
from scoreray.sampling.formats.lora_folder import lora_prefix
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig

SCORERAY, DIFFUSERS, LORA = "scoreray", "diffusers", "lora"
VALUES = {"class": "0", "vector": "[...]", "concat": "array", "sequence": "array", "text": '"a text"'}


@dataclass(frozen=True)
class Usage:
    """library: what a card names for the folder. language: of the lines."""

    library: str
    language: str
    lines: str


def usage_of(format: str, out: str, page: ModelManifest, info: ModelInfo) -> Usage:
    """Of a folder that was written to `out` in a format. page: with its files."""
    return USAGES[format](out, page, info)


def _scoreray(out: str, page: ModelManifest, info: ModelInfo) -> Usage:
    place, fetch = out, ""
    if out.startswith(SCHEME):
        place = _place(out).rpartition("/")[2]
        fetch = f"hf download {_place(out)} --local-dir {shlex.quote(place)}\n"
    code = [word for package in _packages(page) for word in ("--with", package)]
    words = ["sample", place, *code, "--count", "64", "--out", "samples"]
    if info.is_autoencoder:
        field = info.target.name if info.target else "image"
        words = ["data", "encode", "DATA", "LATENTS", "--encoder", f"scoreray={place}", *code]
        words += ["--field", field, "--to", "latent"]
    return Usage(SCORERAY, "sh", f"{fetch}{shlex.join(['scoreray', *words])}")


def _packages(page: ModelManifest) -> list[str]:
    """Of somebody else's code that the model needs, by name: where they are is of one machine."""
    return list(dict.fromkeys(kind.partition(":")[0].partition(".")[0] for kind in own_kinds(page.config)))


def _diffusers(out: str, page: ModelManifest, info: ModelInfo) -> Usage:
    network = info.config.network
    if isinstance(network, DiffusersNetworkConfig):
        return Usage(DIFFUSERS, "python", _plain(_place(out), info, network))
    values = ", ".join(f'"{name}": {VALUES[spec.kind]}' for name, spec in info.conditions.items())
    given = f", condition={{{values}}}" if values else ""
    packages = os.pathsep.join(_packages(page))
    code = f"\n# in an environment with {VARIABLE}={packages}" if packages else ""
    return Usage(
        DIFFUSERS,
        "python",
        f"from diffusers import DiffusionPipeline  # scoreray must be installed too{code}\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{_place(out)}", trust_remote_code=True)\n'
        f"images = pipeline(batch_size=4, seed=0{given}).images",
    )


def _plain(place: str, info: ModelInfo, network: DiffusersNetworkConfig) -> str:
    """Of a folder of diffusers' own: its pipeline, or where that has other parts, or takes no classes, its network."""
    class_name = network.class_name
    part = PARTS[class_name]
    if part.whole and info.conditions:
        scheduler, _ = scheduler_of(info.config, network)
        return (
            f"import torch\nfrom diffusers import {scheduler}, {class_name}\n\n"
            f'network = {class_name}.from_pretrained("{place}", subfolder="{part.folder}")\n'
            f'scheduler = {scheduler}.from_pretrained("{place}", subfolder="scheduler")\n'
            f"labels = torch.tensor([0, 1])  # of {len(info.classes)} classes; DDIMPipeline takes none\n"
            "scheduler.set_timesteps(50)\n"
            f"x = torch.randn(2, {', '.join(map(str, info.image_shape))}) * scheduler.init_noise_sigma\n"
            "for t in scheduler.timesteps:\n"
            "    with torch.no_grad():\n"
            "        output = network(scheduler.scale_model_input(x, t), t, class_labels=labels).sample\n"
            "    x = scheduler.step(output, t, x).prev_sample"
        )
    if part.whole:
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{place}")\n'
            "images = pipeline(batch_size=4).images"
        )
    prompt = "class_labels=[0, 1]" if info.classes else '"a prompt"'
    return (
        f"from diffusers import {class_name}, {part.pipeline}\n\n"
        f'network = {class_name}.from_pretrained("{place}", subfolder="{part.folder}")\n'
        f'pipeline = {part.pipeline}.from_pretrained("...", {part.folder}=network)  # where its other parts are\n'
        f"images = pipeline({prompt}).images"
    )


def _lora(out: str, page: ModelManifest, info: ModelInfo) -> Usage:
    place, network, base = _place(out), info.config.network, page.lineage[0]
    if not isinstance(network, DiffusersNetworkConfig):
        lines = (
            "from peft import PeftModel\nfrom scoreray.sampling.load import load\n\n"
            f'denoiser = load("{base.checkpoint}", ema="{base.ema}")\n'
            f'denoiser.network = PeftModel.from_pretrained(denoiser.network, "{place}")'
        )
    elif lora_prefix(info.config):
        pipeline = PARTS[network.class_name].pipeline
        lines = (
            f"from diffusers import {pipeline}\n\n"
            f'pipeline = {pipeline}.from_pretrained("...")  # what the base was imported from\n'
            f'pipeline.load_lora_weights("{place}")'
        )
    else:
        lines = (
            f"from diffusers import {network.class_name}\nfrom peft import PeftModel\n\n"
            f'network = {network.class_name}.from_pretrained("...")  # what the base was imported from\n'
            f'network = PeftModel.from_pretrained(network, "{place}")'
        )
    return Usage("peft", "python", lines)


def _onnx(out: str, page: ModelManifest, info: ModelInfo) -> Usage:
    inputs = ", ".join(f'"{name}": {name}' for name in graph_input_names(info))
    return Usage(
        ONNX,
        "python",
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{_place(out)}/{_first_file(page)}")\n'
        f"(denoised,) = session.run(None, {{{inputs}}})  # x [B, ...], sigma [B]: {_given_by(info)}",
    )


def _torch_export(out: str, page: ModelManifest, info: ModelInfo) -> Usage:
    _, _, *names = graph_input_names(info)
    given = ", ".join(f'"{name}": {name}' for name in names)
    inputs = f"x, sigma, {{{given}}}" if given else "x, sigma"
    return Usage(
        "pytorch",
        "python",
        "import torch\n\n"
        f'denoiser = torch.export.load("{_place(out)}/{_first_file(page)}").module()\n'
        f"denoised = denoiser({inputs})  # x [B, ...], sigma [B]: {_given_by(info)}",
    )


USAGES: dict[str, Callable[[str, ModelManifest, ModelInfo], Usage]] = {
    SCORERAY: _scoreray,
    DIFFUSERS: _diffusers,
    LORA: _lora,
    ONNX: _onnx,
    TORCH_EXPORT: _torch_export,
}
"""Every format that `scoreray export` knows."""


def _given_by(info: ModelInfo) -> str:
    """What a call of the graph gives, for a comment."""
    return "its path's end" if info.instead_of_mean else "E[x_0 | x_0 + sigma z = x]"


def graph_input_names(info: ModelInfo) -> list[str]:
    """Of a graph of the denoiser, in order (`graphs.py`)."""
    known = info.network_conditions
    masks = [f"mask_{name}" for name, spec in known.items() if spec.kind != "class"]
    return ["x", "sigma", *(f"condition_{name}" for name in known), *masks]


def _place(out: str) -> str:
    """As other programs open it: a repository of the Hub by its name, what is in an object store by a copy's."""
    if out.startswith(SCHEME):
        return out.removeprefix(SCHEME).rstrip("/")
    place = out.rstrip("/")
    return place if local_path(out) is not None else place.rpartition("/")[2]


def _first_file(page: ModelManifest) -> str:
    return next(iter(page.files.values())).file
