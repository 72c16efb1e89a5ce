"""`scoreray import edm`, `import k-diffusion`: weights in safetensors, with the JSON that describes their network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from scoreray.data.errors import DataError, UserError
from scoreray.data.own_code import code_hashes, line_of, load, name_in_command
from scoreray.data.storage.store import open_store
from scoreray.sampling.imports.import_diffusers import run_name
from scoreray.sampling.model.export import ModelToExport, write_model
from scoreray.trainer.checkpoints.exported import ModelManifest, State
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import class_condition
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.meta import on_meta
from scoreray.trainer.networks.base import state_misfits
from scoreray.trainer.networks.preconditioned import PreconditionedNetworkConfig
from scoreray.trainer.networks.pretrained_folder import all_finite, check_readable, read_json, refuse_pickle
from scoreray.trainer.optim.ema import RAW

PRECONDITIONING = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data",
                   "model_type")  # fmt: skip
"""Arguments of EDMPrecond itself; the others are its network's."""


def import_edm(file: str, out: str, config_file: str, package: str = "training.networks") -> ModelManifest:
    """An EDMPrecond of NVlabs' edm: config_file holds its arguments as JSON, package its network's class.

    Raises UserError (a pickle, code that was not brought, arguments that it refuses), DataError, StorageError.
    """
    known = read_json(Path(config_file))
    wanted = [key for key in ("img_resolution", "img_channels") if not isinstance(known.get(key), int)]
    if wanted:
        raise UserError(f"--config {config_file}: has no number {wanted[0]}; the arguments of EDMPrecond are needed")
    size, channels, label_dim = known["img_resolution"], known["img_channels"], known.get("label_dim", 0)
    arguments = {"img_resolution": size, "in_channels": channels, "out_channels": channels, "label_dim": label_dim}
    network = PreconditionedNetworkConfig(
        f"{package}:{known.get('model_type', 'DhariwalUNet')}",
        {**arguments, **{key: value for key, value in known.items() if key not in PRECONDITIONING}},
        num_classes=label_dim,
    )
    state = {name: tensor for name, tensor in _weights(file)[0].items() if name.startswith("model.")}
    return _write(file, out, network, (channels, size, size), known.get("sigma_data", 0.5), EDM(), state,
                  known.get("label_dropout", 0.0))  # fmt: skip


def import_k_diffusion(file: str, out: str, config_file: str | None = None) -> ModelManifest:
    """What k-diffusion's convert_for_inference wrote; config_file in the place of the config in its metadata.

    Raises UserError (k_diffusion is not installed, a pickle, a network with other conditions), DataError, StorageError.
    """
    state, metadata = _weights(file)
    try:
        raw = read_json(Path(config_file)) if config_file else json.loads(metadata["config"])
        name_in_command("k_diffusion.config:make_model")
        known = load("k_diffusion.config:load_config", "import k-diffusion:")(raw)
    except KeyError:
        raise UserError(f"{file}: has no config in its metadata; give its JSON by --config") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{file}: its config is none of k-diffusion's: {line_of(error)}") from None
    model, num_classes = known["model"], known["dataset"]["num_classes"]
    others = [key for key in ("mapping_cond_dim", "unet_cond_dim", "cross_cond_dim") if model.get(key)]
    if others:
        raise UserError(
            f"{file}: model.{others[0]} is {model[others[0]]}: networks with such conditions are not supported"
        )
    network = PreconditionedNetworkConfig(
        "k_diffusion.config:make_model",
        {"config": {"model": model, "dataset": {"num_classes": num_classes}}},
        calls="k_diffusion",
        num_classes=num_classes if model["type"] != "image_v1" else 0,
    )
    process = EDM(model["sigma_min"], model["sigma_max"])
    shape = (model["input_channels"], *model["input_size"])
    state = {f"model.{name}": tensor for name, tensor in state.items()}
    dropped = known["dataset"].get("cond_dropout_rate", 0.0)
    return _write(file, out, network, shape, model["sigma_data"], process, state, dropped)


def _weights(file: str) -> tuple[State, dict[str, str]]:
    """(tensors in float32, metadata) of a safetensors file. Raises UserError, DataError."""
    refuse_pickle(Path(file))
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; give weights in safetensors")
    check_readable(Path(file))
    with safe_open(file, "pt") as stored:
        state = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata() or {}
    all_finite(Path(file), state)
    return state, metadata


def _write(
    file: str,
    out: str,
    network: PreconditionedNetworkConfig,
    shape: tuple[int, ...],
    sigma_data: float,
    process: EDM,
    state: State,
    label_dropout: float,
) -> ModelManifest:
    conditions = class_condition([str(number) for number in range(network.num_classes)])
    expected = on_meta(lambda: network.build(shape, conditions)).state_dict()
    if wrong := state_misfits(expected, state):
        raise DataError(f"{file}: weights and config do not fit: {wrong}")
    section: dict[str, Any] = {"kind": network.kind, "module": network.module, "arguments": network.arguments,
                               "calls": network.calls, "num_classes": network.num_classes}  # fmt: skip
    config = load_config({
        "run": {"name": run_name(Path(file).stem), "storage": "imported"},
        "data": {"url": file},
        "process": {"kind": process.kind, "sigma_min": process.sigma_min, "sigma_max": process.sigma_max},
        "network": section,
        "objective": {"label_dropout": label_dropout},
        "denoiser": {"parameterization": "edm", "sigma_data": sigma_data},
        "duration": {"images": 1},
    })  # fmt: skip
    stored = config.model_dump(mode="json")
    is_picture = shape[0] in (1, 3)
    target = TargetField("image", "image", "uint8") if is_picture else TargetField("sample", "array", "float32")
    page = ModelManifest(file, 0, list(shape), [], {}, stored, target=target, conditions=conditions,
                         own_code=code_hashes(stored))  # fmt: skip
    return write_model(ModelToExport(page, config, {RAW: lambda: state}), open_store(out))
