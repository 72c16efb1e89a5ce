"""`scoreray import lora`: a LoRA that peft or diffusers stored, of a model of ours or of an imported one.

Both libraries load it into the base's network themselves, without its weights; what they loaded is written as
`lora_folder.py` writes a LoRA of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scoreray.data.errors import DataError, ScorerayError, UserError, listed, shortened
from scoreray.data.extras import check_installed
from scoreray.data.storage.store import Store, open_store
from scoreray.sampling.formats.diffusers_plain import PARTS
from scoreray.sampling.formats.lora_folder import DIFFUSERS_LORA, lora_prefix, write_lora_folder
from scoreray.sampling.model.export import ModelToExport, check_other_place
from scoreray.trainer.checkpoints.exported import ADAPTERS, ModelManifest, State
from scoreray.trainer.checkpoints.stored_model import StoredModel, find_model
from scoreray.trainer.config import load_config
from scoreray.trainer.meta import on_meta
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig
from scoreray.trainer.networks.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    FIRST_HALF,
    PEFT_PREFIX,
    LoRAConfig,
    load_adapters,
)
from scoreray.trainer.networks.network import build_network
from scoreray.trainer.networks.pretrained_folder import read_json, refuse_pickle
from scoreray.trainer.optim.ema import RAW

SECOND_HALF = FIRST_HALF.replace("_A", "_B")
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Keys of adapter_config.json, and values with which adapters are added to the base as it is: DoRA also scales it, and
other ways to begin (PiSSA, OLoRA, CorDA, LoftQ) change the base's own weights."""


@dataclass(frozen=True)
class ImportedLoRA:
    """model: as it was written; left_out: tensors of the file that are of other networks, such as a text encoder."""

    model: ModelManifest
    left_out: list[str]


def import_lora(folder: str, out: str, base: str, ema: str | None = None) -> ImportedLoRA:
    """Reads the LoRA in `folder` (of this machine; or one safetensors file of diffusers' form) and writes it to `out`.

    base, ema: the model that it adapts, as `find_model` takes them.  Raises UserError (no LoRA, a pickle, of another
    network, a kind of adapter that is not supported), DataError (files that can't be read), StorageError.
    """
    stored, store = find_model(base, ema), open_store(out)
    check_other_place(store, stored)
    if store.root == open_store(folder).root:
        raise UserError(f"{out}: is the folder that it is imported from; give another one")
    network = on_meta(lambda: build_network(stored.config.network, stored.page.image_shape, stored.conditions))
    network.to_empty(device="cpu")  # no memory is touched; adapters beside layers on "meta" stay there
    inner: Any = network.get_submodule(stored.config.network.wrapped_prefix.rstrip("."))
    left_out = list[str]()
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        _load_peft(inner, Path(folder))
    else:
        left_out = _load_diffusers(inner, stored, _file_of_diffusers(Path(folder)))
    lora, adapters = _read_back(inner)
    if bad := [name for name, tensor in adapters.items() if not tensor.isfinite().all()]:
        raise DataError(f"{folder}: numbers that are not finite: {listed(bad)}")
    return ImportedLoRA(_write(folder, store, stored, lora, adapters), left_out)


def _load_peft(network: nn.Module, folder: Path) -> None:
    check_installed("lora", "import lora", "peft")
    from peft import LoraConfig, inject_adapter_in_model

    path, settings = folder / ADAPTERS, read_json(folder / ADAPTER_CONFIG)
    for old in folder.iterdir():
        if not path.is_file():
            refuse_pickle(old)
    for key, accepted in PLAIN.items():
        if (value := settings.get(key, accepted[0])) not in accepted:
            raise UserError(f"{folder / ADAPTER_CONFIG}: {key} {shortened(str(value))}: plain LoRA alone is supported")
    given = _tensors(path)
    other = [name for name in given if not name.endswith((FIRST_HALF, SECOND_HALF))]
    if other:
        raise UserError(f"{path}: holds more than the halves lora_A and lora_B of adapters: {listed(other)}")
    with _in_one_line(folder):
        config = LoraConfig.from_peft_type(**{**settings, "init_lora_weights": True})  # they are read right below
        inject_adapter_in_model(config, network, ADAPTER, low_cpu_mem_usage=True)
        load_adapters(network, {name.removeprefix(PEFT_PREFIX): value for name, value in given.items()}, ADAPTER)


def _file_of_diffusers(path: Path) -> Path:
    """The safetensors file of a folder without adapter_config.json; of several the one that diffusers prefers."""
    if path.is_file():
        refuse_pickle(path)
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one with {ADAPTER_CONFIG}, or a safetensors file of diffusers")
    found = sorted(path.glob("*.safetensors"))
    preferred = [file for file in found if file.name == DIFFUSERS_LORA] or found
    if len(preferred) == 1:
        return preferred[0]
    for file in path.iterdir():
        refuse_pickle(file)
    if not found:
        raise UserError(f"{path}: has neither {ADAPTER_CONFIG} nor {DIFFUSERS_LORA}")
    raise UserError(f"{path}: holds several files, {listed(file.name for file in found)}; give one of them")


def _load_diffusers(network: Any, stored: StoredModel, file: Path) -> list[str]:
    """Returns the names of what is of other parts of a pipeline."""
    config, prefix = stored.config.network, lora_prefix(stored.config)
    if not prefix:
        kind = config.class_name if isinstance(config, DiffusersNetworkConfig) else f"network.kind '{config.kind}'"
        raise UserError(f"{file}: has no {ADAPTER_CONFIG} beside it, and diffusers loads no LoRAs into {kind}")
    assert isinstance(config, DiffusersNetworkConfig)
    check_installed("diffusers", "import lora", "diffusers")
    check_installed("lora", "import lora", "peft")
    _tensors(file)
    with _in_one_line(file):
        import diffusers
        from peft import get_peft_model_state_dict

        pipeline = getattr(diffusers, PARTS[config.class_name].pipeline)
        state, *alphas, metadata = pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, local_files_only=True, use_safetensors=True,
            return_lora_metadata=True,
        )  # fmt: skip
        own = {name for name in state if name.startswith(prefix)}
        if not own:
            raise UserError(f"{file}: holds no tensors of a {prefix[:-1]}: {listed(sorted(state))}")
        network.load_lora_adapter(
            state, prefix=prefix[:-1], network_alphas=(alphas or [None])[0], metadata=metadata, adapter_name=ADAPTER,
            low_cpu_mem_usage=True,
        )  # fmt: skip
        loaded = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    lacking = [name for name, tensor in loaded.items() if tensor.is_meta]
    further = sorted(name for name in own if FIRST_HALF in name and name.removeprefix(prefix) not in loaded)
    if lacking or len(own) > len(loaded):
        which = f"missing: {listed(lacking)}" if lacking else f"not of this network: {listed(further or sorted(own))}"
        raise UserError(f"{file}: a LoRA of another network: {which}")
    return sorted(state.keys() - own)


def _tensors(path: Path) -> State:
    """In float32. Raises UserError, DataError."""
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, which {ADAPTER_CONFIG} is about") from None
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: can't be read as safetensors: {shortened(' '.join(str(error).split()), 300)}"
        ) from None


@contextlib.contextmanager
def _in_one_line(what: Path) -> Iterator[None]:
    """What peft and diffusers raise (KeyError, RuntimeError, ValueError, ...) as a line that names a file."""
    try:
        yield
    except ScorerayError as error:
        raise type(error)(f"{what}: {error}") from None
    except Exception as error:
        raise UserError(f"{what}: can't be loaded into the base's network: "
                        f"{shortened(' '.join(str(error).split()), 300)}") from None  # fmt: skip


def _read_back(network: nn.Module) -> tuple[LoRAConfig, State]:
    """What was loaded. Adapters of unlike ranks and scales get one of both: zeros behind, the scale in lora_B."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: one for name, one in network.named_modules() if isinstance(one, LoraLayer)}
    ranks = {layer.r[ADAPTER] for layer in layers.values()}
    scales = {layer.scaling[ADAPTER] for layer in layers.values()}
    rank, alike = max(ranks), len(ranks) == len(scales) == 1
    state: State = {}
    for name, layer in layers.items():
        first, second = (part[ADAPTER].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
        if not alike:
            second = second * layer.scaling[ADAPTER]
            missing = rank - len(first)
            first = torch.cat([first, first.new_zeros(missing, *first.shape[1:])])
            second = torch.cat([second, second.new_zeros(len(second), missing, *second.shape[2:])], 1)
        state |= {name + FIRST_HALF: first, name + SECOND_HALF: second}
    alpha = scales.pop() * rank if alike else None
    return LoRAConfig(rank, None if alpha == rank else alpha, tuple(layers)), state


def _write(folder: str, store: Store, base: StoredModel, lora: LoRAConfig, adapters: State) -> ModelManifest:
    settings, page = base.config.model_dump(mode="json"), base.page
    begins = {"checkpoint": base.url, "ema": "weights" if base.ema == RAW else base.ema}
    settings["optimizer"]["frozen"] = []  # of the base's own training
    config = load_config({**settings, "lora": asdict(lora), "init": begins})
    about = ModelManifest(
        folder, 0, page.image_shape, page.classes, {}, config.model_dump(mode="json"), target=page.target,
        conditions=page.conditions, lineage=base.lineage_of_lora(), own_code=page.own_code,
    )  # fmt: skip
    inside = base.config.network.wrapped_prefix
    state = {inside + name: tensor for name, tensor in adapters.items()}
    return write_lora_folder(ModelToExport(about, config, {RAW: lambda: state}), store)
