"""Which encoder made a field's values, of which other field: what decodes latents again is recorded with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict
from pydantic import Field as Limits

from scoreray.data.fields.field_kinds import FieldKind

if TYPE_CHECKING:
    from torch import Tensor

CODES = "codes"
"""The kind of a model that encodes data and is no autoencoder: what it gives is kept as numbers, and not decoded."""
Finite = Annotated[float, Limits(allow_inf_nan=False)]


@dataclass(frozen=True)
class Encoding:
    """How an encoded field was made. Its values are the encoder's own, unscaled (diffusers': `latent_dist`, without
    scaling_factor); the field's normalisation scales them.

    kind: "diffusers", "scoreray", "transformers", "codes" (a denoiser or a machine of ours) or "package.module:Name".
    path: the URL or folder that the encoder was loaded from.  sha256: of its weights and config, wherever these are.
    of, of_kind, of_shape: the field that was encoded, by its name, and a sample of it, [3, 256, 256].
    moments: the first half of the channels are means, the second half standard deviations of Gaussians; a run draws
    from them, each time again.
    preview: [channels of a picture][C + 1], the least-squares linear map of a latent to a picture in [-1, 1] of the
    latent's height and width; the last entry is the constant. Empty where there is none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: Annotated[str, Limits(min_length=1, max_length=255)]
    path: str
    sha256: Annotated[str, Limits(pattern=r"^[0-9a-f]{64}$")]
    of: str
    of_kind: FieldKind
    of_shape: list[Annotated[int, Limits(gt=0)]]
    moments: bool = False
    preview: list[list[Finite]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The encoder as an option names it, "diffusers=PATH"."""
        return f"{self.kind}={self.path}"

    @property
    def can_decode(self) -> bool:
        """Whether its values are latents, which an autoencoder decodes again: not those of texts, nor codes."""
        return self.of_kind in ("image", "array") and self.kind != CODES

    def without_place(self) -> Encoding:
        """What decides the values, wherever the encoder is stored."""
        return replace(self, path="", preview=[])


def drawn(moments: Tensor, noise: Tensor) -> Tensor:
    """[B, 2C, ...] means and standard deviations, standard normal noise [B, C, ...] -> draws [B, C, ...], float32."""
    mean, std = moments.to(noise.dtype).chunk(2, dim=1)
    return mean + std * noise


def drawn_for_statistics(moments: Tensor) -> Tensor:
    """[B, 2C, ...] -> one draw of each, float32 [B, C, ...], by the same noise at every call."""
    import torch

    half = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
    return drawn(moments, torch.randn(half, generator=torch.Generator().manual_seed(0)))


def linear_preview(preview: Sequence[Sequence[float]], z: Tensor) -> Tensor:
    """The picture [B, channels of a picture, h, w] in about [-1, 1] that the linear map makes of latents."""
    import torch  # 0.9 s, which manifests need not wait for

    weights = torch.tensor(preview, dtype=z.dtype, device=z.device)
    return torch.nn.functional.conv2d(z, weights[:, :-1, None, None], weights[:, -1])
