"""What samples begin from where a flow's source is a data set (`objective.source: {kind: data}`): its samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.reading.order import Order
from scoreray.data.reading.samples import SampleReader
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.config.run_fields import TargetField, run_fields
from scoreray.trainer.diffusion.augmentation import NO_AUGMENTATION
from scoreray.trainer.flows.sources import interpolant
from scoreray.trainer.source_data import source_config
from scoreray.trainer.step import modelled


@dataclass(frozen=True)
class SourceStarts:
    """Samples of a packed data set, scaled as those that the run was trained from.

    in_order: sample i begins at record i; else at the i-th of an order of all records that the request's seed decides.
    """

    reader: SampleReader
    target: TargetField
    gamma: float
    in_order: bool

    @staticmethod
    def of(info: ModelInfo, url: str | None) -> SourceStarts | None:
        """url: a data set to take in the place of the run's own. None of a model that begins from noise. Raises
        UserError where a data set does not fit the model, DataError, StorageError."""
        own = source_config(info.config)
        if own is None:
            if url is not None:
                raise UserError(f"--source {url}: this model begins from noise; leave it out")
            return None
        trained = SampleReader(str(own.data.url))
        fields, reader = run_fields(own.data, trained.manifest), trained if url is None else SampleReader(url)
        found = next((one for one in reader.manifest.fields if one.name == fields.target.name), None)
        if found is None or tuple(found.drawn_shape) != info.image_shape:
            raise UserError(
                f"--source {reader.url}: must have a field '{fields.target.name}' of shape {list(info.image_shape)}, "
                "as the data set that the run was trained from"
            )
        return SourceStarts(reader, fields.target, own.objective.source.gamma, url is not None)  # type: ignore[union-attr]

    @staticmethod
    def sha256(info: ModelInfo, url: str | None) -> str:
        """Of the manifest of the data set that samples begin at; "" where they begin from noise. Raises as `of`."""
        starts = SourceStarts.of(info, url)
        return "" if starts is None else starts.reader.sha256

    def at(self, seeds: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """States [b, ...] at noise level `sigma` of samples with these seeds, on the device of `noise` [b, ...]."""
        given, total = seeds.cpu().numpy(), self.reader.manifest.num_samples
        numbers = given & 0xFFFFFFFF
        if self.in_order:
            records = numbers % total
        else:
            order = Order([total], seed=int(given[0]) >> 32, num_lanes=1, shuffle_block=total)
            records = order.samples(numbers)
        ascending, rows = np.unique(records, return_inverse=True)
        name = self.target.name
        values = self.reader.read_fields(ascending, [FieldRequest(name)]).fields[name][torch.from_numpy(rows)]
        x1 = modelled(
            values, torch.from_numpy(numbers), 0, NO_AUGMENTATION, self.target.normaliser, self.target.holds_moments
        ).to(noise)
        return interpolant(torch.zeros_like(x1), x1, torch.as_tensor(sigma), self.gamma, noise)[0]
