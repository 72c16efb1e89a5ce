"""Feature extractors of pictures of the transformers library: a vector of each patch, or one of the picture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.fields.normalisation import to_unit_range
from scoreray.trainer.encoders.base import MASK, VALUES, Encoder
from scoreray.trainer.encoders.files import digest
from scoreray.trainer.networks.pretrained_folder import load_pretrained, read_json

CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "vit": "ViTModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip": "SiglipVisionModel",
}
"""By model_type of config.json. Their last hidden states are a vector of each patch, row by row, after those of the
class and of registers, if they have any."""
PROCESSOR = "preprocessor_config.json"
FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers, as `resample` has them


class VisionEncoder(Encoder):
    """Pictures [C, H, W] to a sequence [L, F] of patches' last hidden states, in the order of the patches, or to the
    pooled vector [F].

    The whole picture is resized, so that a patch is the same part of it as a token of a transformer is of its latents:
    image processors' crops would cut its border off. side: of its shorter side in pixels; None: what the folder's
    preprocessor_config.json ends in, which has the mean and std of each channel too.
    """

    kind = "transformers"

    def __init__(self, path: str, folder: Path, class_name: str, *, pooled: bool, side: int | None):
        """Raises UserError (no preprocessor_config.json, a side that is no multiple of the patch), DataError."""
        import transformers

        self.path, self.is_pooled = path, pooled
        processor = read_json(folder / PROCESSOR)
        if not processor:
            raise UserError(f"{self.name}: has no {PROCESSOR}, which says the mean, std and size of pictures; save the "
                            "image processor there with its save_pretrained")  # fmt: skip
        self.sha256 = digest(folder, [folder / PROCESSOR])
        of_class: Any = getattr(transformers, class_name)
        options = {"add_pooling_layer": pooled} if class_name == "ViTModel" else {}  # many ViTs are stored without it
        self.module = (
            load_pretrained("transformers", of_class, folder, "model", whole=False, dtype=torch.float32, **options)
            .requires_grad_(False)
            .eval()
        )
        config: Any = self.module.config
        config = getattr(config, "vision_config", config)
        self.patch, self.channels = config.patch_size, config.num_channels
        with_projection = pooled and class_name.endswith("WithProjection")
        self.width = config.projection_dim if with_projection else config.hidden_size
        try:
            self._normalise = _normalisation(processor, self.channels)
            self.side = side or _side(processor)
            self._filter = FILTERS[processor.get("resample", 3)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.name}: {PROCESSOR}: can't be read as an image processor's: {error!r}") from None
        if self.side % self.patch:
            below = max(1, self.side // self.patch) * self.patch
            raise UserError(
                f"{self.name}: pictures of {self.side} pixels a side are not cut into patches of {self.patch}; name a "
                f"multiple of it: FOLDER:{below}"
            )
        # Positions are interpolated where pictures are of another size than the extractor was trained at.
        takes = inspect.signature(of_class.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def output(self, field: Field) -> Field:
        self.check_pictures(field, (self.channels, 1))
        height, width = self._resized(field)
        kind, shape = "vector", [self.width]
        if not self.is_pooled:
            kind, shape = "sequence", [height // self.patch * (width // self.patch), self.width]
        return Field(field.name, kind, shape, "float16", "", encoding=self.encoding(field))  # type: ignore[arg-type]

    def _resized(self, field: Field) -> tuple[int, int]:
        """Height and width of a field's pictures as the extractor sees them. Raises UserError."""
        height, width = field.shape[1:]
        long, rest = divmod(self.side * max(height, width), min(height, width))
        if rest or long % self.patch:
            raise UserError(
                f"--field {field.name}: pictures of {height}x{width}, of which {self.name} sees {self.side} pixels at "
                f"the shorter side, do not come to whole patches of {self.patch} at the longer one; name another side, "
                "FOLDER:N, or pack them square"
            )
        return (long, self.side) if height > width else (self.side, long)

    @torch.no_grad()
    def encode(self, batch: Any) -> dict[str, Tensor]:
        pixels = to_unit_range(torch.as_tensor(batch).to(self.device)).float()
        pixels = self._pixels(pixels.expand(-1, self.channels, -1, -1))
        found = self.module(pixel_values=pixels, **self._options)
        if self.is_pooled:
            pooled = found.image_embeds if "image_embeds" in found else found.pooler_output
            return {VALUES: pooled.float()}
        patches = pixels.shape[2] // self.patch * (pixels.shape[3] // self.patch)
        values = found.last_hidden_state[:, -patches:].float()
        return {VALUES: values, MASK: torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)}

    def _pixels(self, pictures: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1], resized and normalised."""
        height, width = pictures.shape[2:]
        scale = self.side / min(height, width)
        size, pictures = (round(height * scale), round(width * scale)), (pictures + 1) / 2
        if size != (height, width):
            smooth = {} if self._filter == "nearest-exact" else {"antialias": True}
            pictures = torch.nn.functional.interpolate(pictures, size, mode=self._filter, **smooth).clamp(0, 1)
        mean, std = self._normalise.to(pictures.device)[:, None, :, None, None]
        return (pictures - mean) / std


def _normalisation(processor: Mapping[str, Any], channels: int) -> Tensor:
    """[2, C], mean and std of pictures in [0, 1]. Raises as torch and mappings do."""
    if not processor.get("do_normalize", True):
        return torch.tensor([[0.0] * channels, [1.0] * channels])
    found = torch.tensor([processor["image_mean"], processor["image_std"]], dtype=torch.float32)
    if found.shape != (2, channels) or not bool((found[1] > 0).all()):
        raise ValueError(f"image_mean, image_std {found.tolist()}")
    return found


def _side(processor: Mapping[str, Any]) -> int:
    """Of the pictures that a processor makes. Raises as mappings do."""
    size = processor["crop_size"] if processor.get("do_center_crop") else processor["size"]
    if isinstance(size, Mapping):
        size = size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])
    return int(size)
