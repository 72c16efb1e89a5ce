"""`scoreray export`: a checkpoint's averages as models for inference, those that were not tracked made on Ray."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scoreray.cluster.actors import Retries, completed
from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.display import counted, say, waiting
from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.own_code import VARIABLE, py_modules
from scoreray.data.storage.store import Store, open_store
from scoreray.sampling.formats.card import CARD, SHEET, check_licence, model_card
from scoreray.sampling.formats.diffusers_folder import write_diffusers_folder
from scoreray.sampling.formats.graphs import SUFFIXES, WrittenGraph, write_graphs
from scoreray.sampling.formats.hub import export_target
from scoreray.sampling.formats.lora_folder import write_lora_folder
from scoreray.sampling.formats.usage import DIFFUSERS, LORA, SCORERAY, USAGES, Usage, usage_of
from scoreray.sampling.grids.stored import copy_grids
from scoreray.sampling.model.describe import Description, ModelInfo, describe
from scoreray.sampling.model.export import ModelToExport, check_other_place, model_to_export, write_model
from scoreray.sampling.model.load import build_model
from scoreray.sampling.offline.generate import Request, generate, png_of_sheet
from scoreray.sampling.service.answers import as_pictures
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.exported import ModelManifest
from scoreray.trainer.checkpoints.marker import page_fields
from scoreray.trainer.checkpoints.posthoc import Mix, find_mix, in_turn, reconstruct
from scoreray.trainer.optim.ema import choose_length, is_power_length, length_name

RETRIES = Retries(
    times=3, work="averaging a range of parameters", hint="is there memory for it? set RAY_ADDRESS to a larger cluster"
)
WRITERS = {SCORERAY: write_model, DIFFUSERS: write_diffusers_folder, LORA: write_lora_folder}
"""Formats that models of ours are read from; graphs are others' alone."""
ON_RAY_FROM_BYTES = 2 << 30  # of stored averages; below, starting Ray takes longer than mixing them here


@dataclass(frozen=True)
class ExportOptions:
    """How a model goes out. licence: an identifier, for its card; samples: so many on a sheet of the card;
    rows: of a graph's batch, 0: any. Raises UserError."""

    format: str = SCORERAY
    licence: str = ""
    samples: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        if self.format not in USAGES:
            raise UserError(f"--format {shortened(self.format)}: {nearest(self.format, USAGES)}")
        if self.rows and self.format not in SUFFIXES:
            raise UserError(f"--rows {self.rows}: is of graphs; --format {self.format} takes any batch")
        check_licence(self.licence)


@dataclass(frozen=True)
class Exported:
    """What was written. page: with its files; residuals: of lengths that were made of snapshots, how far their profile
    is from the one that was wanted; graphs: what each graph was found to be; usage: what loads it."""

    out: str
    page: ModelManifest
    residuals: dict[str, float]
    graphs: list[WrittenGraph]
    usage: Usage
    takes: str

    def answer(self) -> dict[str, Any]:
        graphs = {"graphs": [asdict(one) for one in self.graphs]} if self.graphs else {}
        return {"out": self.out, **page_fields(self.page), "residuals": self.residuals, **graphs}

    def text(self) -> str:
        out, page = self.out.rstrip("/"), self.page
        lines = [f"EMA {name}: {out}/{about.file} ({about.bytes / 1e6:,.1f} MB)" for name, about in page.files.items()]
        lines += [f"{one.file}: within {one.difference:.1e} of what the model gives, by {one.runtime}"
                  for one in self.graphs]  # fmt: skip
        return "\n".join([*lines, f"takes {self.takes}", *self._next()])

    def _next(self) -> list[str]:
        lines = self.usage.lines
        for path in py_modules():  # a card names packages; the command that follows on this machine, where they are
            place = shlex.quote(path).replace("\\", r"\\")
            lines = re.sub(rf"(--with |{VARIABLE}=){Path(path).stem}\b", rf"\g<1>{place}", lines)
        first, *others = lines.splitlines()
        return [f"next: {first}", *(f"      {line}" for line in others if line)]


def export_model(url: str, out: str, lengths: Sequence[str] = (), options: ExportOptions = ExportOptions()) -> Exported:
    """Export a run's newest checkpoint, a checkpoint, or a model that was exported or imported before.

    A length that a run did not track is reconstructed (`trainer/checkpoints/posthoc.py`): ranges of parameters are
    mixed as Ray tasks where RAY_ADDRESS names a cluster or there is much to read. Raises UserError, DataError,
    StorageError.
    """
    found = describe(url)
    if options.samples and found.info.is_autoencoder:
        raise UserError(f"--samples: {found.info.instead_of_denoiser}")
    if options.samples and len(found.info.sample_shape) < 2:
        shape = list(found.info.sample_shape)
        raise UserError(f"--samples: no picture can be made of samples of shape {shape}; leave it out")
    if options.samples:
        found.info.check_decodes()
    one_lora = options.format == LORA
    if one_lora and not lengths:  # of peft's folders each holds one
        lengths = [found.stored.ema]
    names = [_name(found, length) for length in lengths]
    mixes = _mixes(found, names)
    with (
        waiting("reading the weights, and writing the model"),
        export_target(out) as folder,
        _tasks(mixes.values()) as each,
    ):
        store = open_store(folder)
        source: Any = found.stored.source  # a checkpoint, where there are mixes
        check_other_place(store, found.stored)
        states = {name: partial(reconstruct, source, mix, each) for name, mix in mixes.items()}
        model = model_to_export(found.stored, names, states)
        written = model_to_export(found.stored, names, states, adapters_alone=True) if one_lora else model
        page, graphs = _write(written, store, options)
        copy_grids(found.stored.source.store, store)
        info = model.info(model.default)
        usage = usage_of(options.format, out, page, info)
        samples = _put_sheet(model, info, store, options.samples)
        store.put(CARD, model_card(page, info, usage, options.licence, samples).encode())
    return Exported(out, page, {name: mix.residual for name, mix in mixes.items()}, graphs, usage, info.takes)


def _write(model: ModelToExport, store: Store, options: ExportOptions) -> tuple[ModelManifest, list[WrittenGraph]]:
    if options.format in SUFFIXES:
        return write_graphs(model, store, options.format, options.rows)
    return WRITERS[options.format](model, store), []


def _put_sheet(model: ModelToExport, info: ModelInfo, store: Store, count: int) -> str:
    """Draws a sheet of samples for the card; returns what it shows, "" for none."""
    if not count:
        store.delete([SHEET])
        return ""
    loaded = build_model(info, model.states[info.ema]())
    request = Request(count=count).fitted(info)
    samples = torch.cat([drawn for drawn, _ in generate(loaded, request)])
    store.put(SHEET, png_of_sheet(as_pictures(info.decoded(samples), info.is_picture)))
    return f"{count} of EMA {info.ema} by {request.sampler}, {request.steps} steps, seed {request.seed}."


def _mixes(found: Description, names: Sequence[str]) -> dict[str, Mix]:
    """What lengths that the run did not track are made of, by name."""
    mixes = dict[str, Mix]()
    source = found.stored.source
    if isinstance(source, Checkpoint):
        for name in names:
            if name not in found.stored.lengths:
                mixes[name] = mix = find_mix(source, float(name))
                say(f"EMA {name}: made of the averages of {len(mix.parts)} steps, to {mix.residual:.2%} of its profile")
    return mixes


def _name(found: Description, length: str) -> str:
    """The length that is meant: one that is stored, or any number, of which an average can be made."""
    name = length_name(length, found.info.config.ema.stds)
    return name if is_power_length(name) else choose_length(name, found.stored.lengths, found.info.url)


@contextlib.contextmanager
def _tasks(mixes: Iterable[Mix]) -> Iterator[Callable[..., Any]]:
    """How to call a task for each of many inputs: in this process, or on Ray."""
    num_bytes = sum(about.bytes for mix in mixes for stored, _ in mix.parts for about in stored.marker.files.values())
    if not num_bytes or ("RAY_ADDRESS" not in os.environ and num_bytes < ON_RAY_FROM_BYTES):
        yield in_turn
        return
    with connected():
        yield on_ray


def on_ray(task: Callable[..., Any], inputs: Iterable[tuple]) -> Iterator[Any]:
    """The task's results, each called as a Ray task, in the order in which they are done."""
    import ray

    remote = ray.remote(num_cpus=1, max_retries=RETRIES.times)(task)
    ranges = list(inputs)  # all are Ray's to schedule at once: it holds back what has no CPU yet
    with counted("average", "parts", "reading the first parts") as progress:
        calls = [lambda arguments: remote.remote(*arguments)] * len(ranges)
        for done, (_, result) in enumerate(completed(calls, ranges, RETRIES), 1):
            yield result
            progress(done, len(ranges))
