"""Calls of encoders: batches of a decoded field to the arrays of the field that is made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scoreray.data.fields.encoding import drawn
from scoreray.data.fields.field import Field, FieldRequest, stored_dtype
from scoreray.data.reading.field_values import FieldArrays, FieldDecoder
from scoreray.data.reading.manifest import Manifest
from scoreray.data.sources.field_source import FieldValue
from scoreray.sampling.representations.encoder import ModelEncoder, load_any_encoder
from scoreray.trainer.diffusion.noise import STREAM_ENCODING, normal
from scoreray.trainer.encoders.base import MASK, VALUES, Encoder

Columns = Mapping[str, np.ndarray]
"""Arrays by the names of fields, the first axis the samples'; of what varies in length also `NAME:length`, int64."""
LENGTH = ":length"  # no field has a colon in its name


@dataclass(frozen=True)
class FieldEncoder:
    """An encoder, as KIND=PATH names it, and the field that it makes of the field `of`; the encoding of that has the
    encoder's hash.  is_drawn: of a variational autoencoder draws are stored, and not moments.  beside: fields that
    condition it."""

    name: str
    of: str
    makes: Field
    is_drawn: bool = False
    beside: tuple[FieldRequest, ...] = ()

    @property
    def requests(self) -> list[FieldRequest]:
        """What is read for it."""
        return [FieldRequest(self.of), *(one for one in self.beside if one.field != self.of)]


def as_columns(arrays: FieldArrays) -> Columns:
    return {**arrays.values, **{f"{name}{LENGTH}": lengths for name, lengths in arrays.lengths.items()}}


def empty_columns(fields: Sequence[Field], rows: int) -> dict[str, np.ndarray]:
    """Zeros for so many samples of fields that encoders make."""
    values = {one.name: np.zeros((rows, *one.shape), stored_dtype(one.dtype)) for one in fields}
    lengths = {f"{one.name}{LENGTH}": np.zeros(rows, np.int64) for one in fields if one.is_varying}
    return values | lengths


def value_of(columns: Columns, field: Field, row: int) -> FieldValue:
    """One sample's value of such a field, as it is packed."""
    value = columns[field.name][row]
    return value[: int(columns[f"{field.name}{LENGTH}"][row])] if field.is_varying else value


@dataclass(frozen=True)
class BatchEncoder:
    """Encodes samples of the data set of `manifest`, `batch_size` a call, on one CPU thread or a GPU.

    seed: of the noise of draws, which is keyed by (seed, sample's number, place of the encoder).
    """

    manifest: Manifest
    encoders: Sequence[FieldEncoder]
    batch_size: int
    seed: int
    device: str | None = None

    def __call__(self, read: Columns, first: int, count: int, rows: int) -> dict[str, np.ndarray]:
        """Columns of `rows` samples, of which the first `count` were read, and the others are zeros. first: the number
        of the first one in the data set. Raises UserError, DataError."""
        out = empty_columns([one.makes for one in self.encoders], rows)
        with _one_thread():
            for place in range(len(self.encoders)):
                for start in range(0, count, self.batch_size):
                    self._batch(place, read, first, np.arange(start, min(start + self.batch_size, count)), out)
        return out

    def _batch(self, place: int, read: Columns, first: int, rows: np.ndarray, out: dict[str, np.ndarray]) -> None:
        """Samples of these rows from `read` to `out`. The last batch is filled up with copies: kernels are chosen by
        shape, so one of another size would round otherwise."""
        one, count = self.encoders[place], len(rows)
        filled = np.pad(rows, (0, self.batch_size - count), "edge")
        assert one.makes.encoding is not None
        encoder = load_any_encoder(one.name, self.device, one.makes.encoding.sha256)
        found = self._encoded(encoder, one, read, filled, first)
        values = found[VALUES]
        if one.is_drawn:
            numbers, shape = torch.from_numpy(first + filled), tuple(one.makes.shape)
            noise = normal(self.seed, numbers, shape, stream=STREAM_ENCODING + place, device=values.device)
            values = drawn(values, noise)
        values = values[:count].to(getattr(torch, one.makes.dtype)).cpu()
        array = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        name = one.makes.name
        if one.makes.is_varying:
            out[name][rows, : array.shape[1]] = array
            out[f"{name}{LENGTH}"][rows] = found[MASK][:count].sum(1).cpu()
        else:
            out[name][rows] = array

    def _encoded(
        self, encoder: Encoder, one: FieldEncoder, read: Columns, rows: np.ndarray, first: int
    ) -> dict[str, torch.Tensor]:
        inputs = self._inputs(one.of, read, rows)
        if not isinstance(encoder, ModelEncoder):
            return encoder.encode(inputs)
        assert isinstance(inputs, torch.Tensor)
        stored, condition = encoder.conditions(self.manifest, "the data set"), None
        if stored is not None and one.beside:
            names = [request.field for request in one.beside]
            lengths = {name: read[f"{name}{LENGTH}"][rows] for name in names if f"{name}{LENGTH}" in read}
            arrays = FieldArrays({name: read[name][rows] for name in names}, lengths)
            condition = stored.of(FieldDecoder(self.manifest, one.beside).tensors(arrays))
        return {VALUES: encoder.code(inputs, torch.from_numpy(first + rows), condition)}

    def _inputs(self, of: str, read: Columns, rows: np.ndarray) -> torch.Tensor | list[str]:
        """A batch as `Encoder.encode` takes it: a tensor, or texts."""
        values, lengths = read[of][rows], read.get(f"{of}{LENGTH}")
        if self.manifest.find_field(of, "--field").kind == "text":
            assert lengths is not None
            return [row[:length].tobytes().decode() for row, length in zip(values, lengths[rows], strict=True)]
        return FieldDecoder(self.manifest, [FieldRequest(of)]).tensors(FieldArrays({of: values})).fields[of]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch inside: every process then splits a sum alike, whatever its share of the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
