"""A folder that diffusers saved, a pipeline or a bare model: its JSON, and its weights by diffusers' own loader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.extras import check_installed
from scoreray.trainer.networks.diffusers_network import CALLS
from scoreray.trainer.networks.pretrained_folder import DIFFUSERS_OPTIONS, WEIGHTS, load_pretrained, read_json

COMPONENTS = ("transformer", "unet")  # of a pipeline, where its network is
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What `Transformer2DModel`, as older folders say, is today, by its config's norm_type."""


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
        if index.get("requires_aesthetics_score"):
            raise UserError(f"{folder}: is SDXL's refiner, which takes an aesthetic score; its base is supported")
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
        check_installed("diffusers", "import diffusers", "diffusers")
        import diffusers

        of_class = getattr(diffusers, self.class_name)
        loaded = load_pretrained("diffusers", of_class, self.path, WEIGHTS, **DIFFUSERS_OPTIONS)
        return loaded.state_dict()


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
