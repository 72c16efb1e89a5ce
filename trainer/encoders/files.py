"""The files of an encoder: a folder of this machine, or a copy of what a URL holds; their hash, wherever they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scoreray.data.errors import DataError, UserError
from scoreray.data.scratch import scratch_folder
from scoreray.data.storage.store import local_path, open_store
from scoreray.trainer.networks.pretrained_folder import read_json, weight_files

COPIED = (".json", ".safetensors", ".txt", ".model")  # configs, weights, and tokenizers' files


def absolute(path: str) -> str:
    """A path of this machine from its root, as other folders and processes find it; a URL as it is."""
    folder = local_path(path)
    return path if folder is None else os.path.abspath(folder)


@contextlib.contextmanager
def local_folder(path: str, what: str) -> Iterator[Path]:
    """The folder, or a copy of the objects under a URL. Raises UserError, which begins with `what`."""
    folder = local_path(path)
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{what}{path}: no such folder; give one that save_pretrained wrote, or link it there")
        yield folder
        return
    store = open_store(path)
    keys = [key for key, _ in store.list() if key.endswith(COPIED)]
    if not keys:
        raise UserError(f"{what}{path}: nothing is there; give a folder that save_pretrained wrote")
    with scratch_folder() as copy:
        for key in keys:
            (copy / key).parent.mkdir(parents=True, exist_ok=True)
            (copy / key).write_bytes(store.get(key))
        yield copy


def digest(folder: Path, beside: Sequence[Path] = ()) -> str:
    """SHA-256 of a model's config and weights by their names, however they are split into files; and of files `beside`
    it, such as a tokenizer's. Keys of the config that begin with '_' (the library's version, a path) are left out.

    Raises UserError where there are no weights, DataError where they can't be read.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    return digest_of(config, _tensors(folder), beside)


def digest_of(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], beside: Sequence[Path] = ()
) -> str:
    """`digest` of a config and weights by their names, looked at one after another."""
    found = {name: _digest_of_tensor(tensor) for name, tensor in tensors}
    sums = [hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()]
    sums += [f"{name} {found[name]}" for name in sorted(found)]
    sums += [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sorted(beside)]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it has no iterator)
                    yield name, opened.get_tensor(name)
        except Exception as error:  # SafetensorError is no public class
            raise DataError(f"{file}: can't be read as safetensors: {' '.join(str(error).split())}") from None


def _digest_of_tensor(tensor: torch.Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
