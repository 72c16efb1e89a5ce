"""What every encoder has: which field it makes of another, and its values; of an autoencoder, the way back too."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field import Field
from scoreray.data.fields.normalisation import to_unit_range

VALUES, MASK = "values", "mask"


class Encoder(ABC):
    """kind, path: as an option names it, KIND=PATH, but for a folder of this machine, which is from its root.
    sha256: of its weights and config, wherever they are stored.  module: all of its weights, in eval mode."""

    kind: str
    path: str
    sha256: str
    module: torch.nn.Module

    @property
    def name(self) -> str:
        return f"{self.kind}={self.path}"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters(), torch.empty(0)).device

    def to(self, device: torch.device | str) -> Self:
        self.module.to(device)
        return self

    @abstractmethod
    def output(self, field: Field) -> Field:
        """What it makes of a field: kind, shape, dtype, normalisation and encoding; name and member are those of the
        field. Raises UserError where it can't encode this one: of another kind, other channels, a size that is no
        multiple, encoded already."""

    @abstractmethod
    def encode(self, batch: Any) -> dict[str, Tensor]:
        """VALUES [B, ...] of a batch of decoded values of the field: a tensor [B, ...], or texts. Of a sequence also
        MASK bool [B, L], where tokens are. On `device`, in float32."""

    def encoding(self, field: Field, *, moments: bool = False) -> Encoding:
        """The record of what it makes of a field."""
        return Encoding(self.kind, self.path, self.sha256, field.name, field.kind, list(field.shape), moments)

    def refuse_encoded(self, field: Field) -> None:
        if field.encoding is not None:
            raise UserError(
                f"--field {field.name}: was made by {field.encoding.name} from '{field.encoding.of}' already; name a "
                "field that no encoder has made"
            )

    def check_pictures(self, field: Field, channels: Sequence[int]) -> None:
        """Raises UserError unless a field is of images, or arrays in [-1, 1], [C, height, width] with C one of
        `channels`, and no encoder has made it."""
        self.refuse_encoded(field)
        what = f"--field {field.name}: {self.name} encodes"
        if field.kind not in ("image", "array") or len(field.shape) != 3:
            raise UserError(f"{what} images, [channels, height, width]; the field is {field.kind} {field.shape}")
        if field.shape[0] not in channels:
            raise UserError(f"{what} {' or '.join(map(str, channels))} channels, and the field has {field.shape[0]}")
        if field.kind == "array" and max(map(abs, (*field.low, *field.high)), default=1.0) > 1.01:
            raise UserError(f"{what} values in [-1, 1], and the field's go from {min(field.low)} to {max(field.high)}")


class Autoencoder(Encoder):
    """Pictures or arrays [C, H, W] to latents [c, H / factor, W / factor], and back.

    channels, latent_channels: C and c.  is_variational: it encodes to Gaussians, so latents are drawn from moments.
    """

    channels: int
    latent_channels: int
    factor: int
    is_variational: bool

    @abstractmethod
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] in [-1, 1] -> mean and standard deviation [B, c, h, w] of the latents; 0 where it is not
        variational."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents [B, c, h, w] -> [B, C, H, W] in about [-1, 1], in z's dtype and on its device."""

    def output(self, field: Field) -> Field:
        """Latents as float16: of a variational one, moments; `without_moments` is the field of draws or means."""
        self.check_pictures(field, (self.channels,))
        size = field.shape[1:]
        if any(length % self.factor for length in size):
            raise UserError(
                f"--field {field.name}: {self.name} encodes sizes that are multiples of {self.factor}, and the field's "
                f"samples are {size[0]}x{size[1]}; pack them at another --image-size"
            )
        shape = [self.latent_channels * (1 + self.is_variational), *(length // self.factor for length in size)]
        return Field(
            field.name, "array", shape, "float16", "",
            normalisation="channel", encoding=self.encoding(field, moments=self.is_variational),
        )  # fmt: skip

    def encode(self, batch: Any) -> dict[str, Tensor]:
        mean, std = self.moments(to_unit_range(torch.as_tensor(batch).to(self.device)))
        return {VALUES: torch.cat([mean, std], 1).float() if self.is_variational else mean.float()}

    def decoded_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Of what latents of a shape decode to. Raises UserError for other channels."""
        if len(latent_shape) != 3 or latent_shape[0] != self.latent_channels:
            raise UserError(
                f"{self.name}: decodes latents of {self.latent_channels} channels, [{self.latent_channels}, height, "
                f"width], and these are {list(latent_shape)}"
            )
        return (self.channels, *(length * self.factor for length in latent_shape[1:]))


def without_moments(field: Field) -> Field:
    """The field of draws, or of means alone, in the place of one of moments."""
    if not field.holds_moments or field.encoding is None:
        return field
    return replace(field, shape=field.drawn_shape, encoding=replace(field.encoding, moments=False))


def fit_preview(latents: Tensor, pictures: Tensor) -> list[list[float]]:
    """`Encoding.preview` by least squares: of unscaled latents [N, C, h, w], and the pictures in [-1, 1] [N, c, H, W]
    that they are of."""
    height, width = latents.shape[2:]
    pictures = torch.nn.functional.adaptive_avg_pool2d(pictures.double(), (height, width))
    inputs = latents.double().movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    # The ridge decides where there are fewer values than channels, and changes nothing else that can be seen.
    ridge = 1e-6 * math.sqrt(len(inputs)) * torch.eye(inputs.shape[1], dtype=torch.float64, device=inputs.device)
    outputs = pictures.movedim(1, -1).flatten(0, -2)
    outputs = torch.cat([outputs, outputs.new_zeros(len(ridge), outputs.shape[1])])
    return torch.linalg.lstsq(torch.cat([inputs, ridge]), outputs).solution.T.tolist()
