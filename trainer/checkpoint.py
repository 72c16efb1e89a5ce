"""Checkpoints: safetensors of fragments, hashed, committed by a marker that is written last.

    <run>/checkpoints/000000012800-3f9a1c02/      images seen, and the attempt that wrote it
        rank-00000.safetensors                    this rank's fragments: "<state>/<parameter>@<start>" -> [length] fp32
        rank-00000-001.safetensors                more of them, where one file would be large
        rank-00000.json                           their table, the files' sizes and SHA-256; says this rank is done
        COMMITTED.json                            the marker, written last: the files' hashes, and what was trained
    <run>/snapshots/000000012800-3f9a1c02/        the averages alone, in fp16, kept for good: what `posthoc.py` mixes

No file is a pickle. A file is read only after its SHA-256 was found to be the marker's. Any world size and ZeRO stage
can read what any other wrote (`fragments.py`). This file reads; `checkpoint_writer.py` writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scoreray.data.errors import DataError, UserError
from scoreray.data.scratch import scratch_file
from scoreray.data.store import NotFound, Store, open_store
from scoreray.trainer.buffers import state_buffers
from scoreray.trainer.fragments import MASTER, Fragment, StoredFragment, overlaps

FOLDER = "checkpoints"
SNAPSHOTS = "snapshots"
MARKER = "COMMITTED.json"
OWNER = "owner"  # holds the token of the newest start of the run; an older one that still lives may not commit
FORMAT = 1
BUFFERS = "buffers"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder in the run's store and what its marker says."""

    store: Store
    folder: str
    marker: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return int(self.marker["images_seen"])

    @property
    def num_steps(self) -> int:
        return int(self.marker["num_steps"])

    @property
    def url(self) -> str:
        return self.store.url(self.folder)

    def restore(self, fragments: Iterable[Fragment], module: torch.nn.Module) -> None:
        """Write the stored state into `fragments` (any partition of the same parameters) and the module's buffers.

        Raises DataError when a file is not what the marker says, or a parameter is missing or of another shape.
        """
        try:
            self._restore(fragments, module)
        except DataError as error:
            raise DataError(f"{error}; {instead_of(self)}") from error

    def _restore(self, fragments: Iterable[Fragment], module: torch.nn.Module) -> None:
        stored = self._stored()
        by_file: dict[str, list[tuple[Fragment, StoredFragment, int, int, int]]] = {}
        for fragment in fragments:
            try:
                copies = overlaps(fragment.start, fragment.length, stored.get(fragment.name, ()))
            except ValueError as error:
                raise DataError(f"{self.url}: parameter {fragment.name}: {error}") from None
            for piece, source, target, length in copies:
                by_file.setdefault(piece.file, []).append((fragment, piece, source, target, length))
        for file, wanted in by_file.items():
            with self._verified(file) as path, safe_open(path, "pt") as tensors:
                for fragment, piece, source, target, length in wanted:
                    for key, into in fragment.tensors.items():
                        values = self._tensor(tensors, f"{key}/{piece.key}")
                        into[target : target + length].copy_(values[source : source + length])
        self._restore_buffers(module)

    def full_state(self, key: str = MASTER) -> dict[str, torch.Tensor]:
        """Whole fp32 parameters by name: masters, or a tracked average ("ema_0.050"), and the module's buffers."""
        names = {MASTER, *self.marker["state_keys"]}
        if key not in names:
            raise UserError(f"{self.url} holds no '{key}'; it holds {', '.join(sorted(names))}")
        shapes = self.marker["shapes"]
        flat = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in shapes.items()}
        module = torch.nn.Module()
        self.restore((Fragment(name, 0, len(values), {key: values}) for name, values in flat.items()), module)
        state = {name: values.view(shapes[name]) for name, values in flat.items()}
        return state | self.buffers()

    def _stored(self) -> dict[str, list[StoredFragment]]:
        stored: dict[str, list[StoredFragment]] = {}
        for file, about in self.marker["files"].items():
            for name, start, length in about["fragments"]:
                stored.setdefault(name, []).append(StoredFragment(name, start, length, file))
        return stored

    def _tensor(self, tensors: Any, key: str) -> torch.Tensor:
        try:
            return tensors.get_tensor(key)
        except Exception:
            raise DataError(f"{self.url}: holds no '{key}'; was another EMA length or optimizer tracked?") from None

    def _verified(self, file: str) -> contextlib.AbstractContextManager[Path]:
        return verified_copy(self.store, f"{self.folder}/{file}", self.marker["files"][file])

    def buffers(self) -> dict[str, torch.Tensor]:
        """The module's buffers by name."""
        file = f"{BUFFERS}.safetensors"
        if file not in self.marker["files"]:
            return {}
        with self._verified(file) as path, safe_open(path, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118

    def _restore_buffers(self, module: torch.nn.Module) -> None:
        targets = state_buffers(module)
        if not targets:
            return
        for name, value in self.buffers().items():
            targets[name].copy_(value)


@contextlib.contextmanager
def verified_copy(store: Store, key: str, about: dict[str, Any]) -> Iterator[Path]:
    """A local copy of an object whose size and SHA-256 are those of `about`, while it is used. Raises DataError."""
    size, digest, chunk = about["bytes"], hashlib.sha256(), 64 << 20
    with scratch_file() as (local, path):
        for start in range(0, max(size, 1), chunk):
            try:
                data = store.get(key, start, min(start + chunk, size))
            except NotFound:
                raise DataError(f"{store.url(key)}: missing, though it was committed") from None
            digest.update(data)
            local.write(data)
        local.flush()
        if (there := path.stat().st_size) != size:
            raise DataError(f"{store.url(key)}: {there:,} bytes are there, {size:,} were committed")
        if digest.hexdigest() != about["sha256"]:
            raise DataError(f"{store.url(key)}: its bytes are not those that were committed (SHA-256)")
        yield path


def committed(run: Store, place: str = FOLDER) -> list[str]:
    """Folders of a run's committed checkpoints (or `SNAPSHOTS`), oldest first."""
    end = "/" + MARKER
    return sorted(key.removesuffix(end) for key, _ in run.list(place + "/") if key.endswith(end))


def latest(run: Store) -> Checkpoint | None:
    """The newest committed checkpoint of a run, None when there is none."""
    folders = committed(run)
    return open_checkpoint(run, folders[-1]) if folders else None


def instead_of(damaged: Checkpoint) -> str:
    """What a person can do about a checkpoint that can't be read."""
    older = [folder for folder in committed(damaged.store) if folder < damaged.folder]
    if not older:
        return "no older one is committed"
    images = open_checkpoint(damaged.store, older[-1]).images_seen
    return f"without the folder {damaged.url} the one at {images:,} images is the newest"


def open_checkpoint(store: Store, folder: str) -> Checkpoint:
    """A committed checkpoint by its folder. Raises UserError when it is not there or was never committed."""
    try:
        data = store.get(f"{folder}/{MARKER}")
    except NotFound:
        raise UserError(f"{store.url(folder)}: no committed checkpoint (its {MARKER} is missing)") from None
    try:
        marker = json.loads(data)
        if marker["format"] != FORMAT:
            raise DataError(f"{store.url(folder)}: format {marker['format']}, this version reads {FORMAT}")
        _check_marker(marker)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.url(folder)}/{MARKER}: not a marker: {error!r}") from None
    return Checkpoint(store, folder, marker)


def find(url: str) -> Checkpoint:
    """The checkpoint that a person means: a run (its newest committed one) or one checkpoint's own folder."""
    store = open_store(url.rstrip("/"))
    store.check_reachable()
    if store.exists(MARKER):
        parent, _, name = url.rstrip("/").rpartition("/")
        return open_checkpoint(open_store(parent), name)
    checkpoint = latest(store)
    if checkpoint is None:
        raise UserError(f"{url}: neither a run with a committed checkpoint nor a checkpoint")
    return checkpoint


def _check_marker(marker: dict[str, Any]) -> None:
    int(marker["images_seen"]), int(marker["num_steps"]), marker["config"], list(marker["state_keys"])
    for name, about in marker["files"].items():
        if "/" in name or len(about["sha256"]) != 64 or int(about["bytes"]) < 0:
            raise ValueError(f"bad entry for file {name!r}")
        for _, start, length in about["fragments"]:
            if int(start) < 0 or int(length) <= 0:
                raise ValueError(f"bad fragment in {name!r}")
