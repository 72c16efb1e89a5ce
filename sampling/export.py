"""Models for inference: safetensors, one per EMA length, and a page of JSON; nothing of the training state.

<out>/model.json                  what the network is, written last: config, classes, each file's bytes and SHA-256
<out>/ema-0.050.safetensors       the network's fp32 weights, averaged at that length; names as in its state_dict
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.scratch import scratch_file
from scoreray.data.store import NotFound, Store, open_store
from scoreray.trainer.checkpoint import Checkpoint, find, verified_copy
from scoreray.trainer.ema import RAW, choose_length, lengths_stored, state_key
from scoreray.trainer.tensor_file import write_tensors

PAGE = "model.json"
FORMAT = 1
PREFIX = "denoiser.network."  # where the network lies in the training module
OURS = r"(ema-([0-9.]+|half-life)|weights-none)\.safetensors"

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ExportedModel:
    """A folder that `export` wrote; `chosen`: the length that its URL named, if it was one file's."""

    store: Store
    page: dict[str, Any]
    chosen: str | None = None

    def weights(self, name: str) -> State:
        """The network's state. Raises UserError (no such length here), DataError (not the bytes that were written)."""
        files = self.page["files"]
        if name not in files:
            raise UserError(f"EMA length '{name}' is not in {self.store.url()}; {nearest(name, files)}")
        about = files[name]
        with verified_copy(self.store, about["file"], about) as path:
            return load_file(path)


def export(
    checkpoint: str | Checkpoint,
    out: str,
    lengths: Sequence[str] = (),
    *,
    states: Mapping[str, Callable[[], State]] | None = None,
) -> dict[str, Any]:
    """Write the networks of a committed checkpoint to `out` (a folder or `s3://` prefix); returns its page.

    lengths: tracked EMA lengths ("0.050", "none" for raw weights); all tracked ones when empty.
    states: whole training states by length for those that the checkpoint does not hold (see `trainer/posthoc.py`).
    Raises UserError (not committed, no such length), DataError (damaged), StorageError.
    """
    checkpoint = find(checkpoint) if isinstance(checkpoint, str) else checkpoint
    states = states or {}
    tracked = lengths_stored(checkpoint.marker["state_keys"])
    names = [choose_length(name, (*tracked, *states, RAW), checkpoint.url) for name in lengths] or tracked
    store = open_store(out)
    store.delete([PAGE])
    files = {}
    for name in dict.fromkeys(names):
        state = states[name]() if name in states else checkpoint.full_state(state_key(name))
        weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        files[name] = _put(store, f"weights-{name}.safetensors" if name == RAW else f"ema-{name}.safetensors", weights)
    page = {
        "format": FORMAT,
        "checkpoint": checkpoint.url,
        "images_seen": checkpoint.images_seen,
        "image_shape": checkpoint.marker["image_shape"],
        "classes": checkpoint.marker["classes"],
        "files": files,
        "config": checkpoint.marker["config"],
    }
    store.put(PAGE, json.dumps(page, indent=2).encode())
    there = {key for start in ("ema-", "weights-") for key, _ in store.list(start) if re.fullmatch(OURS, key)}
    store.delete(there - {about["file"] for about in files.values()})  # of an export before: no page names them now
    return page


def find_exported(url: str) -> ExportedModel | None:
    """The exported model at `url`, a folder or one of its safetensors files; None when it is something else.

    Raises DataError when its page is not one.
    """
    folder, file = url.rstrip("/"), None
    if folder.endswith(".safetensors"):
        folder, _, file = folder.rpartition("/")
    store = open_store(folder or ".")
    store.check_reachable()
    try:
        page = json.loads(store.get(PAGE))
        if page["format"] != FORMAT:
            raise DataError(f"{store.url(PAGE)}: format {page['format']}, this version reads {FORMAT}")
        for about in page["files"].values():
            if "/" in about["file"] or len(about["sha256"]) != 64 or int(about["bytes"]) < 0:
                raise ValueError(f"bad entry {about}")
        page["config"], page["image_shape"], page["classes"], page["images_seen"]
    except NotFound:
        if file is None:
            return None
        raise UserError(f"{url}: no {PAGE} lies beside it, so it is not a model that was exported") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{store.url(PAGE)}: not an exported model's page: {error!r}") from None
    if file is None:
        return ExportedModel(store, page)
    chosen = [name for name, about in page["files"].items() if about["file"] == file]
    if not chosen:
        raise UserError(f"{url}: not one of the files of {store.url(PAGE)}")
    return ExportedModel(store, page, chosen[0])


def _put(store: Store, key: str, weights: State) -> dict[str, Any]:
    with scratch_file() as (file, path):
        size, digest = write_tensors(file, {name: tensor.detach().cpu() for name, tensor in weights.items()})
        store.put(key, path)
    return {"file": key, "bytes": size, "sha256": digest}
