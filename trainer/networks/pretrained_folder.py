"""Folders that save_pretrained of diffusers or transformers wrote: their JSON, and weights by the library's own loader.

Weights are read from safetensors alone: a pickle can run code when it is read.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scoreray.data.errors import DataError, UserError, listed, shortened
from scoreray.data.own_code import line_of

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SAFETENSORS = ".safetensors"
LOADING_INFO = {
    "missing_keys": "missing",
    "unexpected_keys": "not of this network",
    "mismatched_keys": "of other shapes",
}
WEIGHTS = "diffusion_pytorch_model"  # what diffusers names a component's weights
DIFFUSERS_OPTIONS: dict[str, Any] = {"low_cpu_mem_usage": False, "torch_dtype": torch.float32}


def load_pretrained(
    library: str, of_class: Any, path: Path, stem: str, *, whole: bool = True, **options: Any
) -> torch.nn.Module:
    """A module of `of_class` (its `from_pretrained` is called with the options) with the weights of a folder, float32.

    stem: what the library names weights, before their variant and suffix. whole: all that the files hold must belong to
    it; else they may hold more (a text encoder's are often those of a larger model).
    Raises UserError (no safetensors), DataError (not those of the folder's config).
    """
    # torch notes once a process, at the first use of a device as a context, which functions make tensors. transformers
    # 5 does that with torch.linspace replaced by its own, and the real one would ignore such contexts from then on.
    with torch.device("meta"):
        torch.empty(0)
    variant = _variant(path, stem)
    for file in weight_files(path):
        check_readable(file)
    try:
        with quiet(library):
            module, info = of_class.from_pretrained(
                str(path), variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except Exception as error:  # the library raises what its readers raise: OSError, SafetensorError, ValueError, ...
        reason = shortened(" ".join(str(error).split()), 300)
        raise DataError(f"{path}: {of_class.__name__} of {library} can't load it: {reason}") from None
    wrong = [
        f"{what}: {listed(sorted(map(_name, info[key])))}"
        for key, what in LOADING_INFO.items()
        if info[key] and (whole or key != "unexpected_keys")
    ]
    if wrong:
        raise DataError(f"{path}: weights and config.json do not fit: {'; '.join(wrong)}")
    all_finite(path, module.state_dict())
    return module  # type: ignore[no-any-return]


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Without the lines that the library logs where it builds from a config of another of its versions, and without
    bars of the weights that it loads."""
    logging = importlib.import_module(f"{library}.utils.logging")
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def check_readable(file: Path) -> None:
    """Raises DataError unless the header of a safetensors file fits its size: a download that was cut off is not."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: is cut off or damaged ({line_of(error)}); copy it again") from None


def all_finite(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises DataError where a weight is not finite: all that it makes would be NaN."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        raise DataError(f"{path}: weights that are not finite: {listed(bad)}")


def _name(found: str | tuple[Any, ...]) -> str:
    """Of a tensor: the libraries give it alone, or with its shapes in the file and in the network."""
    return found if isinstance(found, str) else str(found[0])


def weight_files(path: Path) -> list[Path]:
    """Its files in safetensors. Raises UserError where there are none, naming a pickle if that is all there is."""
    files = sorted(path.iterdir())
    found = [file for file in files if file.suffix == SAFETENSORS]
    if not found:
        for file in files:
            refuse_pickle(file)
    return found


def _variant(path: Path, stem: str) -> str | None:
    """Of <stem>.<variant>.safetensors: none where the plain one is there."""
    found = [file.name for file in weight_files(path)]
    if not found:
        raise UserError(f"{path}: has config.json but no weights; {stem}{SAFETENSORS} belongs there")
    variants = {name.removeprefix(stem).removesuffix(SAFETENSORS) for name in found}
    if any(not text or text.startswith("-") for text in variants):  # -00001-of-00002: a part of many
        return None
    named = sorted(text.lstrip(".").split("-")[0] for text in variants if text.startswith("."))
    if not named:
        name = path / found[0]
        raise UserError(f"{name}: is named otherwise than the library names weights; rename it to {stem}{SAFETENSORS}")
    return named[0]


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a file that is named as one, whatever is in it."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: is a pickle, which can run code when it is read, and is refused; where you trust it, write it as "
            "safetensors (docs/pretrained.md has the lines that do)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises DataError."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no JSON object")
    return found
