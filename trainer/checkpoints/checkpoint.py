"""Checkpoints: safetensors of fragments, hashed, committed by a marker that is written last.

    <run>/checkpoints/000000012800-3f9a1c02/      images seen, and the attempt that wrote it
        rank-00000.safetensors                    this rank's fragments: "<state>/<parameter>@<start>" -> [length] fp32
        rank-00000-001.safetensors                more of them, where one file would be large
        rank-00000.json                           their table, the files' sizes and SHA-256; written when it is done
        COMMITTED.json                            the marker, written last (`marker.py`)
    <run>/snapshots/000000012800-3f9a1c02/        the averages alone, in fp16, kept for good: what `posthoc.py` mixes

No file is a pickle. A file is read only after its SHA-256 was found to be the marker's. Any world size and ZeRO stage
can read what any other wrote (`fragments.py`). This file reads; `writer.py` writes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scoreray.data.errors import DataError, Unanswered, UserError
from scoreray.data.fields.description import DataDescription
from scoreray.data.scratch import scratch_file
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.trainer.checkpoints.marker import Marker, StoredFile
from scoreray.trainer.diffusion.buffers import state_buffers
from scoreray.trainer.networks.lora import ADAPTER_CONFIG
from scoreray.trainer.optim.fragments import MASTER, Fragment, StoredFragment, overlaps, parameter_shapes

FOLDER = "checkpoints"
SNAPSHOTS = "snapshots"
MARKER = "COMMITTED.json"
OWNER = "owner"  # the lease of the newest start of the run; an older one that still runs may not commit
BUFFERS = "buffers"
TRIES = 20  # of reading what is newest while a writer commits, and removes what was newest a moment ago


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder in the run's store and what its marker says."""

    store: Store
    folder: str
    marker: Marker

    @property
    def images_seen(self) -> int:
        return self.marker.images_seen

    @property
    def num_steps(self) -> int:
        return self.marker.num_steps

    @property
    def url(self) -> str:
        return self.store.url(self.folder)

    def restore(self, fragments: Iterable[Fragment], module: torch.nn.Module) -> None:
        """Write the stored state into `fragments` (any partition of the same parameters) and the module's buffers.

        Raises DataError when a file is not what the marker says, and when the module's parameters or buffers are not
        those that were stored: one is missing, there is one more, or a shape differs.
        """
        shapes = parameter_shapes(module, trained_only=self.marker.is_lora)
        self._check_fit("parameter", shapes, self.marker.shapes)
        with self._or_another():
            self._read(fragments)
            self._restore_buffers(module)

    def read(self, fragments: Iterable[Fragment]) -> None:
        """Write the stored state into `fragments`, of any partition of some of the parameters. Raises DataError."""
        with self._or_another():
            self._read(fragments)

    def check_data(self, data: DataDescription, url: str | Sequence[str]) -> None:
        """Raises UserError, with what differs, unless `data` (at `url`) are those that were trained on."""
        if differing := self.marker.differences(data):
            raise UserError(
                f"data.url: {url} is not the data set that {self.url} was trained on: {'; '.join(differing)}; "
                "give a URL where the same samples are, or begin a new run on these (another run.name, or --fresh)"
            )

    @contextlib.contextmanager
    def _or_another(self) -> Iterator[None]:
        """A DataError inside also says which checkpoint can be read instead."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{error}; {instead_of(self.store, self.folder)}") from error

    def _check_fit(self, what: str, wanted: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]) -> None:
        """Raises DataError unless both have the same names and shapes; a module without any takes what is stored."""
        for name in sorted(wanted.keys() | stored.keys()) if wanted else ():
            if (one := wanted.get(name)) is None or (other := stored.get(name)) is None:
                raise DataError(f"{self.url}: {what} {name} is {'not stored there' if one else 'of another network'}")
            if list(one) != list(other):
                raise DataError(f"{self.url}: {what} {name} has the shape {list(other)}, {list(one)} is wanted")

    def _read(self, fragments: Iterable[Fragment]) -> None:
        stored = self._stored()
        frozen = set(self.marker.frozen)
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
                        key = MASTER if fragment.name in frozen else key  # averages of what never changes
                        values = self._tensor(tensors, f"{key}/{piece.key}")
                        into[target : target + length].copy_(values[source : source + length])

    def full_state(self, key: str = MASTER) -> dict[str, torch.Tensor]:
        """Whole fp32 parameters by name: masters, or a tracked average ("ema_0.050"), and the module's buffers."""
        names = {MASTER, *self.marker.state_keys}
        if key not in names:
            raise UserError(f"{self.url} holds no '{key}'; it holds {', '.join(sorted(names))}")
        shapes = self.marker.shapes
        flat = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in shapes.items()}
        self.read(Fragment(name, 0, len(values), {key: values}) for name, values in flat.items())
        state = {name: values.view(shapes[name]) for name, values in flat.items()}
        return state | self.buffers()

    def _stored(self) -> dict[str, list[StoredFragment]]:
        stored: dict[str, list[StoredFragment]] = {}
        for file, about in self.marker.files.items():
            for name, start, length in about.fragments:
                stored.setdefault(name, []).append(StoredFragment(name, start, length, file))
        return stored

    def _tensor(self, tensors: Any, key: str) -> torch.Tensor:
        try:
            return tensors.get_tensor(key)
        except Exception:
            raise DataError(f"{self.url}: holds no '{key}'; was another EMA length or optimizer tracked?") from None

    def _verified(self, file: str) -> contextlib.AbstractContextManager[Path]:
        return verified_copy(self.store, f"{self.folder}/{file}", self.marker.files[file])

    def buffers(self) -> dict[str, torch.Tensor]:
        """The module's buffers by name."""
        file = f"{BUFFERS}.safetensors"
        if file not in self.marker.files:
            return {}
        with self._verified(file) as path, safe_open(path, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118

    def _restore_buffers(self, module: torch.nn.Module) -> None:
        targets = state_buffers(module)
        if not targets:
            return
        stored = self.buffers()
        shapes = ({name: list(tensor.shape) for name, tensor in each.items()} for each in (targets, stored))
        self._check_fit("buffer", *shapes)
        for name, value in stored.items():
            targets[name].copy_(value)


@contextlib.contextmanager
def verified_copy(store: Store, key: str, about: StoredFile) -> Iterator[Path]:
    """A local copy of an object whose size and SHA-256 are those of `about`, while it is used. Raises DataError."""
    size, digest, chunk = about.bytes, hashlib.sha256(), 64 << 20
    with scratch_file() as (local, path):
        for start in range(0, max(size, 1), chunk):
            try:
                data = store.get(key, start, min(start + chunk, size))
            except NotFound:
                raise DataError(f"{store.url(key)}: missing, though it was committed") from None
            digest.update(data)
            local.write(data)
        local.flush()
        if (found := path.stat().st_size) != size:
            raise DataError(f"{store.url(key)}: it has {found:,} bytes, {size:,} were committed")
        if digest.hexdigest() != about.sha256:
            raise DataError(f"{store.url(key)}: its bytes are not those that were committed (SHA-256)")
        yield path


def committed(run: Store, place: str = FOLDER) -> list[str]:
    """Folders of a run's committed checkpoints (or `SNAPSHOTS`), oldest first; `place` "": those of this very store."""
    prefix = f"{place}/" if place else ""
    return committed_of((key for key, _ in run.list(prefix)), prefix)


def committed_of(keys: Iterable[str], prefix: str = f"{FOLDER}/") -> list[str]:
    """`committed`, of the keys that a listing of `prefix` has found."""
    end = "/" + MARKER
    found = (key.removesuffix(end) for key in keys if key.endswith(end))
    return sorted(folder for folder in found if "/" not in folder.removeprefix(prefix))


def latest(run: Store) -> Checkpoint | None:
    """The newest committed checkpoint of a run, None when there is none. Raises DataError where it is damaged."""
    for _ in range(TRIES):
        folders = committed(run)
        if not folders:
            return None
        try:
            return _open(run, folders[-1])
        except NotFound:  # a writer has removed it since: it has committed a newer one, or was taken over
            continue
        except DataError as error:
            raise DataError(f"{error}; {instead_of(run, folders[-1])}") from error
    raise Unanswered(f"{run.url(FOLDER)}: checkpoints go as fast as they are found; is something removing them?")


def instead_of(store: Store, folder: str) -> str:
    """What a person can do about a checkpoint that can't be read, at `folder` of `store`."""
    place = folder.rpartition("/")[0]
    if place == SNAPSHOTS:
        return f"without the folder {store.url(folder)} averages are made of the other snapshots"
    damaged = [store.url(folder)]
    for older in reversed([one for one in committed(store, place) if one < folder]):
        try:
            images = _open(store, older).images_seen
        except NotFound:
            continue
        except DataError:
            damaged.append(store.url(older))
            continue
        folders = f"folder{'s' if damaged[1:] else ''} {' and '.join(damaged)}"
        return f"without the {folders} the one at {images:,} images is the newest"
    return "no older one is committed"


def open_checkpoint(store: Store, folder: str) -> Checkpoint:
    """A committed checkpoint by its folder. Raises UserError when it is not there or was never committed, DataError
    when its marker is damaged."""
    try:
        return _open(store, folder)
    except NotFound:
        raise UserError(f"{store.url(folder)}: no committed checkpoint (its {MARKER} is missing)") from None
    except DataError as error:
        raise DataError(f"{error}; {instead_of(store, folder)}") from error


def _open(store: Store, folder: str) -> Checkpoint:
    key = f"{folder}/{MARKER}"
    return Checkpoint(store, folder, Marker.from_json(store.get(key), store.url(key)))


def find(url: str) -> Checkpoint:
    """The checkpoint that a person means: a run (its newest committed one) or one checkpoint's own folder."""
    store = open_store(url.rstrip("/"))
    store.check_reachable()
    if store.exists(MARKER):
        parent, _, name = url.rstrip("/").rpartition("/")
        return open_checkpoint(open_store(parent or "."), name)
    checkpoint = latest(store)
    if checkpoint is None:
        if store.exists(ADAPTER_CONFIG):
            raise UserError(
                f"{url}: a LoRA of peft; `scoreray import lora {url} OUT --base MODEL` makes it one of ours"
            )
        if store.exists("model_index.json"):
            raise UserError(f"{url}: diffusers' pipeline; `scoreray import diffusers {url} OUT` makes it one of ours")
        raise UserError(f"{url}: neither a run with a committed checkpoint nor a checkpoint, nor an exported model")
    return checkpoint
