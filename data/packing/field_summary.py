"""What each field of a data set holds: statistics of its channels, a histogram, lengths, the longest texts, classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from scoreray.data.fields.encoding import drawn_for_statistics
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.samples import SampleReader, spread

LOOKED_AT, LOOKED_AT_BYTES = 256, 64 << 20  # samples that are read, and their bytes decoded
BINS = 16
CHANNELS = 8  # of which a histogram is made
LONGEST = 3  # texts that are shown
MOST_CLASSES = 16
MOST_SHOWN = 200  # characters of one
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Lengths:
    """Of sequences in tokens, of text in bytes, among the samples that were read; `most`: of the whole data set."""

    least: int
    median: int
    upper: int  # 95% are not longer
    most: int


@dataclass(frozen=True)
class FieldSummary:
    """mean, std, low, high: of each channel, over the whole data set, in its own units. histogram: of each of the first
    CHANNELS channels, samples' values in BINS equal parts of [low, high]; longest: texts. Both are of the samples that
    were read. encoding: which encoder made the values of which field. Of moments all is of what is drawn from them, low
    and high of the draws from the samples that were read, as the manifest has those of means."""

    name: str
    kind: str
    shape: list[int]
    dtype: str
    member: str
    normalisation: str
    mean: list[float]
    std: list[float]
    low: list[float]
    high: list[float]
    histogram: list[list[int]] = field(default_factory=list)
    lengths: Lengths | None = None
    longest: list[str] = field(default_factory=list)
    class_counts: dict[str, int] = field(default_factory=dict)
    encoding: str = ""


def field_summaries(samples: SampleReader) -> list[FieldSummary]:
    """Of every field, in the order in which a sample's members are stored. Raises DataError, StorageError."""
    manifest = samples.manifest
    wanted = [FieldRequest(one.name) for one in manifest.fields if one.kind != "json"]
    most = LOOKED_AT_BYTES // max(1, FieldDecoder(manifest, wanted).bytes_per_sample)
    numbers = spread(max(1, min(LOOKED_AT, most)), manifest.num_samples)
    found = samples.read_fields(numbers, wanted)
    return [_summary(one, found.fields.get(one.name), found.masks.get(one.name)) for one in manifest.fields]


def _summary(one: Field, values: torch.Tensor | None, mask: torch.Tensor | None) -> FieldSummary:
    if values is not None and one.holds_moments:
        values = drawn_for_statistics(values)
        channels = values.movedim(1, 0).flatten(1)
        one = replace(one, low=channels.amin(1).tolist(), high=channels.amax(1).tolist())
    known: dict[str, Any] = {
        "name": one.name, "kind": one.kind, "shape": one.shape, "dtype": one.dtype, "member": one.member,
        "normalisation": one.normalisation, "mean": one.mean, "std": one.std, "low": one.low, "high": one.high,
    }  # fmt: skip
    if one.kind == "class":
        known["class_counts"] = dict(zip(one.classes, one.class_counts, strict=True))
    elif values is not None and mask is not None:
        lengths = np.sort(mask.sum(1).numpy())
        upper = int(lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))])
        known["lengths"] = Lengths(int(lengths[0]), int(np.median(lengths)), upper, one.shape[0])
        if one.kind == "text":
            longest = torch.argsort(mask.sum(1), descending=True, stable=True)[:LONGEST].tolist()
            texts = [bytes(values[i][mask[i]].tolist()).decode(errors="replace") for i in longest]
            known["longest"] = [text[:MOST_SHOWN] for text in texts]
    if values is not None and one.kind not in ("class", "text"):
        known["histogram"] = _histograms(one, values if mask is None else values[mask][None])
    if one.encoding is not None:
        known["encoding"] = f"{'moments ' * one.holds_moments}by {one.encoding.name} of {one.encoding.of}"
    return FieldSummary(**known)


def _histograms(one: Field, values: torch.Tensor) -> list[list[int]]:
    """values: [n, C, ...], or of a sequence [1, tokens, C]."""
    axis = 2 if one.kind == "sequence" else 1
    channels = values.double().movedim(axis, 0).flatten(1).numpy()[:CHANNELS]
    found = []
    for number, channel in enumerate(channels):
        ends = (one.low[number], one.high[number]) if one.low else (channel.min(initial=0), channel.max(initial=0))
        # From 0 to 1: NumPy refuses bins narrower than the steps between floats, as of values near 2**63.
        spread = ends[1] - ends[0]
        scaled = (channel - ends[0]) / (spread or 1.0)
        found.append(np.histogram(scaled, BINS, (0.0, 1.0) if spread else (-0.5, 0.5))[0].tolist())
    return found


def field_lines(one: FieldSummary) -> list[str]:
    """For a person: what kind of field it is, then a line for each thing that is known of its values."""
    shape = f" [{', '.join(map(str, one.shape))}]" if one.shape else ""
    scaled = f", normalised by {one.normalisation}" if one.normalisation != "none" else ""
    member = f", in .{one.member}" if one.member else ""
    found = [f"{one.kind}{shape} {one.dtype}{member}{scaled}"]
    if one.encoding:
        found.append(one.encoding)
    for number, counts in enumerate(one.histogram):
        known = {"mean": one.mean, "std": one.std, "least": one.low, "largest": one.high}
        about = ", ".join(f"{name} {values[number]:.4g}" for name, values in known.items() if values)
        found.append(f"channel {number}: |{bars(counts)}| {about}")
    if len(one.mean) > len(one.histogram) > 0:
        found.append(f"... ({len(one.mean):,} channels in all)")
    if one.lengths:
        unit = "bytes" if one.kind == "text" else "tokens"
        n = one.lengths
        found.append(f"{n.least:,} to {n.most:,} {unit}, half have up to {n.median:,}, 95% up to {n.upper:,}")
    found += [f'"{text}"' for text in one.longest]
    if one.class_counts:
        classes = [f"{name} {count:,}" for name, count in list(one.class_counts.items())[:MOST_CLASSES]]
        more = [f"... ({len(one.class_counts):,} in all)"] if len(one.class_counts) > MOST_CLASSES else []
        found.append(", ".join(classes + more))
    return found


def bars(counts: Sequence[int]) -> str:
    """A histogram of one line."""
    largest = max(counts, default=0) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // largest)] for count in counts)
