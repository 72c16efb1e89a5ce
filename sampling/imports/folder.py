"""A folder that diffusers saved, a pipeline or a bare model: its JSON, and its weights by diffusers' own loader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.extras import install
from scoreray.trainer.networks.diffusers_network import CALLS

COMPONENTS = ("transformer", "unet")  # of a pipeline, where its network is
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What `Transformer2DModel`, as older folders say, is today, by its config's norm_type."""
LOADING_INFO = {
    "missing_keys": "missing",
    "unexpected_keys": "not of this network",
    "mismatched_keys": "of other shapes",
}
MOST_LISTED = 10


@dataclass(frozen=True)
class PretrainedFolder:
    """path: where the network's config.json is.  scheduler, vae: their configs, empty where the folder has none.
    classes: by number, as a pipeline names them."""

    path: Path
    class_name: str
    config: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def open(folder: str, scheduler: str | None = None) -> PretrainedFolder:
        """scheduler: a scheduler_config.json, or its folder, in the place of the pipeline's.

        Raises UserError (no such folder, a class that is not known, no weights in safetensors), DataError (bad JSON).
        """
        root = Path(folder)
        if not root.is_dir():
            raise UserError(f"{folder}: no such folder; give one that save_pretrained of diffusers wrote")
        index = read_json(root / "model_index.json")
        path = next((root / name for name in COMPONENTS if name in index and (root / name).is_dir()), root)
        config = read_json(path / "config.json")
        if not config:
            raise UserError(f"{folder}: has no {path.name}/config.json beside model_index.json" if index else
                            f"{folder}: has neither model_index.json nor config.json; give a folder that "
                            "save_pretrained of diffusers wrote")  # fmt: skip
        name = str(config.get("_class_name"))
        if name == "Transformer2DModel":
            name = LEGACY.get(str(config.get("norm_type")), name)
        if name not in CALLS:
            raise UserError(f"{path / 'config.json'}: _class_name '{shortened(name)}': {nearest(name, CALLS)}")
        return PretrainedFolder(
            path,
            name,
            {key: value for key, value in config.items() if not key.startswith("_")},
            _scheduler(root, scheduler),
            read_json(root / "vae" / "config.json"),
            _classes(root, index.get("id2label") or {}),
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's state in float32. Raises UserError (no safetensors), DataError (not those of this config)."""
        try:
            import diffusers
        except ImportError:
            raise UserError(f"import diffusers needs diffusers: {install('diffusers')}") from None
        variant = self._variant()
        try:
            network, info = getattr(diffusers, self.class_name).from_pretrained(
                str(self.path), variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True,
                low_cpu_mem_usage=False, ignore_mismatched_sizes=True, torch_dtype=torch.float32,
            )  # fmt: skip
        except (
            Exception
        ) as error:  # the library raises what its readers raise: OSError, SafetensorError, ValueError, ...
            reason = shortened(" ".join(str(error).split()), 300)
            raise DataError(f"{self.path}: {self.class_name} of diffusers can't load it: {reason}") from None
        wrong = [listed(what, info[key]) for key, what in LOADING_INFO.items() if info[key]]
        if wrong:
            raise DataError(f"{self.path}: weights and config.json do not fit: {'; '.join(wrong)}")
        return network.state_dict()

    def _variant(self) -> str | None:
        """Of diffusion_pytorch_model.<variant>.safetensors: none where the plain one is there."""
        files = sorted(file.name for file in self.path.iterdir())
        found = [name for name in files if name.endswith(".safetensors")]
        if not found:
            for name in files:
                refuse_pickle(self.path / name)
            raise UserError(
                f"{self.path}: has config.json but no weights; diffusion_pytorch_model.safetensors belongs there"
            )
        variants = {name.removeprefix("diffusion_pytorch_model").removesuffix(".safetensors") for name in found}
        plain = [text for text in variants if not text or text.startswith("-")]  # -00001-of-00002: a part of many
        if plain:
            return None
        named = sorted(text.lstrip(".").split("-")[0] for text in variants if text.startswith("."))
        if not named:
            raise UserError(f"{self.path / found[0]}: is named otherwise than diffusers names weights; rename it to "
                            "diffusion_pytorch_model.safetensors")  # fmt: skip
        return named[0]


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a file that is named as one, whatever is in it."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: is a pickle, which can run code when it is read, and is refused; where you trust it, write it as "
            "safetensors (docs/pretrained.md has the lines that do)"
        )


def _scheduler(root: Path, given: str | None) -> dict[str, Any]:
    if given is not None:
        path = Path(given)
        path = path / "scheduler_config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--scheduler {given}: no such file; give a scheduler_config.json")
        return read_json(path)
    places = (root / "scheduler", root, root.parent / "scheduler")  # the last: of a pipeline whose unet/ was given
    return next((found for place in places if (found := read_json(place / "scheduler_config.json"))), {})


def _classes(root: Path, id2label: Any) -> dict[int, str]:
    try:
        return {int(number): str(name) for number, name in id2label.items()}
    except (AttributeError, ValueError):
        raise DataError(f"{root / 'model_index.json'}: id2label does not name classes by number") from None


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises DataError."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no JSON object")
    return found


def listed(what: str, found: Sequence[str | tuple[Any, ...]]) -> str:
    """found: names of tensors, or (name, shape in the file, shape in the network)."""
    names = sorted(one if isinstance(one, str) else str(one[0]) for one in found)
    more = f", ... ({len(names):,} in all)" if len(names) > MOST_LISTED else ""
    return f"{what}: {', '.join(names[:MOST_LISTED])}{more}"
