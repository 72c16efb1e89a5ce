"""A trained model as an encoder of `scoreray encode` and `scoreray data encode`: what `codes.py` makes of a field."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import CODES
from scoreray.data.fields.field import TARGETS, Field
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.load import LoadedMachine, load_described
from scoreray.sampling.model.stored_conditions import StoredConditions
from scoreray.sampling.representations.codes import CodeOptions, decode, encode
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.encoders.base import VALUES, Encoder
from scoreray.trainer.encoders.files import absolute
from scoreray.trainer.encoders.load import ENCODERS, load_encoder
from scoreray.trainer.encoders.scoreray import ScorerayAutoencoder
from scoreray.trainer.step import to_model_range


class ModelEncoder(Encoder):
    """A denoiser or a machine, at its first EMA length. path: its URL; `?NAME=VALUE,...` after it are CodeOptions."""

    kind = CODES

    def __init__(self, path: str) -> None:
        """Raises UserError (nothing there, no such option), DataError, StorageError."""
        url, question, options = path.partition("?")
        self.options = CodeOptions.parse(options, f"scoreray={path}")
        self.path = absolute(url) + question + options
        found = describe(url)
        self.options.check_fits(found.info, f"scoreray={path}")
        if found.info.instead_of_mean and not self.options.layer:
            raise UserError(
                f"scoreray={path}: codes are ends of the ODE upwards; {found.info.instead_of_mean}; give layer"
            )
        self.model = load_described(found, "cpu")
        self.module, self.info = self.model, found.info
        self.sha256 = hashlib.sha256(f"{found.sha256} {sorted(asdict(self.options).items())}".encode()).hexdigest()

    def output(self, field: Field) -> Field:
        """Of the ODE, an array of the field's shape; else a vector: of hidden units, or of a layer's channels."""
        if field.kind not in TARGETS or (tuple(field.drawn_shape) or (1,)) != self.info.image_shape:
            raise UserError(
                f"--field {field.name}: {self.name} is a model of samples {list(self.info.image_shape)}, and the field "
                f"is {field.kind} {field.drawn_shape}"
            )
        code = encode(self.model, torch.zeros(1, *self.info.image_shape), torch.zeros(1, dtype=torch.int64), None,
                      self.options)  # fmt: skip
        shape = list(code.shape[1:])
        return Field(
            field.name, "vector" if len(shape) == 1 else "array", shape, "float16", "", encoding=self.encoding(field)
        )

    def conditions(self, manifest: Manifest, where: str) -> StoredConditions | None:
        """What of the data set conditions it; None of what takes none. Raises UserError where a field does not fit."""
        if isinstance(self.model, LoadedMachine) or not (self.options.conditions and self.info.conditions):
            return None
        return StoredConditions(self.info, manifest.fields, where)

    def encode(self, batch: Any) -> dict[str, Tensor]:
        return {VALUES: self.code(batch, torch.arange(len(batch)))}

    def code(self, batch: Tensor, numbers: Tensor, condition: Condition | None = None) -> Tensor:
        """Codes [B, ...] of decoded values of the field, moments by their means; arguments as of `codes.encode`."""
        target = self.info.target
        if target is not None and target.holds_moments:
            batch = batch[:, : batch.shape[1] // 2]
        x0 = to_model_range(batch, None if target is None else target.normaliser).to(self.device)
        given = None if condition is None else condition.to(self.device)
        x0 = x0.view(len(x0), *self.info.image_shape)
        return encode(self.model, x0, numbers.to(self.device), given, self.options)

    def decode(self, code: Tensor, condition: Condition | None = None) -> Tensor:
        """Samples in the model's range [B, *image_shape] of its codes."""
        given = None if condition is None else condition.to(self.device)
        return decode(self.model, code.to(self.device), given, self.options)


def _scoreray(path: str) -> Encoder:
    """What `scoreray=PATH` names: an autoencoder, or any other model."""
    if "?" in path or not describe(path).info.is_autoencoder:
        return ModelEncoder(path)
    return ScorerayAutoencoder(path)


KINDS: Mapping[str, Callable[[str], Encoder]] = {**ENCODERS, "scoreray": _scoreray, CODES: ModelEncoder}
"""Every encoder of a data set by kind: those that the trainer loads too, and models that need samplers to encode."""


def load_any_encoder(name: str, device: torch.device | str | None = None, sha256: str | None = None) -> Encoder:
    """`load_encoder` of any of KINDS."""
    return load_encoder(name, device, sha256, kinds=KINDS)
