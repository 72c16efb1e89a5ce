"""`scoreray import diffusers`: a folder that diffusers saved, written as a model that every verb takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scoreray.data.errors import UserError, nearest
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field_kinds import FieldKind
from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.own_code import line_of
from scoreray.data.storage.store import open_store
from scoreray.sampling.imports.folder import PretrainedFolder
from scoreray.sampling.imports.scheduler import TrainedNoise, trained_noise
from scoreray.sampling.model.export import ModelToExport, write_model
from scoreray.trainer.checkpoints.exported import ModelManifest, State
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import LABEL, ConditionKind, ConditionSpec
from scoreray.trainer.diffusion.condition_shapes import example_condition
from scoreray.trainer.encoders.diffusers import CLASSES, DiffusersAutoencoder
from scoreray.trainer.meta import on_meta
from scoreray.trainer.networks.diffusers_network import CALLS, DiffusersNetwork, DiffusersNetworkConfig
from scoreray.trainer.networks.pretrained_folder import read_json, weight_files
from scoreray.trainer.optim.ema import RAW

NAMES: dict[ConditionKind, str] = {"class": LABEL, "sequence": "prompt", "vector": "pooled"}
"""What conditions of imported models are called."""
LABEL_DROPOUT = 0.1
"""Of models that know a null: their pipelines guide by it, so training dropped some. Folders don't say how many; this
is customary (Ho 2022)."""


@dataclass(frozen=True)
class ImportOptions:
    """What a folder does not say, or says otherwise.

    scheduler: a scheduler_config.json, of a folder that has none.  timesteps: as of `DiffusersNetworkConfig`.
    size: height and width of samples; None: the config's.  length: tokens of the prompt; None: the pipeline's own.
    null_class: the class number that means none.  nulls: .npy files of what stands for no prompt ([L, D]) or no pooled
    vector ([D]), by name; zeros where left out.
    """

    scheduler: str | None = None
    timesteps: str = "interpolate"
    size: tuple[int, int] | None = None
    length: int | None = None
    null_class: int | None = None
    nulls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """model: as it was written; noise: what its scheduler says."""

    model: ModelManifest
    network: DiffusersNetworkConfig
    noise: TrainedNoise


def import_diffusers(folder: str, out: str, options: ImportOptions = ImportOptions()) -> Imported:
    """Reads a pipeline or a bare model in `folder` (of this machine) and writes it to `out` (a folder or `s3://`).

    Raises UserError (a class or scheduler that is not known, pickles, no weights, an option that does not fit),
    DataError (weights that are not those of the config), StorageError.
    """
    found = PretrainedFolder.open(folder, options.scheduler)
    if not found.scheduler:
        raise UserError(f"{folder}: has no scheduler_config.json, which says on what noise it was trained; give one by "
                        "--scheduler")  # fmt: skip
    shape = _shape(found, options)
    patch = found.config.get("patch_size")
    noise = trained_noise(found.scheduler, (shape[1] // patch) * (shape[2] // patch) if patch else 0)
    if CALLS[found.class_name].flow and noise.schedule.kind != "flow_matching":
        raise UserError(
            f"scheduler '{found.scheduler['_class_name']}' with {noise.parameterization} as prediction: a "
            f"{found.class_name} is trained by flow matching; give its own scheduler_config.json by --scheduler"
        )
    nulls = {name: _null(name, path) for name, path in options.nulls.items()}
    network = _network(found, noise, options, shape, nulls)
    conditions = _conditions(found, network, options, nulls)
    built = on_meta(lambda: network.build(shape, conditions))  # before weights are read: do sizes and conditions fit?
    _check_call(built, shape)
    weights = found.weights()
    knows_null = network.null_class is not None or NAMES["sequence"] in conditions
    config = load_config({
        "run": {"name": run_name(folder), "storage": "imported"},
        "data": {"url": folder, "conditions": {name: {"kind": spec.kind} for name, spec in conditions.items()}},
        "process": asdict(noise.process),
        "network": asdict(network),
        "objective": {"label_dropout": LABEL_DROPOUT if knows_null else 0.0},
        "denoiser": {"parameterization": noise.parameterization, "sigma_data": noise.sigma_data},
        "duration": {"images": 1},
    })  # fmt: skip
    state: State = {f"network.{name}": tensor for name, tensor in weights.items()}
    for name, parameter in built.named_parameters(recurse=False):
        value = nulls.get(NAMES["sequence" if name == "null_sequence" else "vector"])
        state[name] = torch.zeros(parameter.shape)
        if value is not None:
            state[name][: len(value)] = value
    page = ModelManifest(
        folder, 0, list(shape), [], {}, config.model_dump(mode="json"), target=_target(found, shape),
        conditions=conditions,
    )  # fmt: skip
    model = ModelToExport(page, config, {RAW: lambda: state})
    return Imported(write_model(model, open_store(out)), network, noise)


def _shape(found: PretrainedFolder, options: ImportOptions) -> tuple[int, int, int]:
    size: Any = options.size or found.config.get("sample_size")
    if size is None:
        raise UserError(
            f"{found.path / 'config.json'}: has no sample_size; give the samples' height and width by --size"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(found.config.get("in_channels", 3 if found.class_name == "UNet2DModel" else 4)), int(height), int(width)


def _check_call(network: DiffusersNetwork, shape: tuple[int, int, int]) -> None:
    """Calls it on the meta device. Raises UserError for a size that it can't take: one that it can't halve, say."""
    x, c_noise = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    given = example_condition(network.conditions, 1, "meta")
    try:
        on_meta(lambda: network(x, c_noise, given))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"samples of {list(shape)}: {network.settings.class_name} can't be called with them: {line_of(error)}; "
            "another size goes with --size"
        ) from None


def _network(
    found: PretrainedFolder,
    noise: TrainedNoise,
    options: ImportOptions,
    shape: tuple[int, int, int],
    nulls: Mapping[str, torch.Tensor],
) -> DiffusersNetworkConfig:
    call, prompt = CALLS[found.class_name], nulls.get(NAMES["sequence"])
    null_class, num_classes = options.null_class, found.config.get(call.sizes.get("class", ""))
    if null_class is None and call.has_null_class:
        null_class = num_classes
    if null_class is not None:
        if num_classes is None:
            raise UserError(f"--null-class {null_class}: this {found.class_name} has no classes")
        last = num_classes - 1 + call.has_null_class
        if not 0 <= null_class <= last:
            raise UserError(f"--null-class {null_class}: this {found.class_name} has the classes 0 to {last}")
    factor = 2 ** (len(found.vae["block_out_channels"]) - 1) if found.vae.get("block_out_channels") else 8
    takes_pixels = found.class_name == "PixArtTransformer2DModel" or found.config.get("addition_embed_type")
    return DiffusersNetworkConfig(
        found.class_name,
        found.config,
        noise.schedule,
        timesteps=options.timesteps,  # type: ignore[arg-type]
        timestep_scale=(1.0 if call.takes_time else noise.num_steps) * found.config.get("timestep_scale", 1.0),
        null_class=null_class,
        null_length=None if prompt is None else len(prompt),
        resolution=(factor * shape[1], factor * shape[2]) if takes_pixels else None,
    )


def _conditions(
    found: PretrainedFolder, network: DiffusersNetworkConfig, options: ImportOptions, nulls: Mapping[str, torch.Tensor]
) -> dict[str, ConditionSpec]:
    sizes, conditions = network.sizes, dict[str, ConditionSpec]()
    for name in nulls:
        taken = [NAMES[kind] for kind in sizes if kind != "class"]
        if name not in taken:
            raise UserError(f"--null {name}: this {found.class_name} takes none of that name; {nearest(name, taken)}")
    for kind, size in sizes.items():
        length = options.length or CALLS[found.class_name].length
        match kind:
            case "class":
                spec = ConditionSpec(kind, classes=tuple(found.classes.get(i, str(i)) for i in range(size)))
            case "sequence":
                spec = ConditionSpec(kind, (length, size))
            case _:
                spec = ConditionSpec(kind, (size,))
        value = nulls.get(NAMES[kind])
        if value is not None and (value.ndim != len(spec.shape) or any(map(int.__gt__, value.shape, spec.shape))
                                  or value.shape[-1] != size):  # fmt: skip
            accepted = f"[up to {length}, {size}]" if kind == "sequence" else f"[{size}]"
            raise UserError(f"--null {NAMES[kind]}: an array of shape {list(value.shape)}; {accepted} is accepted")
        conditions[NAMES[kind]] = spec
    return conditions


def _null(name: str, path: str) -> torch.Tensor:
    try:
        found = np.load(path, allow_pickle=False)
        return torch.from_numpy(np.asarray(found, dtype=np.float32))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--null {name}={path}: can't be read as an .npy of numbers: {error}") from None


def _target(found: PretrainedFolder, shape: tuple[int, int, int]) -> TargetField:
    """Pictures, or latents in the units of the pipeline's VAE, which decodes them: model = (latent - shift) scale."""
    if not found.vae and shape[0] in (1, 3):
        return TargetField("image", "image", "uint8")
    scale, shift = found.vae.get("scaling_factor") or 1.0, found.vae.get("shift_factor") or 0.0
    normaliser = Normaliser("channel", (float(shift),) * shape[0], (1 / float(scale),) * shape[0])
    return TargetField("latent", "array", "float32", normaliser, _encoding(found.path.parent / "vae", shape))


def _encoding(vae: Path, shape: tuple[int, int, int]) -> Encoding | None:
    """What the autoencoder of a pipeline says of its latents; None of a folder that has its config alone, or one of a
    class that decodes no pictures."""
    if str(read_json(vae / "config.json").get("_class_name")) not in CLASSES or not weight_files(vae):
        return None
    loaded = DiffusersAutoencoder(str(vae))
    decoded = loaded.decoded_shape(shape)
    kind: FieldKind = "image" if is_picture(decoded) else "array"
    return Encoding(loaded.kind, loaded.path, loaded.sha256, "image", kind, list(decoded))


def run_name(path: str) -> str:
    """The name of a folder or file, as far as a run may have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).resolve().name).strip("._-")[:100] or "imported"
