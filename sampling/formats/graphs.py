"""The denoiser D(x, sigma, condition) as a graph for inference elsewhere: ONNX, or torch.export's.

<out>/ema-0.050.onnx     inputs x [B, ...], sigma [B], and for each condition condition_NAME [B, ...] (a class int64, -1
                         for none; text its bytes, uint8) and mask_NAME (bool, [B, L] of sequences and text, else [B],
                         False where there is none; classes have no mask); output denoised [B, ...]
<out>/ema-0.050.pt2      the same for `torch.export.load(file).module()(x, sigma, {"condition_NAME": ..., ...})`
<out>/denoiser.json      config, shapes, classes and each file's SHA-256, as in model.json; sealed, written last

B is any number of rows; up to 63 of diffusers' U-Nets; or the one number that was given, for somebody else's code that
takes no other. Each graph is run before it is stored, and compared with the denoiser that it was made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError, shortened
from scoreray.data.extras import check_installed
from scoreray.data.scratch import scratch_folder
from scoreray.data.storage.store import Store
from scoreray.sampling.model.export import ModelToExport, file_name
from scoreray.sampling.model.load import LoadedDenoiser, build_model
from scoreray.trainer.checkpoints.exported import ExportedFile, ModelManifest
from scoreray.trainer.checkpoints.unfinished import being_written
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.diffusion.condition_shapes import example_condition
from scoreray.trainer.diffusion.denoiser import like
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig

DENOISER_JSON = "denoiser.json"
ONNX, TORCH_EXPORT = "onnx", "torch-export"
SUFFIXES = {ONNX: ".onnx", TORCH_EXPORT: ".pt2"}
CHECKED_ROWS = (1, 3)
DIFFUSERS_UNET_ROWS = 63  # its upsampling takes another path from 64 rows on, and a graph holds one
TOLERANCE = 1e-3  # of a graph's denoised from ours, in units of sigma_data; what was seen is 1e-6

Run = Callable[[dict[str, Tensor]], Tensor]
"""A stored graph: its inputs by name -> denoised."""


class GraphDenoiser(nn.Module):
    """(x [B, ...], sigma [B], a tensor for each condition and mask by name; None without any) -> denoised [B, ...]."""

    def __init__(self, denoiser: LoadedDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, given: dict[str, Tensor] | None = None) -> Tensor:
        names = self.denoiser.info.network_conditions if given else {}
        given = given or {}
        values = {name: given[f"condition_{name}"] for name in names}
        masks = {name: given[f"mask_{name}"] for name in names if f"mask_{name}" in given}
        return self.denoiser.denoise(x, sigma, Condition(values, masks) if values else None)


def graph_inputs(denoiser: LoadedDenoiser, rows: int) -> dict[str, Tensor]:
    """Of so many samples at noise levels all over the process's range, by name."""
    info = denoiser.info
    low, high = info.sigma_range
    sigma = torch.logspace(0, 1, rows, base=high / low) * low
    x = torch.randn(rows, *info.image_shape, generator=torch.Generator().manual_seed(0))
    given = example_condition(info.network_conditions, rows)
    inputs = {"x": x * like((sigma**2 + denoiser.sigma_data**2).sqrt(), x), "sigma": sigma}
    if given is not None:
        inputs |= {f"condition_{name}": value for name, value in given.values.items()}
        inputs |= {f"mask_{name}": mask for name, mask in given.masks.items()}
    return inputs


@dataclass(frozen=True)
class WrittenGraph:
    """A stored graph, and how far what it gave was from the denoiser's own: the greatest difference of a value."""

    length: str
    file: str
    difference: float
    runtime: str


def write_graphs(
    model: ModelToExport, store: Store, format: str, rows: int = 0
) -> tuple[ModelManifest, list[WrittenGraph]]:
    """Writes a graph for each EMA length, of any number of rows, or of `rows`; returns denoiser.json and what each was
    found to be.

    Raises UserError where a network can't be a graph, or what a graph gives is not what the denoiser gives.
    """
    files, written = dict[str, ExportedFile](), []
    with being_written(store, DENOISER_JSON) as folder:
        for length, weights in model.states.items():
            denoiser = _denoiser(model, length, weights(), format)
            name = f"{file_name(length)}{SUFFIXES[format]}"
            with scratch_folder() as scratch:
                run, runtime = _saved(denoiser, scratch / name, format, rows)
                written.append(WrittenGraph(length, name, _difference(denoiser, run, format, rows), runtime))
                paths = sorted(scratch.iterdir())  # a graph above 2 GB has its weights in a second file
                folder.lists(path.name for path in paths)
                for path in paths:
                    store.put(path.name, path)
                files[length] = _described(scratch / name)
        page = replace(model.page, files=files)
        folder.commit(page.to_json())
    return page, written


def _denoiser(model: ModelToExport, length: str, weights: dict[str, Tensor], format: str) -> LoadedDenoiser:
    """On the CPU. Raises UserError for one that can't be a graph."""
    info = model.info(length)
    loaded = build_model(info, weights, "cpu")
    if not isinstance(loaded, LoadedDenoiser):
        raise UserError(f"{info.url}: nothing to export as {format}: {info.instead_of_denoiser}; leave --format out")
    if loaded.readout is not None:
        raise UserError(
            f"{info.url}: denoiser.parameterization '{loaded.parameterization}' differentiates an energy in every "
            f"call, which {format} can't hold; --format diffusers and scoreray can"
        )
    return loaded


def _saved(denoiser: LoadedDenoiser, path: Path, format: str, rows: int) -> tuple[Run, str]:
    """Exports and saves the graph; returns what runs the saved file, and by which name and version."""
    inputs = graph_inputs(denoiser, rows or 2)
    args, shapes = _arguments(inputs), None if rows else _any_rows(denoiser, list(inputs))
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(GraphDenoiser(denoiser), args, dynamic_shapes=shapes)
    except Exception as error:  # of any kind: an own network's forward may do what a graph can't hold
        raise UserError(f"{denoiser.info.url}: {_cant(denoiser, format, error)}") from error
    if format == TORCH_EXPORT:
        torch.export.save(program, path)
        module = torch.export.load(path).module()
        return lambda inputs: module(*_arguments(inputs)), f"torch {torch.__version__}"
    return _saved_as_onnx(denoiser, program, path, list(inputs))


def _any_rows(denoiser: LoadedDenoiser, names: list[str]) -> tuple[dict[Any, Any], ...]:
    """torch.export's word for inputs of any number of rows."""
    network = denoiser.info.config.network
    upsamples = isinstance(network, DiffusersNetworkConfig) and network.class_name.startswith("UNet")
    rows = torch.export.Dim("batch", max=DIFFUSERS_UNET_ROWS if upsamples else None)
    given = {name: {0: rows} for name in names[2:]}
    return ({0: rows}, {0: rows}, given) if given else ({0: rows}, {0: rows})


def _arguments(inputs: dict[str, Tensor]) -> tuple[Tensor | dict[str, Tensor], ...]:
    """As GraphDenoiser takes them, whose third argument is left out of a model without conditions."""
    x, sigma, *_ = inputs.values()
    given = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}
    return (x, sigma, given) if given else (x, sigma)


def _saved_as_onnx(
    denoiser: LoadedDenoiser, program: torch.export.ExportedProgram, path: Path, names: list[str]
) -> tuple[Run, str]:
    check_installed("onnx", f"--format {ONNX}", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    try:
        with _quiet():
            _remove_idle_squeezes(program)
            found = torch.onnx.export(program, dynamo=True, input_names=names, output_names=["denoised"])
            assert found is not None
            found.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"{denoiser.info.url}: {_cant(denoiser, ONNX, error)}") from error

    def run(inputs: dict[str, Tensor]) -> Tensor:
        (denoised,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(denoised)

    return run, f"onnxruntime {onnxruntime.__version__}"


def _remove_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """torch's squeeze of an axis that is longer than 1 does nothing (PixArt has one); onnx's refuses it."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _difference(denoiser: LoadedDenoiser, run: Run, format: str, rows: int) -> float:
    """The greatest of any value at CHECKED_ROWS. Raises UserError where it is above TOLERANCE."""
    greatest = 0.0
    for count in (rows,) if rows else CHECKED_ROWS:
        inputs = graph_inputs(denoiser, count)
        with torch.no_grad():
            ours = GraphDenoiser(denoiser)(*_arguments(inputs))
        found = float((run(inputs) - ours).abs().max())
        if not found <= TOLERANCE * denoiser.sigma_data:  # NaN is not
            raise UserError(
                f"{denoiser.info.url}: what the {format} graph gives is {found:g} away from what the model gives"
            )
        greatest = max(greatest, found)
    return greatest


def _cant(denoiser: LoadedDenoiser, format: str, error: Exception) -> str:
    while error.__cause__ is not None:  # the exporters wrap the one line that says what they don't know
        error = cast(Exception, error.__cause__)
    lines = [line.strip() for line in str(error).splitlines()]
    causes = [line[2:].partition(". ")[0] for line in lines if line.startswith("- ")]  # of constraints of the batch
    reason = f"{type(error).__name__}: {shortened(next(iter(lines), ''), 200)}"
    if causes:
        reason = (
            f"its code makes a number of the batch, or decides by it ({shortened(causes[0], 200)}): use x.shape[0] in "
            "the place of len(x) and int(...), or make a graph for one number of rows: --rows 16"
        )
    return f"network.kind '{denoiser.info.config.network.kind}' can't be exported as {format}: {reason}"


def _described(path: Path) -> ExportedFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ExportedFile(path.name, path.stat().st_size, digest)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own prints and warnings, of which every user sees a page otherwise."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
